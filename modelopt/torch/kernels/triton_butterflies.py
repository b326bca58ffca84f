"""Butterflies of the Walsh-Hadamard transform on a tile, as Triton device functions; each sum is one float32 addition.

At most five bits of an element's index are transformed while they lie in the registers of a thread; then the tile is laid out
anew (the compiler finds shuffles or shared memory for it), so that the next five do. The lowest bit comes first, as in the law.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lowest_bits(x, ROWS: tl.constexpr, BITS: tl.constexpr):
    """Transform the rows of [ROWS, 2^BITS], the lowest bit of the index first."""
    for _ in tl.static_range(BITS):  # each stage takes the lowest bit and makes it the highest
        low, high = tl.split(x.reshape(ROWS, 2 ** (BITS - 1), 2))
        x = tl.join(low + high, low - high).permute(0, 2, 1).reshape(ROWS, 2**BITS)
    return x


@triton.jit
def middle_bits(x, TOTAL: tl.constexpr, BELOW: tl.constexpr, BITS: tl.constexpr):
    """Transform BITS bits of the index of a tile of TOTAL elements, those above its lowest BELOW bits."""
    rows: tl.constexpr = TOTAL // 2**BITS
    groups: tl.constexpr = rows // 2**BELOW
    x = lowest_bits(x.reshape(groups, 2**BITS, 2**BELOW).permute(0, 2, 1).reshape(rows, 2**BITS), rows, BITS)
    return x.reshape(groups, 2**BELOW, 2**BITS).permute(0, 2, 1)


@triton.jit
def butterflies(x, TOTAL: tl.constexpr, BITS: tl.constexpr):
    """Transform every 2^BITS neighbours (row-major) of a tile of TOTAL elements, BITS up to 15; not normalized."""
    first: tl.constexpr = BITS if BITS < 5 else 5
    second: tl.constexpr = BITS - first if BITS - first < 5 else 5
    third: tl.constexpr = BITS - first - second
    x = lowest_bits(x.reshape(TOTAL // 2**first, 2**first), TOTAL // 2**first, first)
    if second > 0:
        x = middle_bits(x, TOTAL, first, second)
    if third > 0:
        x = middle_bits(x, TOTAL, first + second, third)
    return x


@triton.jit
def rotated_tile(x, BITS: tl.constexpr, G: tl.constexpr, C: tl.constexpr, V: tl.constexpr):
    """Return every 2^BITS neighbours of a tile [G, C, V] without gaps transformed and normalized."""
    return butterflies(x, G * C * V, BITS).reshape(G, C, V) * ROOT(BITS)


@triton.constexpr_function
def ROOT(bits):
    """Return 1 / sqrt(2^bits)."""
    return 2.0 ** (-bits / 2)
