"""amax in one read: a program reduces whole blocks, or pieces of long ones that are joined by atomic maxima of their bits."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from modelopt.numerics import Format
from modelopt.numerics import reference as law
from modelopt.numerics.blocks import Block
from modelopt.torch.kernels import triton_plan as planning
from modelopt.torch.kernels.triton_launch import Launch
from modelopt.torch.kernels.triton_math import inside, largest, places, smallest, tile
from modelopt.torch.kernels.triton_ranges import piece_largest, piece_smallest

_LONG = 16384  # elements of a long block that one program reduces


def why_not(x: Tensor, fmt: Format) -> str | None:
    """Return why this kernel does not serve `x`, or None."""
    return planning.unlike(x, fmt)


@triton.jit(do_not_specialize=["n", "width", "block", "parts", "blocks", "inner", "block_0", "block_1", "grid_1"])
def _amax(
    x_ptr,
    out_ptr,
    low_ptr,
    n,
    width,
    block,
    parts,
    blocks,
    inner,
    block_0,
    block_1,
    grid_1,
    SHARED: tl.constexpr,
    RANGE: tl.constexpr,
    FORM: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    V: tl.constexpr,
    STEPS: tl.constexpr,
    MULTIPLE: tl.constexpr,
):
    width *= MULTIPLE
    block *= MULTIPLE
    w = places(C, V)
    start, first, column, live, cell = tile(
        n, width, block, parts, blocks, inner, block_0, block_1, grid_1, 0, STEPS, G, C * V, FORM
    )
    x = tl.load(x_ptr + (start + w), mask=inside(w, first, column, live, width, block, FORM), other=0.0).to(tl.float32)
    if RANGE:
        high = piece_largest(largest(x, 0.0))
        low = piece_smallest(smallest(x, 0.0))
    else:
        high = piece_largest(tl.abs(x))
        low = high
    if FORM == "tiles":
        high = tl.reduce(tl.reduce(tl.reduce(high, 1, largest), 1, largest), 0, largest)
        low = tl.reduce(tl.reduce(tl.reduce(low, 1, smallest), 1, smallest), 0, smallest)
        live = True
    if SHARED:  # as integers, magnitudes compare as they do as floats, and NaN is above all
        tl.atomic_max(out_ptr + cell, high.to(tl.int32, bitcast=True), mask=live, sem="relaxed")
        if RANGE:
            bits = (low.to(tl.int32, bitcast=True)) & 0x7FFFFFFF
            tl.atomic_max(low_ptr + cell, bits, mask=live, sem="relaxed")
    else:
        tl.store(out_ptr + cell, high.to(tl.int32, bitcast=True), mask=live)
        if RANGE:
            tl.store(low_ptr + cell, low.to(tl.int32, bitcast=True) & 0x7FFFFFFF, mask=live)


@triton.jit(do_not_specialize=["rows", "width", "parts"])
def _amax_columns(
    x_ptr,
    out_ptr,
    low_ptr,
    rows,
    width,
    parts,
    STEPS: tl.constexpr,
    RANGE: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    MULTIPLE: tl.constexpr,
):
    width *= MULTIPLE
    pid = tl.program_id(0).to(tl.int64)
    column = (pid % parts) * W + tl.arange(0, W)[None, :]
    row = (pid // parts) * STEPS * G + tl.arange(0, G)[:, None]
    high = tl.zeros([G, W], tl.float32)
    low = tl.zeros([G, W], tl.float32)
    for step in range(STEPS):
        here = (row + step * G < rows) & (column < width)
        x = tl.load(x_ptr + (row + step * G) * width + column, mask=here, other=0.0).to(tl.float32)
        if RANGE:
            high = largest(high, x)
            low = smallest(low, x)
        else:
            high = largest(high, tl.abs(x))
    bits = tl.reduce(high, 0, largest, keep_dims=True).to(tl.int32, bitcast=True)
    tl.atomic_max(out_ptr + column, bits, mask=column < width, sem="relaxed")
    if RANGE:
        bits = tl.reduce(low, 0, smallest, keep_dims=True).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        tl.atomic_max(low_ptr + column, bits, mask=column < width, sem="relaxed")


def amax(x: Tensor, fmt: Format) -> Tensor:
    """Return max |x| of each block, float32, in the shape `fmt.grid(x.shape)`. Raises ShapeError, FormatError."""
    law.check(x, fmt)
    return _extremes(x, fmt.block, fmt, False)[0]


def block_range(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Return (min, max) of each block with zero included, float32, in the shape `fmt.grid(x.shape)`."""
    high, low = _extremes(x, fmt.block, fmt, True)
    return low, high


def _extremes(x: Tensor, block: Block, fmt: Format, both: bool) -> tuple[Tensor, Tensor]:
    """Return (max with zero or max |x|, min with zero) of each block; the second only if `both`."""
    x = x.contiguous()
    shape, sizes = tuple(x.shape), block.sizes(x.shape) if x.dim() else ()
    plan = planning.layout(shape, sizes, whole=True)
    if isinstance(plan, str):
        low, high = law.block_range(x, fmt) if both else (x, law.block_amax(x, fmt))
        return high, low
    if not plan.whole_blocks and plan.form != "columns":
        longer = planning.layout(shape, sizes, tile=_LONG)
        plan = plan if isinstance(longer, str) else longer
    grid = fmt.grid(shape)
    shared = not plan.whole_blocks
    high = (torch.zeros if shared else torch.empty)(grid, dtype=torch.int32, device=x.device)
    low = torch.zeros_like(high) if both else high
    if plan.form == "columns":
        w, g = min(triton.next_power_of_2(plan.width), 512), 16
        steps, parts = 16 if plan.count >= 4096 else 1, -(-plan.width // w)
        programs = (parts * -(-plan.count // (g * steps)),)
        _amax_columns[programs](x, high, low, plan.count, plan.width // plan.unit, parts, steps, both, g, w, plan.unit)
    else:
        _prepared(plan, x.dtype, x.device, shared, both)(x, high, low)
    return high.view(torch.float32), -low.view(torch.float32) if both else x


@functools.lru_cache(maxsize=4096)
def _prepared(plan: planning.Layout, dtype: torch.dtype, device: torch.device, shared: bool, both: bool) -> Launch:
    return Launch(_amax, plan.programs[0], plan.arguments, plan.constants | {"SHARED": shared, "RANGE": both})


def ranges(
    x: Tensor, fmt: Format, amax_given: Tensor | None, global_amax: Tensor | None, amin: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, bool] | None:
    """Return (amax, global amax, amin, whether amax is the effective scale) for a kernel; None if the law must find them.

    amax None: the kernel finds the range of its blocks itself.
    """
    given = law.given_range(x.shape, fmt, amax_given, global_amax, amin)
    amax_, global_amax, amin = (t if t is None or t.device == x.device else t.to(x.device) for t in given)
    plan = planning.layout_of(x, fmt, whole=True)
    if isinstance(plan, str):
        return None
    if amax_ is None:
        amin = None
        if fmt.rule == "46" and (global_amax is None or not plan.whole_blocks):
            return None
        if fmt.needs_global and global_amax is None:
            global_amax = amax(x, fmt.with_(block=Block(("...",)))).reshape(())
        if not plan.whole_blocks or (fmt.is_two_level and not fmt.needs_global):
            if fmt.zero is not None:
                amin, amax_ = block_range(x, fmt)
            else:
                amax_ = amax(x, fmt)
    elif fmt.needs_global and global_amax is None:
        global_amax = amax_.amax()
    if amax_ is not None:
        amax_ = amax_.contiguous()
        if fmt.zero is not None:
            amin = torch.zeros_like(amax_) if amin is None else amin.contiguous()
    if fmt.is_two_level and not fmt.needs_global and amax_ is not None:
        return law.compute_scales(amax_, fmt, global_amax).effective.contiguous(), None, None, True
    return amax_, global_amax, amin, False
