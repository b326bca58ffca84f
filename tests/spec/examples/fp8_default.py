FP8_DEFAULT_CFG = {
    "quant_cfg": {
        "*weight_quantizer": {
            "num_bits": 8,
            "format": "fp8"  # Can be e4m3 or e5m2
        },
        "*input_quantizer": {
            "num_bits": 8,
            "format": "fp8"
        }
    },
    "algorithm": "max"
}
