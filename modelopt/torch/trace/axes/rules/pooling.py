"""Pooling and resampling: batch and channels pass, the sampled dimensions are frozen."""

from __future__ import annotations

from collections.abc import Sequence

from modelopt.torch.trace.axes.rules.registry import Axes, Call, register_rule

SPACE = "pooled or resampled over this dimension"
_POOLS = [f"aten::{kind}_pool{d}d" for kind in ("avg", "max", "adaptive_avg", "_adaptive_avg", "adaptive_max", "fractional_max")
          for d in (1, 2, 3)] + [f"aten::max_pool{d}d_with_indices" for d in (1, 2, 3)]  # fmt: skip
_SAMPLERS = ["upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
             "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d",
             "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"]  # fmt: skip


@register_rule(*_POOLS, *(f"aten::{name}" for name in _SAMPLERS), "aten::mkldnn_max_pool2d", "aten::mkldnn_max_pool3d")
def pool(call: Call) -> Axes:
    """The last d dimensions are sampled, where d is in the name of the op; a window of one leaves its dimension as it is."""
    source = call.args[0]
    axes = list(call.axes(source))
    space = int(next(c for c in call.name if c in "123"))
    windows = _windows(call, space) if "avg_pool" in call.name or "max_pool" in call.name else [0] * space
    for k, window in enumerate(windows, source.dim() - space):
        if window != 1:
            call.freeze(axes[k], SPACE)
            axes[k] = None
    for other in call.outputs()[1:]:
        call.set(other, axes)
    return axes


def _windows(call: Call, space: int) -> list[int]:
    """The window of each sampled dimension, 0 where a window of one is moved by more than one or padded."""
    if "adaptive" in call.name:
        return [0] * space
    kernel, stride, padding = (_wide(call.arg(i, n, d), space) for i, n, d in _WINDOW)
    stride = stride or kernel
    return [k if s == 1 and not p else 0 for k, s, p in zip(kernel, stride, padding, strict=True)]


_WINDOW = ((1, "kernel_size", 1), (2, "stride", ()), (3, "padding", 0))


def _wide(value: int | Sequence[int], space: int) -> list[int]:
    """One number for each sampled dimension; an empty list stays empty."""
    given = [value] if isinstance(value, int) else list(value)
    return given * space if len(given) == 1 else given


@register_rule("aten::grid_sampler_2d", "aten::grid_sampler_3d", "aten::grid_sampler", "aten::_grid_sampler_2d_cpu_fallback")
def grid_sampler(call: Call) -> Axes:
    source, grid = call.axes(call.args[0]), call.axes(call.args[1])
    call.freeze_all([*source[2:], grid[-1]], SPACE)
    call.unify(source[0], grid[0])
    return [source[0], source[1], *grid[1:-1]]


@register_rule("aten::affine_grid_generator")
def affine_grid(call: Call) -> Axes:
    axes = call.axes(call.args[0])
    call.freeze_all(axes[1:], SPACE)
    return [axes[0]] + [None] * (call.out.dim() - 1)
