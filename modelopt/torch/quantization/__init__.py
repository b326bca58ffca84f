"""Quantization: `quantize(model, config, forward_loop)`, its configs, its quantizers and its modules.

Names are imported from their files when first asked for, so that this package costs little to import.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "model_quant": (
        "quantize calibrate auto_quantize enable_quantizer disable_quantizer print_quant_summary fold_weight compress"
    ),
    "summary": "quant_summary coverage Coverage",
    "conversion": (
        "register unregister replace_quant_module set_quantizer_by_cfg set_quantizer_by_cfg_context set_quantizer_attribute "
        "set_quantizer_attributes_full set_quantizer_attributes_partial named_quantizers"
    ),
    "config": "QuantizeConfig QuantizerAttributeConfig",
    "pack": "CompressConfig",
    "mode": "QuantizeModeRegistry",
    "tensor_quant": "scaled_e4m3_impl scaled_e4m3 fake_tensor_quant",
    "model_calib": (
        "calibrate_amax max_calibrate histogram_calibration mse_calibrate awq_calibration smoothquant_calibration "
        "collect_statistics"
    ),
    "presets": "get_config update_quant_cfg_with_kv_cache_quant PRESETS SCHEMES",
    "nn.modules": "QuantModuleRegistry TensorQuantizer SequentialQuantizer QuantModule QuantLinear",
    "nn.modules.weight_cache": "set_weight_cache_budget",
}
_NAMES = {name: module for module, names in _WHERE.items() for name in names.split()}
_SUBMODULES = ("nn", "calib", "backends", "config", "presets", "mode", "conversion", "model_quant", "model_calib", "tensor_quant")

__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name.endswith(("_CFG", "_CONFIG")):
        presets = importlib.import_module(f"{__name__}.presets")
        if hasattr(presets, name):
            return getattr(presets, name)
        hint = importlib.import_module("modelopt.core.errors").did_you_mean(name, presets.PRESETS)
        raise AttributeError(f"module {__name__!r} has no preset {name!r}.{hint}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    presets = importlib.import_module(f"{__name__}.presets")
    return sorted({*globals(), *_NAMES, *_SUBMODULES, *presets.PRESETS})
