"""Block scales in the order in which block-scaled tensor cores read them: tiles of 128 x 4, 512 contiguous bytes each.

    scale of row r and block c  ->  (r // 128 * ceil(C / 4) + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4

R rows and C blocks of a row are padded with zeros to multiples of 128 and 4. torch calls it `SwizzleType.SWIZZLE_32_4_4`.
Source: cuBLAS documentation, "1D block scaling factors layout".
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from modelopt.core.errors import ShapeError

TILE_ROWS, TILE_BLOCKS = 128, 4


def padded(rows: int, blocks: int) -> tuple[int, int]:
    """Return `rows` and `blocks` rounded up to whole tiles."""
    return -(-rows // TILE_ROWS) * TILE_ROWS, -(-blocks // TILE_BLOCKS) * TILE_BLOCKS


def swizzle_scales(scales: Tensor) -> Tensor:
    """Return the scales [R, C] (dtypes of one byte) as one dimension in the order of the tiles, padded with zeros.

    Raises ShapeError for other shapes and dtypes.

    >>> swizzle_scales(torch.ones(100, 3, dtype=torch.uint8)).shape
    torch.Size([512])
    """
    if scales.dim() != 2 or scales.element_size() != 1:
        raise ShapeError(f"Block scales are [rows, blocks] of one byte each, got {list(scales.shape)} {scales.dtype}.")
    rows, blocks = scales.shape
    high, wide = padded(rows, blocks)
    grid = F.pad(scales.view(torch.uint8), (0, wide - blocks, 0, high - rows))
    tiles = grid.reshape(high // TILE_ROWS, 4, 32, wide // TILE_BLOCKS, TILE_BLOCKS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(scales.dtype)


def unswizzle_scales(swizzled: Tensor, rows: int, blocks: int) -> Tensor:
    """Undo `swizzle_scales`: return the scales [rows, blocks]. Raises ShapeError if their number is wrong.

    >>> scales = torch.arange(6, dtype=torch.uint8).reshape(2, 3)
    >>> torch.equal(unswizzle_scales(swizzle_scales(scales), 2, 3), scales)
    True
    """
    high, wide = padded(rows, blocks)
    if swizzled.numel() != high * wide:
        raise ShapeError(f"Scales of {rows} x {blocks} blocks take {high * wide} bytes in tiles, got {swizzled.numel()}.")
    tiles = swizzled.view(torch.uint8).reshape(high // TILE_ROWS, wide // TILE_BLOCKS, 32, 4, TILE_BLOCKS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(high, wide)[:rows, :blocks].contiguous().view(swizzled.dtype)
