"""What a block-scaled product computes, in float32 from the same operands: the scales are read back from their tiles.

    y[m, n] = t_x t_w sum_k (x_code[m, k] s_x[m, k // B]) (w_code[n, k] s_w[n, k // B])

It checks what torch checks (numbers of scales, dtypes) and is what the call to torch is tested with where no such unit exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modelopt.core.errors import ShapeError
from modelopt.numerics.elements import element
from modelopt.numerics.packing import unpack_bits
from modelopt.numerics.reference import e8m0_values
from modelopt.torch.kernels.scaled_mm.layout import unswizzle_scales
from modelopt.torch.kernels.scaled_mm.operands import Operand


def values(side: Operand) -> Tensor:
    """Return the float32 matrix [rows, K] that an operand stands for, the scale of the whole tensor left out."""
    raw = side.values.view(torch.uint8)
    rows, size = raw.shape[0], 16 if side.kind == "NVFP4" else 32
    columns = raw.shape[1] * (1 if side.kind == "MXFP8" else 2)
    if side.kind == "MXFP8":
        codes = side.values.float()
    else:
        codes = element("e2m1").decode(unpack_bits(raw, 4, columns))
    stored = unswizzle_scales(side.scales[0], rows, -(-columns // size))
    scales = stored.float() if side.kind == "NVFP4" else e8m0_values(stored.view(torch.uint8))
    return codes * scales.repeat_interleave(size, 1)[:, :columns]


def product(x: Operand, w: Operand, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return x W^T + bias, [rows of x, rows of w] in `dtype`. Raises ShapeError where the operands do not fit."""
    if x.kind != w.kind or x.values.shape[1] != w.values.shape[1]:
        raise ShapeError(f"{x.kind} {list(x.values.shape)} and {w.kind} {list(w.values.shape)} do not multiply.")
    y = values(x) @ values(w).t()
    if len(x.scales) == 2:
        y = y * (x.scales[1] * w.scales[1])
    return (y if bias is None else y + bias.float()).to(dtype)
