"""The arithmetic of formats as Triton device functions, equal bit for bit to `modelopt.numerics` on finite and other inputs.

    quotient   RN(x / s) from one reciprocal per block: with k a power of two that brings s near 1, S = k s, R = RN(1 / S) and
               R' = (1 - S R) R, the product a R + a R' is a faithful rounding of a / S and one residual step makes it correct
    rounding   q + m - m with m = 1.5 * 2^23 * step, step being the distance between neighbours at q (RN, ties to even)

For x of at most 11 bits (float16, bfloat16) the residual step is left out: a R + a R' differs from the quotient by less than
2^-46, and a quotient comes that near to the border between a tie T and its neighbour in float32 for few S only. All were tried
for every T of up to 9 bits (tests/torch/kernels/test_quotient.py): one needs R' to be 2^-23 smaller, S = 2 - 2^-23.

x is clamped to [min S, max S] before the division: rounding is monotone and both ends lie on the grid, so this is the
law's clamp after rounding, and no infinity reaches the residual. Every product and sum here is rounded on its own; kernels are
launched with `enable_fp_fusion=False`.
Source: Markstein, Computation of elementary functions on the IBM RISC System/6000 (1990), for the residual step.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# The interpreter has no fused multiply-add; there the division itself is used.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def largest(a, b):
    """Return the larger of two values; NaN wins."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smallest(a, b):
    """Return the smaller of two values; NaN wins."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clamp(x, low, high):
    """Return `x` limited to [low, high]; NaN stays NaN."""
    return smallest(largest(x, low), high)


@triton.jit
def round_float(q, MBITS: tl.constexpr, MIN_EXP: tl.constexpr):
    """Round `q` (>= 0, in range) to MBITS mantissa bits, MIN_EXP being the biased exponent of the subnormals."""
    power = (q.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power = largest(power, POWER(MIN_EXP - 127))
    return tl.fma(power, -POWER(23 - MBITS), tl.fma(power, POWER(23 - MBITS), q))


@triton.constexpr_function
def POWER(n):
    """Return 2^n."""
    return 2.0**n


@triton.jit
def look_up(table, index):
    """Return table[index] for a table [N] and an index of any shape (through shared memory or shuffles)."""
    return tl.gather(table, tl.ravel(index), 0).reshape(index.shape)


@triton.jit
def nf4_place(q, table_ptr):
    """Return the number, 0 to 32, of the end of a piece of [-1, 1] whose NF4 value is the nearest to `q`; see `nf4_table`."""
    piece = (tl.fma(q, 15.5, 15.5) + 12582912.0).to(tl.int32, bitcast=True) & 31
    return piece + (q > look_up(tl.load(table_ptr + tl.arange(0, 32)), piece)).to(tl.int32)


@triton.jit
def round_nf4(q, table_ptr):
    """Return the NF4 value nearest to `q` (in [-1, 1])."""
    value = look_up(tl.load(table_ptr + 96 + tl.arange(0, 64)), nf4_place(q, table_ptr))
    return tl.where(q != q, q, value)


@triton.jit
def same_sign(q, x):
    """Return |q| with the sign of `x`."""
    bits = (q.to(tl.int32, bitcast=True) & 0x7FFFFFFF) | (x.to(tl.int32, bitcast=True) & -2147483648)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def with_sign(magnitude, x):
    """Return `magnitude` (>= 0) with the sign of `x`."""
    return (magnitude.to(tl.int32, bitcast=True) | (x.to(tl.int32, bitcast=True) & -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def cast(q, table_ptr, KIND: tl.constexpr, MBITS: tl.constexpr, MIN_EXP: tl.constexpr):
    """Round `q`, limited to the element's range (KIND float: its magnitude), to the grid; KIND e4m3, e5m2: by the hardware."""
    if KIND == "e4m3":  # the hardware takes signed values
        value = q.to(tl.float8e4nv).to(tl.float32)
    elif KIND == "e5m2":
        value = q.to(tl.float8e5).to(tl.float32)
    elif KIND == "float":
        value = round_float(q, MBITS, MIN_EXP)
    elif KIND == "int":
        value = (q + 12582912.0) - 12582912.0
    else:
        value = round_nf4(q, table_ptr)
    return value


@triton.jit
def wide_scale(ratio, SCALE: tl.constexpr):
    """Round a ratio to a scale type other than e8m0; zero becomes 1 (e4m3: its smallest value)."""
    if SCALE == "e4m3":
        limited = clamp(ratio, 0.001953125, 448.0)
        scale = round_float(limited, 3, 121)
    else:
        scale = ratio
        if SCALE == "f16":
            scale = clamp(ratio, -65504.0, 65504.0).to(tl.float16).to(tl.float32)
        if SCALE == "bf16":
            scale = clamp(ratio, -3.3895313892515355e38, 3.3895313892515355e38).to(tl.bfloat16).to(tl.float32)
        scale = tl.where(scale == 0.0, 1.0, scale)
    return scale


@triton.jit
def power_scale(source, RULE: tl.constexpr, EMAX: tl.constexpr):
    """Return the e8m0 scale as float32 from the ratio (rule floor: from the amax)."""
    bits = source.to(tl.int32, bitcast=True)
    code = (bits >> 23) & 0xFF
    if RULE == "up":
        code += ((bits & 0x7FFFFF) != 0).to(tl.int32)
    elif RULE == "nearest":
        code += ((bits & 0x7FFFFF) >= 0x400000).to(tl.int32)
    else:
        code -= EMAX
    code = tl.minimum(tl.maximum(code, 0), 254)
    value = tl.where(code == 0, 0x00400000, code << 23)
    return tl.where((bits & 0x7F800000) == 0x7F800000, 0x7FC00000, value).to(tl.float32, bitcast=True)


@triton.jit
def block_scale(
    amax,
    amin,
    outer,
    table_ptr,
    E_MAX: tl.constexpr,
    E_MIN: tl.constexpr,
    EMAX: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE: tl.constexpr,
    RULE: tl.constexpr,
    I_KIND: tl.constexpr,
    I_MBITS: tl.constexpr,
    I_MIN_EXP: tl.constexpr,
    I_MAX: tl.constexpr,
    I_SMALL: tl.constexpr,
):
    """Return (scale, the value stored for it, zero point) from a block's range. SCALE "two" is a scale with a scale `outer`."""
    zero = amax * 0.0
    if ZERO:
        low = smallest(amin, 0.0)
        scale = wide_scale(tl.div_rn(largest(amax, 0.0) - low, E_MAX - E_MIN), SCALE)
        zero = (clamp(E_MIN - tl.div_rn(low, scale), E_MIN, E_MAX) + 12582912.0) - 12582912.0
        stored = scale
    elif SCALE == "e8m0":
        if RULE == "floor":
            scale = power_scale(amax, RULE, EMAX)
        else:
            scale = power_scale(tl.div_rn(amax, E_MAX), RULE, EMAX)
        stored = scale
    elif SCALE == "two":
        ratio = tl.div_rn(amax, E_MAX)
        infinite = (ratio * 0.0) + I_SMALL  # an infinite outer scale: the smallest code, NaN for an infinite amax
        ratio = tl.where(outer == float("inf"), infinite, quotient(ratio, outer, I_SMALL, I_MAX, "f32", True, False))
        stored = cast(ratio, table_ptr, I_KIND, I_MBITS, I_MIN_EXP)
        scale = stored * outer
    elif SCALE == "given":
        scale = amax
        stored = amax
    else:
        scale = wide_scale(tl.div_rn(amax, E_MAX), SCALE)
        stored = scale
    return scale, stored, zero


@triton.jit
def limited(x, low, high, SIGNED: tl.constexpr, MASK: tl.constexpr):
    """Return `x` within [low, high], or |x| up to high; NaN stays NaN, or with MASK becomes an end."""
    if MASK and SIGNED:
        y = tl.minimum(tl.maximum(x, low), high)
    elif MASK:
        y = tl.minimum(tl.abs(x), high)
    elif SIGNED:
        y = clamp(x, low, high)
    else:
        y = smallest(tl.abs(x), high)
    return y


@triton.jit
def reciprocal(x):
    """Return RN(1 / x)."""
    if INTERPRETED:
        y = tl.div_rn(1.0, x)
    else:
        y = tl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def quotient(
    x,
    scale,
    low,
    high,
    SCALE: tl.constexpr,
    SIGNED: tl.constexpr,
    KEEP: tl.constexpr,
    MASK: tl.constexpr = False,
    SHORT: tl.constexpr = False,
):
    """Return RN(x / scale) limited to about [low, high] (|x| if not SIGNED); NaN where the scale is NaN.

    KEEP: the sign of a negative zero is kept. MASK: 0 where the scale is infinite or NaN, and NaN elsewhere is not kept. SHORT: x
    has at most 11 significant bits (float16, bfloat16); then the last bit may be wrong, but never at or beside a tie of the grid.
    """
    bits = scale.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) & 0xFF
    if SCALE == "e8m0":
        inverse = tl.where(exponent == 254, 0x00400000, (254 - exponent) << 23)
        inverse = tl.where(exponent == 255, 0 if MASK else 0x7FC00000, inverse).to(tl.float32, bitcast=True)
        if MASK:
            high = tl.where(exponent == 255, 0.0, high)
            low = tl.where(exponent == 255, 0.0, low)
        q = limited(x * inverse, low, high, SIGNED, MASK)
    else:
        k = (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)
        if MASK:
            near_one = tl.where(exponent == 255, 1.0, scale * k)
            reach = tl.where(exponent == 255, 0.0, near_one)
        else:
            infinite = bits == 0x7F800000  # then x / scale is x * 0
            k = tl.where(infinite, 0.0, k)
            near_one = tl.where(infinite, 1.0, scale * k)
            reach = near_one
        a = limited(x * k, low * reach, high * reach, SIGNED, MASK)
        if INTERPRETED:
            q = tl.div_rn(a, near_one)
        else:
            r = reciprocal(near_one)
            rest = tl.fma(-near_one, r, 1.0) * (r * 0.9999998807907104 if SHORT else r)  # 1 - 2^-23
            q = tl.fma(a, r, a * rest)
            if not SHORT:
                q = tl.fma(tl.fma(-near_one, q, a), r, q)
            if KEEP:
                q = same_sign(q, a)
    return q


@triton.jit
def quotient_for(
    x,
    scale,
    zero,
    E_MAX: tl.constexpr,
    E_MIN: tl.constexpr,
    KIND: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE: tl.constexpr,
    MASK: tl.constexpr = False,
    SHORT: tl.constexpr = False,
):
    """Return x / scale limited to the element's range less the zero point; its magnitude for KIND "float"."""
    signed: tl.constexpr = KIND != "float"
    keep: tl.constexpr = KIND == "e4m3" or KIND == "e5m2"
    if ZERO:
        q = quotient(x, scale, E_MIN - zero, E_MAX - zero, SCALE, signed, keep, MASK, SHORT)
    else:
        q = quotient(x, scale, E_MIN, E_MAX, SCALE, signed, keep, MASK, SHORT)
    return q


@triton.jit
def round_to(
    x,
    scale,
    zero,
    table_ptr,
    E_MAX: tl.constexpr,
    E_MIN: tl.constexpr,
    KIND: tl.constexpr,
    MBITS: tl.constexpr,
    MIN_EXP: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE: tl.constexpr,
    SHORT: tl.constexpr,
):
    """Return the float32 values to which `x` is rounded."""
    value = cast(quotient_for(x, scale, zero, E_MAX, E_MIN, KIND, ZERO, SCALE, False, SHORT), table_ptr, KIND, MBITS, MIN_EXP)
    if KIND == "float":
        y = with_sign(value * scale, x)
    else:
        y = value * scale
    return y


@triton.jit
def tile(
    n,
    width,
    block,
    parts,
    blocks,
    inner,
    block_0,
    block_1,
    grid_1,
    step,
    STEPS: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    FORM: tl.constexpr,
):
    """Return what one program works on, G pieces of W elements, as (start, first, column, live, cell), each [G, 1, 1].

    start: offset of each piece in the tensor; first: its place in its block; column: its place in the tensor's row; live:
    whether it exists; cell: the index of its scale ([1, 1, W] for FORM "columns", a scalar for "tiles"). `parts` pieces make up a
    block of `block` elements, `blocks` blocks make up a row of `width` elements. FORM "flat": blocks are whole multiples of W,
    without gaps; "rows": any block within a row; "grid": blocks of several rows; "tiles": those where the G pieces lie in one
    block; "columns": a scale per column, `parts` column tiles. A program makes STEPS tiles one after another ("flat": neighbours,
    "columns": under one another), of which this is number `step`.
    """
    pid = tl.program_id(0).to(tl.int64)
    if FORM == "flat":
        pid = pid * STEPS + step
    i = tl.arange(0, G)[:, None, None]
    index = pid.to(tl.int32) * G + i
    if FORM == "columns":
        row = ((pid // parts) * STEPS + step) * G + i
        column = row * 0 + (pid % parts) * W
        start = row * width + column
        first = row * 0
        live = row < n
        cell = (pid % parts) * W + tl.arange(0, W)[None, None, :]
    elif FORM == "tiles":
        part = pid % (blocks * parts)
        tiles = (inner + G - 1) // G
        group = pid // (blocks * parts)
        at = part // parts
        row = (group % tiles) * G + i
        live = row < inner
        cell = ((group // tiles) * grid_1 + (group % tiles) * G // block_1) * blocks + at
        first = (part % parts) * W + i * 0
        column = at * block + first
        start = ((group // tiles) * inner + row) * width + column
    elif FORM == "flat":
        start = pid * (G * W) + i * W
        first = index
        column = index
        live = index < n
        cell = index // parts
    else:
        at = (index // parts) % blocks
        row = index // parts // blocks
        cell = row * blocks + at
        if FORM == "grid":
            cell = ((row // inner // block_0) * grid_1 + (row % inner) // block_1) * blocks + at
        first = (index % parts).to(tl.int64) * W
        column = at.to(tl.int64) * block + first
        start = row.to(tl.int64) * width + column
        live = index < n
    return start, first, column, live, cell


@triton.jit
def places(C: tl.constexpr, V: tl.constexpr):
    """Return the places of a piece of C * V elements as [1, C, V]: a thread holds all C, so that it computes few scales."""
    return tl.arange(0, C)[None, :, None] * V + tl.arange(0, V)[None, None, :]


@triton.jit
def inside(w, first, column, live, width, block, FORM: tl.constexpr):
    """Return which of the places `w` [1, C, V] of a tile's pieces exist, [G, C, V]."""
    if FORM == "flat":
        here = tl.broadcast_to(live, [live.shape[0], w.shape[1], w.shape[2]])
    elif FORM == "columns":
        here = live & (column + w < width)
    else:
        here = live & (first + w < block) & (column + w < width)
    return here
