"""Device functions that turn a tile into scales: read the range of each block or find it, then compute the scale."""

from __future__ import annotations

import triton
import triton.language as tl

from modelopt.torch.kernels.triton_math import block_scale, largest, round_to, smallest, wide_scale


@triton.jit
def outer_scale(global_ptr, TOP: tl.constexpr, OUTER: tl.constexpr, SCALE: tl.constexpr):
    """Return the tensor's scale of a two-level format from its amax; 1 for the others."""
    outer = 1.0
    if SCALE == "two":
        outer = wide_scale(tl.div_rn(tl.load(global_ptr), TOP), OUTER)
    return outer


@triton.jit
def tile_range(x, cell, live, amax_ptr, amin_ptr, ZERO: tl.constexpr, FIND: tl.constexpr):
    """Return (amax, amin) of each block of the tile: found in `x` (float32, zero where nothing is) or read."""
    if FIND:
        if ZERO:
            amax = tl.reduce(largest(x, 0.0), 1, largest, keep_dims=True)
            amin = tl.reduce(smallest(x, 0.0), 1, smallest, keep_dims=True)
        else:
            amax = tl.reduce(tl.abs(x), 1, largest, keep_dims=True)
            amin = amax
    else:
        amax = tl.load(amax_ptr + cell, mask=live, other=1.0)
        amin = amax
        if ZERO:
            amin = tl.load(amin_ptr + cell, mask=live, other=0.0)
    return amax, amin


@triton.jit
def better_of_two(
    x,
    amax,
    outer,
    table_ptr,
    KIND: tl.constexpr,
    MBITS: tl.constexpr,
    MIN_EXP: tl.constexpr,
    E_MAX: tl.constexpr,
    E_MIN: tl.constexpr,
    EMAX: tl.constexpr,
    I_KIND: tl.constexpr,
    I_MBITS: tl.constexpr,
    I_MIN_EXP: tl.constexpr,
    I_MAX: tl.constexpr,
    I_SMALL: tl.constexpr,
):
    """Rule 46: return amax or 1.5 amax, whichever leaves the smaller squared error of the tile's row."""
    scale, _, zero = block_scale(
        amax, amax, outer, table_ptr, E_MAX, E_MIN, EMAX, False, "two", "46", I_KIND, I_MBITS, I_MIN_EXP, I_MAX, I_SMALL
    )
    error = round_to(x, scale, zero, table_ptr, E_MAX, E_MIN, KIND, MBITS, MIN_EXP, False, "two") - x
    wider = amax * 1.5
    scale, _, zero = block_scale(
        wider, amax, outer, table_ptr, E_MAX, E_MIN, EMAX, False, "two", "46", I_KIND, I_MBITS, I_MIN_EXP, I_MAX, I_SMALL
    )
    other = round_to(x, scale, zero, table_ptr, E_MAX, E_MIN, KIND, MBITS, MIN_EXP, False, "two") - x
    worse = tl.sum(other * other, 1, keep_dims=True) >= tl.sum(error * error, 1, keep_dims=True)
    keep = worse | (amax != amax)
    return tl.where(keep, amax, wider)
