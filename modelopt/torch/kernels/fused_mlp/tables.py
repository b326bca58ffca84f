"""Which way fp8_mlp goes and with which tiles: data to review, measured on an H200."""

from __future__ import annotations

import math
from dataclasses import dataclass

FAST = True  # whether torch._scaled_mm may keep partial sums in the tensor cores' narrower accumulator


@dataclass(frozen=True)
class Config:
    """A tile of BM x BN sums, BK columns at a time, `stages` of them under way; `group` rows of tiles share a wave.

    `flatten`: whether the loads of a program's next tile may begin before the epilogue of this one.
    """

    BM: int
    BN: int
    BK: int
    stages: int
    warps: int
    group: int = 8
    flatten: bool = True


def route(m: int, gated: bool) -> str:
    """Return "pass" or "epilogue" for `m` rows.

    The epilogue wins where its tiles fill the processors several times, and at one tile of rows, where it saves a launch; the
    gated one, which saves a read of x too, nearly everywhere.
    """
    if gated:
        return "epilogue" if m > 8 else "pass"
    return "epilogue" if m >= 1024 or 32 < m <= 64 else "pass"


def choose(m: int, n: int, gated: bool) -> Config:
    """Return the tile of the product with the epilogue, for `n` features between the layers."""
    if gated:  # two sums: no registers are left for flattening
        return Config(64, 128, 128, 5, 4, flatten=False) if m <= 64 else Config(128, 128, 128, 4, 8, 16, flatten=False)
    if m <= 64:
        return Config(64, 128, 128, 5, 4)
    large = math.ceil(m / 128) * math.ceil(n / 256)
    return Config(128, 256, 128, 3, 8, 32) if large >= 640 else Config(128, 128, 128, 5, 8)
