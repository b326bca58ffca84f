"""Fourier transforms: the transformed dimensions are frozen, the others pass."""

from __future__ import annotations

from modelopt.torch.trace.axes.rules.registry import Axes, Call, dims_of, register_rule


@register_rule("aten::_fft_r2c", "aten::_fft_c2c", "aten::_fft_c2r")
def fft(call: Call) -> Axes:
    source = call.args[0]
    axes = list(call.axes(source))
    for d in dims_of(call.arg(1, "dim"), source.dim()):
        call.freeze(axes[d], "a Fourier transform runs over this dimension")
        axes[d] = None
    return axes


@register_rule("aten::stft", "aten::istft")
def stft(call: Call) -> Axes:
    call.freeze_all(call.axes(call.args[0]), "a Fourier transform runs over this dimension")
    return [None] * call.out.dim()
