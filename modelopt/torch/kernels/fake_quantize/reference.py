"""fake_quantize by the law (`modelopt.numerics.reference`), in chunks that fit the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from modelopt.numerics import Format
from modelopt.numerics import reference as law
from modelopt.torch.kernels import chunks
from modelopt.torch.kernels.fake_quantize import lanes


def fake_quantize(
    x: Tensor, fmt: Format, amax: Tensor | None = None, global_amax: Tensor | None = None, amin: Tensor | None = None
) -> Tensor:
    """Return `x` rounded to `fmt`, contiguous. Raises ShapeError, FormatError."""
    law.check(x, fmt)
    if x.numel() == 0:
        return x.new_empty(x.shape)
    given = law.given_range(x.shape, fmt, amax, global_amax, amin)
    if given[0] is None and lanes.why_not(x, fmt, ranged=False) is None and (given[1] is not None or not fmt.needs_global):
        return lanes.fake_quantize(x, fmt, None, given[1])
    if lanes.why_not(x, fmt, ranged=True) is None:
        return lanes.fake_quantize(x, fmt, chunks.find_scales(x, fmt, amax, global_amax, amin), None)
    return chunks.chunked_fake_quantize(x, fmt, chunks.find_scales(x, fmt, amax, global_amax, amin))


def clipped_gradient(
    grad: Tensor, x: Tensor, fmt: Format, amax: Tensor | None, global_amax: Tensor | None, amin: Tensor | None
) -> Tensor:
    """Return `grad` where x lies within the range that the scales can represent, and 0 elsewhere."""
    if x.numel() == 0:
        return grad.new_empty(grad.shape)
    scales = chunks.find_scales(x, fmt, amax, global_amax, amin)
    p = chunks.plan(x, fmt)
    scale = scales.effective.reshape(p.grid)
    zero = torch.zeros_like(scale) if scales.zero is None else scales.zero.reshape(p.grid)
    low, high = (fmt.element.min - zero) * scale, (fmt.element.max - zero) * scale
    out = torch.empty(p.x.shape, dtype=grad.dtype, device=grad.device)
    flat = grad.reshape(p.x.shape)
    for rows, cells in p.slices():
        inside = chunks.within(p, rows, low[cells], high[cells])
        out[rows] = torch.where(inside, flat[rows], 0)
    return out.reshape(grad.shape)
