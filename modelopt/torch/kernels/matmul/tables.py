"""The configurations of the matrix kernels by shape class: data to review, measured on an H200."""

from __future__ import annotations

from dataclasses import dataclass

FEW_ROWS = {9: 8, 8: 16}  # rows of x up to which `skinny.cu` serves, by the major compute capability (8: all but Hopper)
FEW_SIZES = (
    (1 << 25, 2, 1),
    (1 << 23, 4, 4),
)  # values of W from which on only so many rows are "few", with coarse and with fine scales
FEW_ALONE = 4  # rows of x from which it leaves Hopper's `broad.cu` what would have to be split along K
TENS_ROWS = 128  # rows of x up to which `broad.cu` serves
CODES_ROWS = {False: 4, True: 1}  # rows of x above which codes are multiplied with codes; True: K of LONG_K columns and more
LONG_K = 8192
EXPERT_ROWS = 16  # rows of x in all up to which the experts of a layer go through `skinny.cu`
DECODED_ROWS = 129  # rows of x for each expert (on average) from which all matrices are decoded first
DECODED_BYTES = 1 << 32  # of decoded matrices at most
ENOUGH = 100  # tiles that occupy the processors
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


@dataclass(frozen=True)
class One:
    """`one.cu`: as `Skinny`, with one tile of rows a warp."""

    WK: int
    WR: int
    S: int
    DEPTH: int
    splits: int = 1


_LIGHT, _HEAVY, _BYTES = ((4, 2), (2, 2)), ((2, 2), (4, 2)), ((2, 3), (2, 2))
ONE_STAGES = {  # (S, DEPTH) that `one.cu` prefers, by the codes
    kind: (*first, (2, 1), (1, 2), (1, 1))
    for kind, first in {"i4": _LIGHT, "u4": _LIGHT, "e2m1": _HEAVY, "i8": _BYTES, "e4m3": _BYTES}.items()
}
ALONG_K = (1, 2, 4, 7, 8, 14, 16)
ALONG_ROWS = (1, 2, 4, 7, 8, 14)
MANY_STEPS = 16  # of K, from which the warps of `skinny.cu` have equally many
WARPS = {False: 14, True: 28}  # a multiprocessor's that hide the unpacking; True: scales meet the weights, twice the instructions
STAGES = {  # (S, DEPTH) to try in this order, by the bits of a code; 0: more than 16 warps
    4: ((4, 2), (2, 2), (4, 1), (2, 1), (1, 2), (1, 1)),
    8: ((2, 3), (2, 2), (4, 1), (2, 1), (1, 2), (1, 1)),
    0: ((4, 1), (2, 1), (1, 1)),
}


@dataclass(frozen=True)
class Tens:
    """`tens.cu`: blocks of 64 GROUPS rows of W and 8 NT of x, which hold all of their columns of x.

    K is dealt to `cluster` blocks that share memory, and to `splits` of those; UNITS x DEPTH units of 128 columns of W are under
    way. `sums`: see Skinny.
    """

    NT: int
    GROUPS: int
    UNITS: int
    DEPTH: int
    cluster: int = 1
    splits: int = 1
    sums: bool = True


TENS_TILES = 2  # NT up to which `tens.cu` serves; with more the columns of x take longer than a launch that prepares them
UNIT_COST = {4: 0.45, 2: 0.3, 1: 0.25}  # about the microseconds of a unit, by GROUPS
ADDING = (1.0, 0.2)  # about those of adding up three and more parts of K, and of each of them
CLUSTER = 0.5  # about those of adding up two
PAIRS = (2, 8)  # parts of K: two, and from so many on if they are even, are dealt to clusters of two
RINGS = {  # (UNITS, DEPTH) to try in this order, by the bits of a code; from the second on for 4 GROUPS, where more would delay x
    4: ((2, 3), (2, 2), (1, 2)),
    8: ((1, 4), (1, 3), (1, 2)),
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
SUMS_TILES = 8  # NT up to which scales meet sums; registers are short above
DEPTHS = (12, 8, 7, 6, 4, 3)
BLOCKS = {1: 1.5, 2: 0.6}  # blocks a multiprocessor, by GROUPS, that splits of K have to make up
LONG = {4: 4, 8: 2}  # NT above which two groups share x, if rows are enough; by the bits of a code


@dataclass(frozen=True)
class Eights:
    """`eights.cu`: tiles of ROWS rows of W and 8 NT of x, whose steps of 128 BOXES columns are dealt to `blocks`, or clusters.

    A cluster has PAIR blocks. DEPTH steps are under way, AHEAD of them with W ahead of x.
    """

    NT: int
    ROWS: int
    BOXES: int
    DEPTH: int
    AHEAD: int
    PAIR: int
    blocks: int


EIGHTS_ROWS = (2, 128)  # rows of x for which `eights.cu` serves, from and up to
EIGHTS_WIDE = 64  # rows of x above which torch's FP8 product is faster where N alone has tiles enough
RING = 205 << 10  # bytes of shared memory for what is under way
SMALL_STAGE = 16 << 10  # bytes of 128 columns up to which a step has 256
AHEAD = 0.6  # of DEPTH
STREAM, RATE = 4.4e6, 4.0e4  # about the bytes of W that all blocks fetch in a microsecond, and one at most
X_COST = 0.2  # about what a byte of x takes, of one of W
STEP = 0.01  # about the microseconds of 128 columns besides
PAIRED, ADDED = (0.3, 0.05), (2.0, 0.25)  # about those of adding two parts in a cluster, and of adding more; for each NT


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
    if size == 4:
        return Grouped(bm, 64, 32, 4, 3)
    return Grouped(bm, 64 if bm == 128 else 128, 128 if bm == 32 else 64, 4, 3)


@dataclass(frozen=True)
class Codes:
    """A tile of BM x BN sums of products of codes, BK columns at a time, `stages` of them under way.

    `group` rows of tiles share a wave; K is dealt to `splits` programs.
    """

    BM: int
    BN: int
    BK: int
    stages: int
    warps: int
    group: int = 8
    splits: int = 1


def codes(m: int, n: int, k: int) -> Codes:
    """Return the tile for the codes of x [m, k] times those of W [n, k]."""
    columns = -(-n // 128)
    if m <= 64:
        splits = next((s for s in (1, 2, 4, 8, 16) if columns * s >= ENOUGH or 16 * 256 * s > k), 16)
        return Codes(64, 128, 256, 3, 4, 8, splits) if m <= 16 or splits > 1 else Codes(64, 128, 128, 6, 4)
    if m <= 128 and columns >= ENOUGH:
        return Codes(128, 128, 128, 4, 4)
    if m <= 384 and -(-m // 128) * columns >= 2 * ENOUGH:
        return Codes(128, 256, 128, 4, 8, 16)
    if -(-m // 128) * columns < ENOUGH:
        splits = 2 if -(-m // 64) * columns < ENOUGH and k >= 8192 else 1
        return Codes(64, 128, 128, 6, 4, 8, splits) if m <= 128 else Codes(128, 64, 256, 4, 4)
    return Codes(128, 128, 128, 3, 4, 16, 2 if -(-m // 128) * columns < 2 * ENOUGH and k >= 4096 else 1)  # two share a processor


def expert_codes(rows: int, experts: int) -> Codes:
    """Return the tile for the codes of `rows` rows of x, dealt to `experts`."""
    return Codes(64, 256, 128, 4, 4) if rows <= 64 * experts else Codes(128, 128, 128, 3, 4, 4)


def fp8_rows(m: int, n: int) -> bool:
    """Whether FP8 codes with a scale per row have too few tiles for torch._scaled_mm, which does not split K."""
    return 1 < m <= 64 or -(-m // 128) * -(-n // 128) < ENOUGH
