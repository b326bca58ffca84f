"""The verbs of quantization: each takes a model, changes it in place, and returns it.

quantize = convert + configure by rules + calibrate, as one recorded step;   calibrate = the last part again
"""

from __future__ import annotations

from typing import Any

from torch import nn

from modelopt.core.errors import ConfigError, MissingAlgorithmError
from modelopt.core.logging import warn
from modelopt.torch.opt.mode import apply_mode
from modelopt.torch.quantization.config import QuantizeConfig
from modelopt.torch.quantization.conversion import Filter, named_quantizers, set_quantizer_attributes_partial
from modelopt.torch.quantization.mode import QuantizeModeRegistry
from modelopt.torch.quantization.pack import CompressConfig, fold_weight
from modelopt.torch.quantization.presets import get_config
from modelopt.torch.quantization.saving import attach_save_pretrained
from modelopt.torch.quantization.summary import print_quant_summary

__all__ = [
    "auto_quantize",
    "calibrate",
    "compress",
    "disable_quantizer",
    "enable_quantizer",
    "fold_weight",
    "print_quant_summary",
    "quantize",
]


def quantize(model: nn.Module, config: dict[str, Any] | QuantizeConfig | str, forward_loop: Any = None) -> nn.Module:
    """Quantize `model` in place and return it.

    Args:
        model: any module. Its weights stay in their dtype; quantizers round them (and the inputs) to what the format can hold.
        config: a config of any dialect (see `config.py`), a `*_CFG` preset, or the name of a preset or scheme ("nvfp4").
        forward_loop: a function that runs the model on data, or an iterable of batches (tensor, tuple, dict). Needed where
            the range of an activation is measured.

    Everything that can be checked is checked first; whatever fails, the model is then as it was.

    Raises ConfigError, UnknownNameError (a name, with the nearest one), ModeError (quantized already), FormatError (a shape),
    CalibrationError (no data, data that reaches not every layer, NaN or infinity), MissingAlgorithmError.

        model = quantize(model, INT8_DEFAULT_CFG, forward_loop=lambda m: [m(x) for x in batches])
    """
    wanted = get_config(config) if isinstance(config, str) else config
    if not isinstance(wanted, dict | QuantizeConfig):
        raise ConfigError(f"A quantization config is a mapping, a QuantizeConfig or a name, not a {type(config).__name__}.")
    step = [("quantize", wanted)]
    model = apply_mode(model, step, registry=QuantizeModeRegistry, mode_kwargs={"forward_loop": forward_loop})
    if not any(q.is_enabled for _, q in named_quantizers(model)):
        warn("No quantizer is enabled: no rule of the config switches anything of this model on.")
    attach_save_pretrained(model)
    return model


def calibrate(
    model: nn.Module, algorithm: str | dict[str, Any] | list[Any] | None = "max", forward_loop: Any = None
) -> nn.Module:
    """Measure the ranges of a quantized model again, with another algorithm or other data, and return the model.

    `algorithm` is a name, a mapping with the key "method", a list of these, or None. Raises ModeError if the model is not
    quantized, MissingAlgorithmError, CalibrationError.

        calibrate(model, {"method": "mse"}, forward_loop)
    """
    step = [("calibrate", {"algorithm": algorithm})]
    return apply_mode(model, step, registry=QuantizeModeRegistry, mode_kwargs={"forward_loop": forward_loop})


def auto_quantize(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Search a format for each layer. Not part of this version: raises MissingAlgorithmError."""
    raise MissingAlgorithmError(
        'The algorithm "auto_quantize" (a format for each layer by search) is not part of this version. '
        "Use quantize(model, config) with one rule for each group of layers."
    )


def compress(model: nn.Module, config: dict[str, Any] | CompressConfig | None = None) -> nn.Module:
    """Replace the quantized weights of `model` by packed codes and scales, in place; return the model.

    Outputs stay bit-equal to the fake-quantized model where weights are dequantized (CPU), and equal up to order and rounding of
    sums where a kernel multiplies the codes (docs/backends.md). Packed weights take no gradient. Weights whose quantizer is off
    stay.
    Raises ModeError where nothing can be packed.

        model = compress(quantize(model, "int4"))
        compress(model, {"compress": {"default": False, "*mlp*": True}})
    """
    return apply_mode(model, [("compress", {} if config is None else config)], registry=QuantizeModeRegistry)


def disable_quantizer(model: nn.Module, where: Filter) -> nn.Module:
    """Switch off the quantizers whose name matches a wildcard, or for whose name a function says True; return the model.

    disable_quantizer(model, "*lm_head*")
    """
    set_quantizer_attributes_partial(model, where, {"enable": False})
    return model


def enable_quantizer(model: nn.Module, where: Filter) -> nn.Module:
    """Switch on the quantizers that match. Raises ConfigError where one was never given a format.

    enable_quantizer(model, "*layers.0*input_quantizer")
    """
    set_quantizer_attributes_partial(model, where, {"enable": True})
    return model
