"""The one quantizer: it observes a tensor, scales it, and calls one op.

    forward(x):  x * pre_quant_scale  ->  rotate?  ->  observe? (then x is returned as it is)  ->  fake_quantize(x - bias) + bias

Buffers carry the names that checkpoints of this field use: `_amax`, `_global_amax`, `_amin`, `_pre_quant_scale`, `_bias_value`.
With a two-level format whose blocks are dynamic (`e2m1[16]~*e4m3[...]*f32`), `_amax` is the amax of the whole tensor;
with static blocks, `_amax` is the grid of block amax and `_global_amax` the scalar.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modelopt.core.errors import CalibrationError, ConfigError
from modelopt.numerics import Format, parse
from modelopt.torch import kernels
from modelopt.torch.quantization.attributes import QuantizerAttributeConfig
from modelopt.torch.quantization.nn.transforms import rotate

BUFFERS = ("_amax", "_global_amax", "_amin", "_pre_quant_scale", "_bias_value")


class TensorQuantizer(nn.Module):
    """Fake-quantize one tensor. Without a config it is disabled and passes its input through.

    >>> q = TensorQuantizer({"num_bits": 8, "axis": None}); q.amax = 1.0
    >>> q(torch.tensor([0.1, 2.0]))        # steps of 1/127, saturated at 1
    tensor([0.1024, 1.0000])
    """

    def __init__(self, config: QuantizerAttributeConfig | dict[str, Any] | str | None = None) -> None:
        super().__init__()
        self.config: QuantizerAttributeConfig | None = None
        self.enabled = False
        self.clip_grad = False
        self.rotation: tuple[int, bool, bool] | None = None  # block (-1: the whole dimension), in float32, rotated back
        self.observer: Any = None
        self._format: Format | None = None
        self._format_text, self._amax_is_global = "", False
        for name in BUFFERS:
            self.register_buffer(name, None)
        if config is not None:
            self.set_from_cfg(config)

    # -- what it is ------------------------------------------------------------------------------------------------

    def set_from_cfg(self, config: QuantizerAttributeConfig | dict[str, Any] | str) -> None:
        """Take format and attributes from `config` (a format name or algebra string also works); forget old statistics."""
        cfg = QuantizerAttributeConfig.parse({"format": config} if isinstance(config, str) else config)
        for name in BUFFERS:
            setattr(self, name, None)
        self.config = cfg
        self.format = cfg.to_format()
        self.enabled = cfg.enable
        self.clip_grad = not cfg.pass_through_bwd
        self.rotation = rotation_of(cfg.rotate)
        if cfg.fixed_amax is not None:
            self.amax = cfg.fixed_amax

    @property
    def format(self) -> Format | None:
        """The number format, or None while nothing was configured."""
        return self._format

    @format.setter
    def format(self, value: Format | str | None) -> None:
        self._format = parse(value) if isinstance(value, str) else value
        self._format_text = "" if self._format is None else str(self._format)
        self._amax_is_global = self._format is not None and self._format.needs_global and self._format.dynamic

    @property
    def is_enabled(self) -> bool:
        """Whether the quantizer quantizes."""
        return self.enabled

    def enable(self) -> None:
        """Quantize from now on. Raises ConfigError if no format was ever set."""
        if self._format is None:
            raise ConfigError("This quantizer has no format. Configure it with set_from_cfg(...) before enabling it.")
        self.enabled = True

    def disable(self) -> None:
        """Pass the input through from now on; format and statistics are kept."""
        self.enabled = False

    @property
    def has_constant_amax(self) -> bool:
        """Whether the amax is given by the configuration, so that calibration leaves it alone."""
        return self.config is not None and self.config.fixed_amax is not None

    num_bits = property(lambda self: getattr(self.config, "num_bits", None), doc="`num_bits` of the configuration.")
    axis = property(lambda self: getattr(self.config, "axis", None), doc="`axis` of the configuration.")
    block_sizes = property(lambda self: getattr(self.config, "block_sizes", None), doc="`block_sizes` of the configuration.")
    bias_config = property(lambda self: getattr(self.config, "bias", None), doc="`bias` of the configuration, or None.")

    # -- statistics ------------------------------------------------------------------------------------------------

    def _set(self, name: str, value: Tensor | float | None, signed: bool = False) -> None:
        if value is None:
            setattr(self, name, None)
            return
        tensor = torch.as_tensor(value).detach().float()
        if tensor.device.type != "meta" and tensor.numel():
            low, high = (float(v) for v in torch.aminmax(tensor))
            if not (low >= 0 or (signed and low > -float("inf"))) or not high < float("inf"):
                raise CalibrationError(f"{name[1:]} must be finite{'' if signed else ' and not negative'}; got {low} to {high}.")
        setattr(self, name, tensor)

    amax = property(
        lambda self: self._amax, lambda self, v: self._set("_amax", v), doc="Largest magnitudes, float32; see the module."
    )
    global_amax = property(lambda self: self._global_amax, lambda self, v: self._set("_global_amax", v), doc="Scalar or None.")
    amin = property(lambda self: self._amin, lambda self, v: self._set("_amin", v, True), doc="Smallest values (zero point).")
    bias_value = property(lambda self: self._bias_value, lambda self, v: self._set("_bias_value", v, True), doc="Affine bias.")

    @property
    def pre_quant_scale(self) -> Tensor | None:
        """Per-channel factor on the input before quantization, [..., channels] or None. It applies even when disabled."""
        return self._pre_quant_scale

    @pre_quant_scale.setter
    def pre_quant_scale(self, value: Tensor | None) -> None:
        self._pre_quant_scale = None if value is None else torch.as_tensor(value).detach()

    def reset_amax(self) -> None:
        """Forget the calibrated statistics (a constant amax stays)."""
        if not self.has_constant_amax:
            self._amax = None
        self._global_amax = self._amin = self._bias_value = None

    # -- work ------------------------------------------------------------------------------------------------------

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the fake-quantized `inputs`, same shape and dtype. While an observer is attached it only observes."""
        if self._pre_quant_scale is not None:
            inputs = inputs * self._pre_quant_scale.to(inputs.dtype)
        x = inputs if self.rotation is None else rotate(inputs, self.rotation[0], self.rotation[1])
        if not self.enabled:  # a query is rotated with its keys, quantized or not
            return inputs if self.rotation is None or self.rotation[2] else x
        if self.observer is not None:
            self.observer.update(x)
        elif self._bias_value is None:
            x = kernels.fake_quantize(x, *self.op_arguments(), clip_grad=self.clip_grad)
        else:
            bias = self._bias_value.to(x.dtype)
            x = kernels.fake_quantize(x - bias, *self.op_arguments(), clip_grad=self.clip_grad) + bias
        return rotate(x, self.rotation[0], self.rotation[1]) if self.rotation is not None and self.rotation[2] else x

    def _apply(self, fn: Any, recurse: bool = True) -> TensorQuantizer:
        """Move the statistics between devices; a change of the model's dtype does not round (or overflow) them."""
        kept = {name: getattr(self, name) for name in BUFFERS}
        super()._apply(fn, recurse)
        for name, old in kept.items():
            new = getattr(self, name)
            if new is not None and new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self

    def op_arguments(self) -> tuple[str, Tensor | None, Tensor | None, Tensor | None]:
        """Return (format, amax, global_amax, amin) as the ops take them."""
        if self._amax_is_global:
            return self._format_text, None, self._amax, None
        return self._format_text, self._amax, self._global_amax, self._amin

    def extra_repr(self) -> str:
        """Format, amax and state in one line."""
        if self._format is None:
            return "disabled"
        amax = self._amax
        if amax is None or amax.device.type == "meta":
            shown = "none" if amax is None else f"{list(amax.shape)}"
        elif amax.numel() == 1:
            shown = f"{float(amax):.4g}"
        else:
            shown = f"[{float(amax.min()):.4g}, {float(amax.max()):.4g}]({amax.numel()})"
        parts = [self._format_text, f"amax={shown}"] + ([] if self._pre_quant_scale is None else ["pre_quant_scale"])
        return ("" if self.enabled else "disabled, ") + ", ".join(parts)


def rotation_of(rotate: bool | dict[str, Any]) -> tuple[int, bool, bool] | None:
    """Return (block or -1, in float32, rotated back) for the `rotate` attribute, or None where it is off."""
    settings = rotate if isinstance(rotate, dict) else {"enable": rotate}
    if not settings.get("enable", True):
        return None
    block = settings.get("block_size") or -1
    return int(block), bool(settings.get("rotate_fp32")), settings.get("mode", "rotate") == "rotate_back"


class SequentialQuantizer(nn.Sequential):
    """Quantizers applied one after the other, for instance INT4 blocks and then FP8 per tensor."""

    def __init__(self, *quantizers: TensorQuantizer) -> None:
        super().__init__(*quantizers)

    def set_from_cfg(self, configs: Sequence[Any]) -> None:
        """Configure each member from the entry at its place."""
        if len(configs) != len(self):
            raise ConfigError(f"A sequence of {len(self)} quantizers was given {len(configs)} configurations.")
        for quantizer, config in zip(self, configs, strict=True):
            quantizer.set_from_cfg(config)

    @property
    def is_enabled(self) -> bool:
        """Whether any member quantizes."""
        return any(q.enabled for q in self)

    enabled = is_enabled

    def enable(self) -> None:
        """Enable every member."""
        for quantizer in self:
            quantizer.enable()

    def disable(self) -> None:
        """Disable every member."""
        for quantizer in self:
            quantizer.disable()

    def reset_amax(self) -> None:
        """Forget the statistics of every member."""
        for quantizer in self:
            quantizer.reset_amax()


def leaf_quantizers(quantizer: TensorQuantizer | SequentialQuantizer) -> Iterator[TensorQuantizer]:
    """Yield the quantizer itself, or the members of a sequence."""
    if isinstance(quantizer, SequentialQuantizer):
        yield from quantizer
    else:
        yield quantizer
