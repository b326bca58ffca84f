"""The configurations of the matrix kernels by shape class: data to review, measured on an H200."""

from __future__ import annotations

from dataclasses import dataclass

FEW_ROWS = {9: 8, 8: 16}  # rows of x up to which `skinny.cu` serves, by the major compute capability (8: all but Hopper)
FEW_ALONE = 4  # rows of x from which it leaves Hopper's `broad.cu` what would have to be split along K
TENS_ROWS = 128  # rows of x up to which `broad.cu` serves
CODES_ROWS = 64  # rows of x above which codes are multiplied with codes
EXPERT_ROWS = 16  # rows of x in all up to which the experts of a layer go through `skinny.cu`
FAST_FP8 = True  # whether torch._scaled_mm may keep partial sums in the tensor cores' narrower accumulator


@dataclass(frozen=True)
class Skinny:
    """`skinny.cu`: R tiles of 16 rows of W a warp; WR x WK warps a block, along rows and along K; `splits` blocks along K.

    DEPTH stages of S steps are under way; `sums`: scales meet sums, not weights.
    """

    R: int
    WK: int
    WR: int
    S: int
    DEPTH: int
    splits: int = 1
    sums: bool = True


ALONG_K = (1, 2, 4, 7, 8, 14, 16)
ALONG_ROWS = (1, 2, 4, 7, 8, 14)
WARPS = {False: 14, True: 28}  # a multiprocessor's that hide the unpacking; True: scales meet the weights, twice the instructions
STAGES = {  # (S, DEPTH) to try in this order, by the bits of a code; 0: more than 16 warps
    4: ((4, 2), (2, 2), (4, 1), (2, 1), (1, 2), (1, 1)),
    8: ((2, 3), (2, 2), (4, 1), (2, 1), (1, 2), (1, 1)),
    0: ((4, 1), (2, 1), (1, 1)),
}


@dataclass(frozen=True)
class Broad:
    """`broad.cu`: blocks of 64 GROUPS rows of W and 8 NT of x; `splits` along K; DEPTH stages under way; `sums`: see Skinny."""

    NT: int
    GROUPS: int
    DEPTH: int
    splits: int = 1
    sums: bool = True


TILES = (2, 4, 6, 8, 12, 16)  # NT
SUMS_TILES = 4  # NT up to which scales meet sums; registers are short above
DEPTHS = (12, 8, 6, 4, 3)
BLOCKS = {1: 1.5, 2: 0.75}  # blocks a multiprocessor, by GROUPS, that splits of K have to make up
LONG = {4: 4, 8: 2}  # NT above which two groups share x, if rows are enough; by the bits of a code


@dataclass(frozen=True)
class Grouped:
    """A tile of BM rows of x times BN rows of W, BK columns at a time, `stages` of them under way."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


def grouped(rows: int, experts: int, size: int, codes: bool) -> Grouped:
    """Return the tile for `rows` rows of x of `size` bytes a value, dealt to `experts`."""
    each = rows / experts
    bm = 16 if each <= 16 else 32 if each <= 32 else 64 if each <= 64 or size == 4 else 128
    if codes:
        return Grouped(bm, 128, 128, 8 if bm == 128 else 4, 4)
    return Grouped(bm, 64 if size == 4 else 128, 64 if size == 2 else 32, 8 if bm == 128 else 4, 3)


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
