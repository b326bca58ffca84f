from modelopt.torch import quantization as mtq

NVFP4_CFG = {
    "quant_cfg": {
        "*weight_quantizer": {
            "num_bits": 4,
            "format": "nvfp4"
        },
        "*input_quantizer": {
            "num_bits": 8,
            "format": "fp8"
        }
    },
    "algorithm": "max"
}

# Usage
model = quantize(model, NVFP4_CFG, forward_loop=data_loader)
