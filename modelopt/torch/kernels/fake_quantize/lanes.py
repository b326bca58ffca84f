"""fake_quantize on CPU cores without a compiler: in-place torch ops over pieces that stay in the cores' L2.

The law's operations in the law's order, on buffers that are made once. One step is spelled differently, with the same result:
rounding to step as (q + m) - m with m = 1.5 * 2^23 * step (m is a multiple of the power of two at q, hence exact), the sign of a
zero then taken from x; q is clamped before it is
rounded (rounding is monotone, and both ends lie on the grid). Pieces of 2^16 elements a
core: smaller ones pay for the start of a parallel loop, larger ones leave the L2. What is left is mostly the first touch of the
output's pages, which is why large outputs ask the kernel for huge ones.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt.numerics import Element, Format, Scales
from modelopt.numerics import reference as law
from modelopt.numerics.blocks import canonical

PIECE = 1 << 16  # elements of a piece for each thread: 256 KiB of float32; two buffers and the piece fit the L2
_GROUP = 1 << 20  # elements whose scales are computed together
_LONGEST = 1 << 18  # the longest row whose range is found piece by piece
_LARGE = 1 << 23  # bytes from which an output asks for huge pages


@dataclass(frozen=True)
class Job:
    """A tensor as rows [R, B] that have one scale each, or (`columns`) as rows whose elements have one scale each."""

    x: Tensor
    out: Tensor
    fmt: Format
    columns: bool
    scale: Tensor | None  # [R, 1], or [1, B] for columns; None: found row by row
    zero: Tensor | None
    global_amax: Tensor | None


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
    return len(shape) == 2 and sizes[0] == shape[0] > 1 and sizes[1] == 1 and shape[1] <= _piece_size()


def fake_quantize(x: Tensor, fmt: Format, scales: Scales | None, global_amax: Tensor | None) -> Tensor:
    """Return `x` rounded to `fmt`, contiguous: under `scales`, or with the range of every block read from `x`."""
    shape, sizes = _canonical(x, fmt)
    out = _empty(x)
    columns = _columns(shape, sizes)
    rows = (shape[0], shape[1]) if columns else (math.prod(shape) // sizes[-1], sizes[-1])
    cells = (1, -1) if columns else (-1, 1)
    scale = None if scales is None else scales.effective.reshape(cells)
    zero = None if scales is None or scales.zero is None else scales.zero.reshape(cells)
    flat = x.detach().contiguous()
    if rows[1] > _piece_size() and scale is not None and not columns:  # cut long rows
        cut = math.gcd(rows[1], _piece_size())
        if rows[0] == 1:
            return _cut_one(flat, out, fmt, scale, zero)
        if cut >= 1024:
            scale = scale.repeat_interleave(rows[1] // cut, 0)
            zero = None if zero is None else zero.repeat_interleave(rows[1] // cut, 0)
            rows = (rows[0] * (rows[1] // cut), cut)
    _run(Job(flat.view(rows), out.view(rows), fmt, columns, scale, zero, global_amax))
    return out


def _cut_one(x: Tensor, out: Tensor, fmt: Format, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Round a tensor that has one scale: whole pieces, then the rest."""
    a, b = x.view(-1), out.view(-1)
    piece = _piece_size()
    whole = a.numel() // piece * piece
    _run(Job(a[:whole].view(-1, piece), b[:whole].view(-1, piece), fmt, True, scale, zero, None))
    if whole < a.numel():
        _run(Job(a[whole:].view(1, -1), b[whole:].view(1, -1), fmt, True, scale, zero, None))
    return out


def _piece_size() -> int:
    threads = torch.get_num_threads()
    return PIECE << max(threads - 1, 0).bit_length()


def _empty(x: Tensor) -> Tensor:
    """Return an uninitialized tensor like contiguous `x`; on Linux a large one asks for huge pages, for fewer page faults."""
    out = torch.empty(x.shape, dtype=x.dtype)
    if out.nbytes >= _LARGE and sys.platform == "linux":
        start = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (out.data_ptr() + out.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)  # advice: it may fail
    return out


def _run(job: Job) -> None:
    """Round all rows, a piece at a time; ranges that are not given are found for a group of rows first."""
    rows, width = job.x.shape
    step = min(max(_piece_size() // width, 1), rows)
    group = rows if job.scale is not None else max(_GROUP // width // step, 1) * step
    buffers = [torch.empty(step, width) for _ in range(2 if job.x.dtype == torch.float32 else 3)]
    for first in range(0, rows, group):
        last = min(first + group, rows)
        scale = job.scale
        if scale is None:
            scale = _find_scales(job, first, last, step, buffers)
        elif not job.columns:
            scale = scale[first:last]
        zero = job.zero if job.zero is None or job.columns else job.zero[first:last]
        for row in range(first, last, step):
            end = min(row + step, last)
            here = slice(None) if job.columns else slice(row - first, end - first)
            _round_piece(job, slice(row, end), scale[here], None if zero is None else zero[here], buffers)


def _piece(job: Job, rows: slice, buffers: list[Tensor]) -> Tensor:
    x = job.x[rows]
    return x if x.dtype == torch.float32 else buffers[2][: x.shape[0]].copy_(x)


def _round_piece(job: Job, rows: slice, scale: Tensor, zero: Tensor | None, buffers: list[Tensor]) -> None:
    x, out = _piece(job, rows, buffers), job.out[rows]
    q, spare = buffers[0][: x.shape[0]], buffers[1][: x.shape[0]]
    torch.div(x, scale, out=q)
    e = job.fmt.element
    if zero is not None:
        q.round_().add_(zero).clamp_(e.min, e.max).sub_(zero)
    elif e.kind == "int":
        q.round_().clamp_(e.min, e.max).add_(0.0)
    else:
        _round_float(q, spare, x, e)
    if out.dtype == torch.float32:
        torch.mul(q, scale, out=out)
    else:
        out.copy_(q.mul_(scale))


def _find_scales(job: Job, first: int, last: int, step: int, buffers: list[Tensor]) -> Tensor:
    """Return the scales of some rows, [R, 1]; magnitudes compare as their bits do, and NaN is above all."""
    amax = torch.empty(last - first, 1, dtype=torch.int32)
    for row in range(first, last, step):
        x = _piece(job, slice(row, min(row + step, last)), buffers)
        bits = buffers[0][: x.shape[0]].view(torch.int32)
        torch.bitwise_and(x.view(torch.int32), 0x7FFFFFFF, out=bits)
        torch.amax(bits, 1, keepdim=True, out=amax[row - first : row - first + x.shape[0]])
    return law.compute_scales(amax.view(torch.float32), job.fmt, job.global_amax).effective


def _round_float(q: Tensor, spare: Tensor, x: Tensor, e: Element) -> None:
    q.clamp_(e.min, e.max)
    torch.bitwise_and(q.view(torch.int32), 0x7F800000, out=spare.view(torch.int32))
    spare.clamp_min_(2.0 ** (1 - e.bias))
    magic = 1.5 * 2.0 ** (23 - e.mantissa_bits)
    q.add_(spare, alpha=magic).sub_(spare, alpha=magic).copysign_(x)
