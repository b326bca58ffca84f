"""`modelopt::quantize`: a tensor as packed codes and scales.

Schema: quantize(Tensor x, str format, Tensor? amax, Tensor? global_amax, Tensor? amin) -> Tensor[]

Returns [codes, scales of level 1, scales of level 2 if any, zero points if any] in the layout of
`modelopt.numerics.reference.Quantized`. Not differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modelopt.numerics import Format, Quantized, parse
from modelopt.numerics.packing import packed_size
from modelopt.torch.kernels.choice import fast_kernel
from modelopt.torch.kernels.library import define, notation
from modelopt.torch.kernels.quantize import reference


def quantize(
    x: Tensor,
    fmt: Format | str,
    amax: Tensor | None = None,
    global_amax: Tensor | None = None,
    amin: Tensor | None = None,
) -> list[Tensor]:
    """Return the parts of `x` in `fmt`: packed uint8 codes, then the stored scales, then zero points if the format has them."""
    return torch.ops.modelopt.quantize(x, notation(fmt), amax, global_amax, amin)


def quantized(
    x: Tensor,
    fmt: Format | str,
    amax: Tensor | None = None,
    global_amax: Tensor | None = None,
    amin: Tensor | None = None,
) -> Quantized:
    """Return `quantize(...)` as one value."""
    parts = quantize(x, fmt, amax, global_amax, amin)
    return Quantized.from_parts(parts, parse(notation(fmt)), x.shape, x.dtype)


def _run(
    x: Tensor,
    format: str,
    amax: Tensor | None = None,
    global_amax: Tensor | None = None,
    amin: Tensor | None = None,
) -> list[Tensor]:
    fmt = parse(format)
    kernel = fast_kernel("quantize", x, fmt)
    return (kernel or reference).quantize(x, fmt, amax, global_amax, amin)


def _fake(
    x: Tensor,
    format: str,
    amax: Tensor | None = None,
    global_amax: Tensor | None = None,
    amin: Tensor | None = None,
) -> list[Tensor]:
    fmt = parse(format)
    shape = list(x.shape) or [1]
    parts = [x.new_empty([*shape[:-1], packed_size(shape[-1], fmt.element.bits)], dtype=torch.uint8)]
    grid = fmt.grid(x.shape)
    for level in fmt.levels:
        parts.append(x.new_empty(grid, dtype=level.stored_scale.dtype))
        grid = level.scale.grid(grid) if isinstance(level.scale, Format) else grid
    if fmt.zero is not None:
        parts.append(x.new_empty(fmt.grid(x.shape), dtype=fmt.element.dtype))
    return parts


define("quantize(Tensor x, str format, Tensor? amax=None, Tensor? global_amax=None, Tensor? amin=None) -> Tensor[]", _run, _fake)
