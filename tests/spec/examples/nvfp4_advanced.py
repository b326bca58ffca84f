from modelopt.torch.quantization import quantize
from modelopt.torch import quantization as mtq

NVFP4_CFG = {
    "quant_cfg": {
        # Linear layer weights: NVFP4 (4-bit)
        "*.linear.weight_quantizer": {
            "num_bits": 4,
            "format": "nvfp4"
        },
        # Linear layer activations: FP8
        "*.linear.input_quantizer": {
            "num_bits": 8,
            "format": "fp8"
        },
        # LM head: special case (maybe no quantization)
        "*lm_head*": {
            "num_bits": 8,
        },
        # Default for everything else
        "default": {
            "num_bits": 8,
            "format": "fp8"
        }
    },
    "algorithm": "max"
}

def calib_loop(model):
    # Calibration on representative data
    for i, batch in enumerate(calib_dataloader):
        if i >= 32:  # Use first 32 batches
            break
        model(batch.cuda())

# Apply NVFP4 quantization
# Backends will automatically use fused NVFP4 GEMM kernels
model = quantize(model, NVFP4_CFG, forward_loop=calib_loop)

# Export for deployment
from modelopt.torch.export import export_torch_model
export_torch_model(model, "nvfp4_model.pt")
