"""Blocks: which elements of a tensor share one scale.

A block is written as trailing dimensions, in brackets:

    [128]        128 elements along the last dimension          [128,128]   a tile of the last two dimensions
    [-1]         a whole row of the last dimension (a token)    [...]       the whole tensor
    [1,...]      one slice of the first dimension (a channel)   [-1,1,...]  one slice of the second dimension

`-1` is a whole dimension, `...` stands for as many whole dimensions as there are, and leading dimensions that are not
named are 1. A dimension need not be a multiple of its block: the last block of it is ragged, and holds what is left.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt.core.errors import FormatError, ShapeError

REST = "..."


@dataclass(frozen=True)
class Block:
    """A block shape: integers (-1: the whole dimension) and at most one `"..."`."""

    dims: tuple[int | str, ...]

    def __post_init__(self) -> None:
        if not self.dims or self.dims.count(REST) > 1:
            raise FormatError(f"A block needs at least one dimension and at most one `...`, got {list(self.dims)}.")
        for d in self.dims:
            if d != REST and (not isinstance(d, int) or isinstance(d, bool) or d == 0 or d < -1 or d > 2**31 - 1):
                raise FormatError(f"A block dimension is -1, `...` or an integer from 1 to 2^31-1, got {d!r}.")

    @property
    def whole(self) -> bool:
        """Whether the block is the whole tensor."""
        return self.dims == (REST,)

    def sizes(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the block's size in each dimension of a tensor of `shape` (never larger than the dimension, never 0).

        Raises ShapeError if the tensor has fewer dimensions than the block names.
        """
        rank = len(shape)
        named: list[int | str] = list(self.dims)
        if REST in named:
            at = named.index(REST)
            fill = rank - (len(named) - 1)
            named[at : at + 1] = [-1 for _ in range(fill)]
        else:
            named[:0] = [1] * (rank - len(named))
        if len(named) != rank:
            raise ShapeError(f"Block {self} names {len(named)} dimensions, but the tensor has shape {tuple(shape)}.")
        return tuple(max(n, 1) if b == -1 else max(min(int(b), n), 1) for b, n in zip(named, shape, strict=True))

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the number of blocks in each dimension: the shape of the scales. `[...]` gives a scalar's shape."""
        if self.whole:
            return ()
        return tuple(-(-n // b) for n, b in zip(shape, self.sizes(shape), strict=True))

    def ragged(self, shape: Sequence[int]) -> bool:
        """Whether some dimension is not a multiple of its block."""
        return any(n % b for n, b in zip(shape, self.sizes(shape), strict=True))

    def __str__(self) -> str:
        return "[" + ",".join(str(d) for d in self.dims) + "]"


@functools.lru_cache(maxsize=4096)
def canonical(shape: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Merge neighbouring dimensions that a block treats alike, so that kernels see as few as possible.

    Two neighbours merge if the block is 1 in both, or whole in both (a dimension of size 1 is both). The order of elements
    and of blocks does not change.

    >>> canonical((2, 3, 64), (1, 1, 64))
    ((6, 64), (1, 64))
    """
    out_shape: list[int] = []
    out_sizes: list[int] = []
    for n, b in zip(shape, sizes, strict=True):
        if n == 1 and out_shape:
            continue
        if out_shape and out_shape[-1] == 1:
            out_shape[-1], out_sizes[-1] = n, b
        elif out_shape and b == 1 and out_sizes[-1] == 1:
            out_shape[-1] *= n
        elif out_shape and b == n and out_sizes[-1] == out_shape[-1]:
            out_shape[-1] *= n
            out_sizes[-1] *= n
        else:
            out_shape.append(n)
            out_sizes.append(b)
    return (tuple(out_shape) or (1,)), (tuple(out_sizes) or (1,))


def to_blocks(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """View `x` of shape [n0, n1, ...] as [g0, b0, g1, b1, ...]; ragged ends are padded with zeros (a copy)."""
    shape = x.shape
    padding = [(-n) % b for n, b in zip(shape, sizes, strict=True)]
    if any(padding):
        x = torch.nn.functional.pad(x, [p for pad in reversed(padding) for p in (0, pad)])
    split = [s for n, p, b in zip(shape, padding, sizes, strict=True) for s in ((n + p) // b, b)]
    return x.reshape(split)


def from_blocks(blocks: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo `to_blocks`: [g0, b0, g1, b1, ...] to `shape`, dropping the padding."""
    full = [blocks.shape[2 * i] * blocks.shape[2 * i + 1] for i in range(len(shape))]
    x = blocks.reshape(full)
    if list(full) != list(shape):
        x = x[tuple(slice(0, int(n)) for n in shape)]
    return x


def per_block(values: Tensor, grid: Sequence[int]) -> Tensor:
    """View one value per block (any shape with the right count) so that it broadcasts over `to_blocks`: [g0, 1, g1, 1, ...].

    Raises ShapeError if the count is wrong.
    """
    if values.numel() != math.prod(grid):
        raise ShapeError(
            f"Expected one value for each of {math.prod(grid)} blocks (grid {tuple(grid)}), got {tuple(values.shape)}."
        )
    return values.reshape([s for g in grid for s in (g, 1)])


def spread(values: Tensor, block: Block, shape: Sequence[int]) -> Tensor:
    """Return one value per block as a tensor that broadcasts over a tensor of `shape` (made for small ones, such as scales)."""
    if block.whole:
        return values.reshape(())
    sizes = block.sizes(shape)
    column = per_block(values, block.grid(shape))
    return from_blocks(column.expand([s for g, b in zip(column.shape[::2], sizes, strict=True) for s in (g, b)]), shape)
