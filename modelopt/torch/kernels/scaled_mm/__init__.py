"""Block-scaled products of torch for GPUs that multiply FP4 and MX codes (compute capability 10 and later).

    y = q(x) W^T + b,  q(x) and W both NVFP4, both MXFP4 or both MXFP8, by `torch.nn.functional.scaled_mm`

`why_not` says why it does not serve; `quantized_linear` then has other paths. The layout of the scales is in `layout.py`; the
block scales of a weight are brought into it once and kept as long as the weight lives. Written from the documentation and
tested against an emulation that reads the same operands; it was never run on such a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from modelopt.core.errors import FormatError
from modelopt.numerics import Format, parse
from modelopt.torch.kernels.quantize import quantize
from modelopt.torch.kernels.scaled_mm.layout import swizzle_scales, unswizzle_scales
from modelopt.torch.kernels.scaled_mm.operands import Operand, family, operand

__all__ = ["block_scaled_linear", "swizzle_scales", "unswizzle_scales", "why_not"]

_tiles = WeakTensorKeyDictionary()


def why_not(x: Tensor, weight: Sequence[Tensor], fmt: Format, n: int, input_format: str) -> str | None:
    """Return why torch's block-scaled product does not serve q(x) W^T for x [..., K] and the packed W [n, K], or None."""
    if not input_format:
        return "the input is not quantized"
    if x.dtype != torch.bfloat16:
        return f"the input is {x.dtype}; the product takes bfloat16"
    if x.dim() == 0 or x.numel() == 0 or n == 0:
        return "the input is empty"
    k = x.shape[-1]
    kinds = family(parse(input_format), x.numel() // k, k), family(fmt, n, k)
    if kinds[0] is None or kinds[0] != kinds[1]:
        return f"{input_format} times {fmt} is none of NVFP4, MXFP4 and MXFP8 on both sides"
    if k % 32 or n % 16:
        return f"the weight is {n} x {k}; the product takes multiples of 16 and 32"
    if any(not p.is_contiguous() or p.device != x.device for p in weight):
        return "the packed weight is not contiguous on the input's device"
    return _unfit(x.device, kinds[0])


@functools.cache
def _unfit(device: torch.device, kind: str) -> str | None:
    if device.type != "cuda":
        return f"the tensor is on {device}"
    major = torch.cuda.get_device_capability(device)[0]
    if major < 10:
        return f"compute capability {major} has no block-scaled tensor cores; 10 and later have"
    if kind == "MXFP4" and major != 10:
        return f"torch multiplies MXFP4 on compute capability 10 only, not {major}"
    return None


def block_scaled_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    fmt: Format,
    n: int,
    bias: Tensor | None,
    input_format: str,
    input_amax: Tensor | None,
) -> Tensor:
    """Return q(x) W^T + bias, [..., n] in the dtype of `x` [..., K]; for a product to which `why_not` has no objection."""
    k = x.shape[-1]
    flat = x.reshape(-1, k)
    kind = family(fmt, n, k)
    if kind is None:
        raise FormatError(f"{fmt} is none of NVFP4, MXFP4 and MXFP8; `why_not` says so before.")
    left = operand(quantize(flat, input_format, input_amax), kind)
    y = product(left, operand(weight, kind, tiles_of(weight[1])), bias, x.dtype)
    return y.reshape(*x.shape[:-1], n)


def tiles_of(scales: Tensor) -> Tensor:
    """Return the block scales of a weight in tiles: computed once, and again where the scales were changed in place."""
    version = 0 if scales.is_inference() else scales._version
    found = _tiles.get(scales)
    if found is None or found[0] != version:
        found = (version, swizzle_scales(scales))
        _tiles[scales] = found
    return found[1]


def product(x: Operand, w: Operand, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return x W^T + bias, [rows of x, rows of w] in `dtype`, by torch."""
    inside = bias if x.kind != "MXFP4" else None  # torch passes MXFP4 to a kernel without a bias
    y = F.scaled_mm(
        x.values,
        w.values.t(),
        list(x.scales),
        x.recipes,
        list(w.scales),
        w.recipes,
        x.swizzles,
        w.swizzles,
        None if inside is None else inside.to(dtype),
        dtype,
    )
    return y if bias is None or inside is not None else y + bias.to(dtype)
