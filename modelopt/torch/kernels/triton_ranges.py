"""Device functions that turn a tile into scales: read the range of each block or find it, then compute the scale."""

from __future__ import annotations

import triton
import triton.language as tl

from modelopt.torch.kernels.triton_math import block_scale, cast, largest, quotient_for, smallest, wide_scale, with_sign


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
            amax = piece_largest(largest(x, 0.0))
            amin = piece_smallest(smallest(x, 0.0))
        else:
            amax = piece_largest(tl.abs(x))
            amin = amax
    else:
        amax = tl.load(amax_ptr + cell, mask=live, other=1.0)
        amin = amax
        if ZERO:
            amin = tl.load(amin_ptr + cell, mask=live, other=0.0)
    return amax, amin


@triton.jit
def piece_largest(x):
    """Return the largest of each piece, [G, C, V] to [G, 1, 1], within a thread first; NaN wins."""
    return tl.reduce(tl.reduce(x, 1, largest, keep_dims=True), 2, largest, keep_dims=True)


@triton.jit
def piece_smallest(x):
    """Return the smallest of each piece, [G, C, V] to [G, 1, 1]; NaN wins."""
    return tl.reduce(tl.reduce(x, 1, smallest, keep_dims=True), 2, smallest, keep_dims=True)


@triton.jit
def piece_sum(x):
    """Return the sum of each piece, [G, C, V] to [G, 1, 1]."""
    return tl.sum(tl.sum(x, 1, keep_dims=True), 2, keep_dims=True)


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
    SHORT: tl.constexpr,
):
    """Rule 46: return amax or 1.5 amax, whichever leaves the smaller squared error of its piece, then quotients and values."""
    wider = amax * 1.5
    s6, c6, zero = block_scale(
        amax, amax, outer, table_ptr, E_MAX, E_MIN, EMAX, False, "two", "46", I_KIND, I_MBITS, I_MIN_EXP, I_MAX, I_SMALL
    )
    s4, c4, zero = block_scale(
        wider, amax, outer, table_ptr, E_MAX, E_MIN, EMAX, False, "two", "46", I_KIND, I_MBITS, I_MIN_EXP, I_MAX, I_SMALL
    )
    q6 = quotient_for(x, s6, zero, E_MAX, E_MIN, KIND, False, "two", False, SHORT)
    q4 = quotient_for(x, s4, zero, E_MAX, E_MIN, KIND, False, "two", False, SHORT)
    v6 = cast(q6, table_ptr, KIND, MBITS, MIN_EXP) * s6
    v4 = cast(q4, table_ptr, KIND, MBITS, MIN_EXP) * s4
    like = tl.abs(x) if KIND == "float" else x  # float: magnitudes
    d6, d4 = v6 - like, v4 - like
    keep = (piece_sum(d4 * d4) >= piece_sum(d6 * d6)) | (amax != amax)
    y = tl.where(keep, v6, v4)
    if KIND == "float":
        y = with_sign(y, x)
    return tl.where(keep, amax, wider), tl.where(keep, q6, q4), y
