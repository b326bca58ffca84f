"""The configurations of the matrix kernels by shape class: data to review, measured on an H200."""

from __future__ import annotations

import math
from dataclasses import dataclass

NARROW_ROWS = 16  # rows of x up to which weights go straight to registers and x too
WIDE_ROWS = 128  # rows of x up to which weights are unpacked inside the product
CODES_ROWS = 65  # rows of x from which codes are multiplied with codes
FAST_FP8 = True  # whether torch._scaled_mm may keep partial sums in the tensor cores' narrower accumulator


@dataclass(frozen=True)
class Config:
    """A tile of BN rows of W times BM rows of x. K is dealt to PARTS warps of a program (narrow: all) and to SPLITS programs.

    `registers` caps those of a thread (0: the compiler decides).
    """

    BM: int
    BN: int
    SPLITS: int
    PARTS: int
    warps: int
    registers: int = 0


def choose(how: str, m: int, n: int, steps: int, each: int, sums: bool, processors: int) -> Config:
    """Return the configuration for `m` rows of x and `n` of W, and `steps` steps of K, each of 4 `each` columns.

    `each` is 32 for codes of 4 bits and 16 for 8; `sums`: scales are applied to sums, not to weights.
    """
    few = n <= 64 * processors  # too few rows to fill the processors with whole rows: deal K to more warps or programs
    eight = each == 16
    if how == "wide":
        bm = 32 if m <= 32 else 64
        blocks = math.ceil(m / bm)
        if few:
            return Config(bm, 64, _splits(blocks, steps, 8 if eight else 4), 1, 4, 128 if eight else 0)
        return Config(bm, 128, _splits(blocks, steps, 2 if eight else 1), 1, 8, 128 if eight else 0)
    parts = 8 if few else 4
    while steps % parts:
        parts //= 2
    if m <= 8:
        return Config(8, 32 if sums and not few else 16, 1, parts, parts)
    return Config(16, 32, _splits(1, steps, 2) if few and eight else 1, parts, parts)


def _splits(blocks: int, steps: int, most: int) -> int:
    """Return in how many parts to split K: at most `most`, fewer with several blocks of x, each of 4 steps or more."""
    splits = max(most // blocks, 1)
    while splits > 1 and steps < 4 * splits:
        splits //= 2
    return splits


@dataclass(frozen=True)
class Int8Config:
    """A tile of BM x BN sums, BK columns at a time, `stages` of them under way; `group` rows of tiles share a wave."""

    BM: int
    BN: int
    BK: int
    stages: int
    warps: int
    group: int = 8


def int8_config(m: int, n: int, k: int) -> Int8Config:
    """Return the tile for an INT8 product of these sizes."""
    if m <= 128:
        return Int8Config(128, 128, 128, 4, 4)
    return Int8Config(128, 256, 128, 4, 8, 16) if m <= 2048 else Int8Config(256, 128, 128, 4, 8)
