"""Which way fp8_mlp goes and with which tiles: data to review, measured on an H200."""

from __future__ import annotations

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


def route(m: int, n: int, gated: bool) -> str:
    """Return "pass" or "epilogue" for `m` rows and `n` features between the layers."""
    return "pass"


def choose(m: int, n: int, k: int, gated: bool) -> Config:
    """Return the tile of the product with the epilogue."""
    if m <= 64:
        return Config(64, 128, 128, 5, 4)
    return Config(128, 128, 128, 4, 8) if gated else Config(128, 256, 128, 3, 8)
