"""What torch's block-scaled product takes for one quantized matrix: codes, scales in tiles, and the names of both layouts.

NVFP4   float4_e2m1fn_x2 [rows, K / 2], e4m3 scales of 16 values, one float32 scale      (K = columns, two codes a byte,
MXFP4   float4_e2m1fn_x2 [rows, K / 2], e8m0 scales of 32 values                          the first in the low bits)
MXFP8   float8_e4m3fn [rows, K], e8m0 scales of 32 values
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from modelopt.numerics import Format
from modelopt.torch.kernels.scaled_mm.layout import swizzle_scales

# element, scale of a block, values of a block, whether the scales have a scale
_FAMILIES = {("e2m1", "e4m3", 16, True): "NVFP4", ("e2m1", "e8m0", 32, False): "MXFP4", ("e4m3", "e8m0", 32, False): "MXFP8"}


@functools.lru_cache(maxsize=1024)
def family(fmt: Format, rows: int, columns: int) -> str | None:
    """Return "NVFP4", "MXFP4" or "MXFP8" for a format that the product takes for a matrix of this size, or None."""
    two = isinstance(fmt.scale, Format)
    inner = fmt.scale if isinstance(fmt.scale, Format) else None
    if fmt.zero is not None or (inner is not None and not (inner.block.whole and str(inner.scale) == "f32")):
        return None
    high, wide = fmt.block.sizes((rows, columns))
    scale = inner.element.name if inner is not None else str(fmt.scale)
    return _FAMILIES.get((fmt.element.name, scale, wide, two)) if high == 1 else None


@dataclass(frozen=True)
class Operand:
    """One side of the product: `values` [rows, bytes], `scales` level by level, block scales in tiles."""

    kind: str
    values: Tensor
    scales: tuple[Tensor, ...]

    @property
    def recipes(self) -> list[F.ScalingType]:
        """How each level of scales applies."""
        block = F.ScalingType.BlockWise1x16 if self.kind == "NVFP4" else F.ScalingType.BlockWise1x32
        return [block, F.ScalingType.TensorWise][: len(self.scales)]

    @property
    def swizzles(self) -> list[F.SwizzleType]:
        """How each level of scales lies in memory."""
        return [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE][: len(self.scales)]


def operand(parts: Sequence[Tensor], kind: str, tiles: Tensor | None = None) -> Operand:
    """Return the parts of `modelopt::quantize` for a matrix as the product takes them; `tiles`: block scales already in tiles."""
    codes, block = parts[0], parts[1]
    values = codes.view(torch.float8_e4m3fn if kind == "MXFP8" else torch.float4_e2m1fn_x2)
    tiles = swizzle_scales(block) if tiles is None else tiles
    if kind == "NVFP4":
        return Operand(kind, values, (tiles, parts[2].reshape(())))
    return Operand(kind, values, (tiles.view(torch.float8_e8m0fnu),))
