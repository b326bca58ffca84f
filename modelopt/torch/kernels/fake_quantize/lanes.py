"""fake_quantize on CPU cores without a compiler: in-place torch ops (`lane_math`) over pieces that stay in the cores' L2.

A piece is as many elements for every thread as leave room for three arrays in its L2: x, the result, in whose memory the
arithmetic is done, and one more. A large tensor is cut into as many strips as there are threads, and a piece has rows of every
strip, so that no two threads touch the same new page of the result for the first time: both would clear it. Large results ask
the kernel for huge pages, for fewer faults. What is not contiguous is copied to where the result will be, and rounded there.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
import os
import sys
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from modelopt.numerics import Format, Scales
from modelopt.numerics.blocks import canonical
from modelopt.torch.kernels.fake_quantize.lane_math import (
    MAGIC,
    block_amax,
    find_scales,
    fold,
    outer_scale,
    round_floats,
    round_integers,
)

_LONGEST = 1 << 18  # the longest row whose range is found in one reduction
_LARGE = 1 << 23  # bytes from which a result asks for huge pages and is cut into strips
_MOST = 1 << 21  # elements of a piece, however many threads there are: 8 MiB of float32
_FEW = 1 << 12  # scales up to which the law's own arithmetic is not slower
_SIZE_OF_L2 = "/sys/devices/system/cpu/cpu0/cache/index2/size"


@functools.cache
def piece_size() -> int:
    """Return the elements of a piece for each thread: 2^17 (512 KiB of float32) where the L2 has 2 MiB, else 2^16."""
    if sys.platform == "linux" and os.path.exists(_SIZE_OF_L2):
        with open(_SIZE_OF_L2) as file:
            size = file.read().strip()  # "2048K"
        if size.endswith("K") and size[:-1].isdigit() and int(size[:-1]) >= 2048:
            return 1 << 17
    return 1 << 16


class Parts(NamedTuple):
    """A tensor as rows [R, B], or [strips, R, B], with a scale for each row or for each column."""

    x: Tensor
    out: Tensor  # the shape of `x`, which it may be
    scale: Tensor | None  # [R, 1], [1, B] or [1, 1], likewise with strips; None: found row by row
    zero: Tensor | None  # like `scale`

    def rows(self, first: int, strips: int, size: int) -> Parts:
        """Return some rows of [R, B] as [strips, size, B]."""

        def cut(t: Tensor) -> Tensor:
            if t.shape[0] in (1, size):
                return t[None]
            return t[first : first + strips * size].unflatten(0, (strips, size))

        scale, zero = (None if t is None else cut(t) for t in (self.scale, self.zero))
        return Parts(cut(self.x), cut(self.out), scale, zero)

    def columns(self, here: slice) -> Parts:
        """Return some columns of [R, B]."""
        scale, zero = (t if t is None or t.shape[1] == 1 else t[:, here] for t in (self.scale, self.zero))
        return Parts(self.x[:, here], self.out[:, here], scale, zero)


def why_not(x: Tensor, fmt: Format, ranged: bool) -> str | None:
    """Return why `fake_quantize` here does not serve `x`, or None; `ranged`: the blocks' ranges are given."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"a {x.dtype} tensor on {x.device}"
    if x.numel() == 0:
        return "the tensor is empty"
    if fmt.element.kind == "codebook":
        return "a codebook, whose border search the law does in fewer passes"
    shape, sizes = _canonical(x, fmt)
    if _columns(shape, sizes):
        return None if ranged else "a scale per column whose range is not given"
    if shape[-1] % sizes[-1] or any(b != 1 for b in sizes[:-1]):
        return f"blocks of {sizes} in a tensor of {shape}"
    if not ranged and (sizes[-1] > _LONGEST or fmt.rule == "46" or fmt.zero is not None):
        return "a range that takes the whole tensor"
    if not ranged and fmt.is_two_level:
        return None if fmt.needs_global else "a scale with blocks of its own"
    return None


def _canonical(x: Tensor, fmt: Format) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return canonical(tuple(x.shape), fmt.block.sizes(x.shape)) if x.dim() else ((1,), (1,))


def _columns(shape: tuple[int, ...], sizes: tuple[int, ...]) -> bool:
    return len(shape) == 2 and sizes[0] == shape[0] > 1 and sizes[1] == 1


def fake_quantize(x: Tensor, fmt: Format, scales: Scales | None, global_amax: Tensor | None) -> Tensor:
    """Return `x` rounded to `fmt`, contiguous: under `scales`, or with the range of every block read from `x`."""
    shape, sizes = _canonical(x, fmt)
    out = new_output(x)
    flat = x.detach() if x.is_contiguous() else out.copy_(x.detach())
    scale, zero = (None, None) if scales is None else (scales.effective, scales.zero)
    width, cells = sizes[-1], (-1, 1)
    if _columns(shape, sizes):
        width, cells = shape[1], (1, -1)
    elif scale is not None and scale.numel() == 1:
        width = 1  # one scale for all: the tensor may be cut anywhere
    scale, zero = (None if t is None else t.reshape(cells) for t in (scale, zero))
    whole = Parts(flat.view(-1, width), out.view(-1, width), scale, zero)
    if scale is None or width <= piece_size():
        _strips(whole, fmt, global_amax)
    else:
        for start in range(0, width, piece_size()):
            _strips(whole.columns(slice(start, start + piece_size())), fmt, global_amax)
    return out


def new_output(x: Tensor) -> Tensor:
    """Return an uninitialized contiguous tensor like `x`; on Linux a large one asks for huge pages, for fewer page faults."""
    out = torch.empty(x.shape, dtype=x.dtype)
    if out.nbytes >= _LARGE and sys.platform == "linux":
        start = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (out.data_ptr() + out.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)  # advice: it may fail
    return out


def _strips(whole: Parts, fmt: Format, global_amax: Tensor | None) -> None:
    """Round [R, B]: a strip of rows for each thread, then the few rows that are left over."""
    strips = torch.get_num_threads() if whole.out.nbytes >= _LARGE else 1
    rows = whole.x.shape[0]
    size = rows // strips
    if size:
        _run(whole.rows(0, strips, size), fmt, global_amax)
    if rows > strips * size:
        _run(whole.rows(strips * size, 1, rows - strips * size), fmt, global_amax)


def _run(parts: Parts, fmt: Format, global_amax: Tensor | None) -> None:
    """Round [S, R, B], a piece at a time."""
    strips, rows, width = parts.x.shape
    e, scale = fmt.element, parts.scale
    piece = min(piece_size() * torch.get_num_threads(), _MOST)
    step = min(max(piece // (strips * width), 1), rows)
    spare = parts.x.new_empty((strips, step, width), dtype=torch.float32)
    spare = spare.fill_(MAGIC) if e.kind == "int" else spare
    wide = None if parts.x.dtype == torch.float32 else torch.empty_like(spare)
    bits = spare if scale is not None or e.kind != "int" else torch.empty_like(spare)
    bits = bits.view(torch.int32)
    outer = outer_scale(fmt, global_amax) if scale is None and strips * rows > _FEW else None
    folding = e.kind == "float" and rows > step
    folded = fold(scale, e) if folding and scale is not None else None
    levels = (_cut(t, step) for t in (scale, parts.zero, folded))
    for x, out, scale, zero, small in zip(parts.x.split(step, 1), parts.out.split(step, 1), *levels, strict=False):
        if x.shape[1] < spare.shape[1]:  # the last piece
            spare, bits, wide = spare[:, : x.shape[1]], bits[:, : x.shape[1]], None if wide is None else wide[:, : x.shape[1]]
        q = out if wide is None else wide
        source = x if wide is None else wide.copy_(x)
        if scale is None:
            scale = find_scales(block_amax(source, bits), fmt, outer, global_amax)
            small = fold(scale, e) if folding else None
        if e.kind == "int":
            round_integers(source, q, spare, scale, zero, e)
        else:
            round_floats(torch.div(source, scale, out=q), spare, scale, small, e)
        if wide is not None:
            out.copy_(wide)


def _cut(levels: Tensor | None, step: int) -> Iterable[Tensor | None]:
    """Yield the scales of each piece."""
    return itertools.repeat(levels) if levels is None or levels.shape[1] == 1 else levels.split(step, 1)
