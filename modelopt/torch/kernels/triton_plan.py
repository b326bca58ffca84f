"""How a tensor and a format become the arguments of a Triton kernel: tiles, constants, and reasons to decline.

A tensor in canonical shape (`numerics.blocks.canonical`) is seen as rows of `width` elements; a row has `blocks` blocks of
`block` elements. Where the last dimension has a scale per element ("columns"), tiles run across it instead.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from modelopt.numerics import Element, Format
from modelopt.numerics.blocks import canonical
from modelopt.numerics.elements import NF4_TABLE
from modelopt.numerics.reference import FOUR_OVER_SIX_TOP, given_range

TILE = 4096  # elements of one program
SMALL_TILE = 2048  # the same where blocks are short, and each thread computes several scales
NEIGHBOURS = 4  # tiles of one program where blocks are short and the tensor is large
COLUMN_STEPS = 8  # tiles of one program where every column has a scale of its own
WIDEST = 32768  # the longest block whose range one program can find
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Layout:
    """The tiling of one tensor: `count` tile rows of W elements, G of them a program; see `triton_math.tile`."""

    form: str
    count: int
    width: int
    block: int
    parts: int
    blocks: int
    inner: int
    block_0: int
    block_1: int
    grid_1: int
    G: int
    W: int
    steps: int = 1  # tiles under one another that a program walks through (form "columns")
    cuts: int = 4  # of a piece, at most
    least: int = 16  # elements of a cut: with half precision a whole sector of 32 bytes
    lanes: int = 32  # elements of a thread

    @property
    def C(self) -> int:
        """Cuts of a piece. A thread has 8 elements of each of 4 cuts, so that it computes one scale for 32 elements."""
        least = self.least if self.W > 16 else 8
        return 1 if self.form == "columns" or self.G == 1 else max(1, min(self.cuts, self.W // least))

    @property
    def programs(self) -> tuple[int]:
        """The launch grid."""
        if self.form == "tiles":
            slices = self.count // (self.inner * self.blocks * self.parts)
            return (slices * -(-self.inner // self.G) * self.blocks * self.parts,)
        tiles = -(-self.count // self.G)
        return (-(-tiles // self.steps) * (self.parts if self.form == "columns" else 1),)

    @property
    def whole_blocks(self) -> bool:
        """Whether a block lies in one tile row, so that one program sees all of it."""
        return self.form in ("flat", "rows") and self.parts == 1

    @property
    def arguments(self) -> tuple[int, ...]:
        """The run-time arguments of `triton_math.tile`; widths in units of MULTIPLE elements."""
        unit = self.unit
        return (
            self.count,
            self.width // unit,
            self.block // unit,
            self.parts,
            self.blocks,
            self.inner,
            self.block_0,
            self.block_1,
            self.grid_1,
        )

    @property
    def unit(self) -> int:
        """What rows and blocks are multiples of: 8 elements, which are read at once, or 1. One kernel serves all such widths."""
        return 8 if self.width % 8 == 0 and self.block % 8 == 0 and max(self.width, self.block) < 2**31 else 1

    @property
    def warps(self) -> int:
        """Warps of one program."""
        return max(1, min(32, self.G * self.W // (32 * self.lanes)))

    @property
    def constants(self) -> dict[str, Any]:
        """The compile-time arguments of the tiling, and the launch options."""
        shape = {"FORM": self.form, "G": self.G, "C": self.C, "V": self.W // self.C, "STEPS": self.steps, "MULTIPLE": self.unit}
        return shape | {"num_warps": self.warps, "enable_fp_fusion": False}


@functools.lru_cache(maxsize=4096)
def layout(shape: tuple[int, ...], sizes: tuple[int, ...], whole: bool = False, tile: int = TILE, piece: int = 0) -> Layout | str:
    """Return the tiling of a tensor of `shape` with blocks of `sizes`, or why there is none.

    `whole` asks for tiles that hold whole blocks where that can be (up to WIDEST elements), `piece` for pieces no longer than it.
    """
    shape, sizes = canonical(shape, sizes) if shape else ((1,), (1,))
    if len(shape) > 3:
        return f"blocks of {sizes} in a tensor of {shape} need more than three dimensions"
    width, block = shape[-1], sizes[-1]
    rows = math.prod(shape[:-1])
    if block == 1 and width > 1:
        if any(b != n for n, b in zip(shape[:-1], sizes[:-1], strict=True)):
            return f"a scale per element of the last dimension, but not for all rows (blocks of {sizes} in {shape})"
        w = min(triton.next_power_of_2(width), 256)
        g = max(min(tile, SMALL_TILE) // w, 1)
        return Layout("columns", rows, width, w, -(-width // w), 1, 1, 1, 1, 1, g, w, COLUMN_STEPS if rows >= 64 * g else 1)
    (n0, b0), (n1, b1) = ((1, 1), (1, 1), *zip(shape[:-1], sizes[:-1], strict=True))[-2:]
    power = triton.next_power_of_2(block)
    w = min(power, WIDEST if whole and power <= WIDEST else piece or tile)
    parts, blocks = -(-block // w), -(-width // block)
    grouped = b0 > 1 or b1 > 1
    flat = not grouped and width % block == 0 and block % w == 0
    count = rows * blocks * parts
    if count >= 2**31:
        return f"a tensor of {shape} in blocks of {sizes} has too many tiles"
    g = max((min(tile, SMALL_TILE) if flat and w <= 128 else tile) // w, 1)
    form = "flat" if flat else "grid" if grouped else "rows"
    if form == "grid" and b0 == 1:
        common = min(b1 & -b1 if b1 < n1 else triton.next_power_of_2(b1), g)
        if common * w >= 1024:
            form, g = "tiles", common
    return Layout(form, count, width, block, parts, blocks, n1, b0, b1, -(-n1 // b1), g, w)


@functools.lru_cache(maxsize=4096)
def shortened(
    plan: Layout, fmt: Format, found: bool, codes: bool = False, rotated: bool = False, clipped: bool = False
) -> Layout:
    """Return the tiling with what measurements on an H200 favour for `fmt` (`found`: the program finds the ranges itself)."""
    if clipped:  # two tensors are read
        return replace(plan, G=64) if plan.form == "flat" and plan.W == 16 else plan
    if codes and plan.form == "columns" and plan.W > 128:
        rows = plan.G * plan.W // 128
        plan = replace(plan, G=rows, W=128, block=128, parts=-(-plan.width // 128))
        return replace(plan, steps=COLUMN_STEPS if plan.count >= 64 * rows else 1)
    if codes and fmt.element.bits < 8:
        plan = replace(plan, least=8)  # reads only are in half sectors
    if found and fmt.rule == "46":
        return replace(plan, lanes=16)  # two roundings of a tile take many registers
    if plan.form == "flat" and plan.W == 16 and plan.count >= 2**20:
        return replace(plan, steps=NEIGHBOURS)
    if found and not rotated and fmt.element.bits == 8 and plan.G == 1 and plan.W >= 8192:  # few warps wait for each other
        return replace(plan, lanes=min(plan.W // 128, 128))
    if codes and plan.G == 1 and plan.W >= 8192:
        return replace(plan, lanes=64)
    return plan


def layout_of(x: Tensor, fmt: Format, whole: bool = False, piece: int = 0) -> Layout | str:
    """Return the tiling of `x` (not empty) under the blocks of `fmt`, or why there is none."""
    return layout(tuple(x.shape), fmt.block.sizes(x.shape) if x.dim() else (), whole, piece=piece)


def retiled(plan: Layout, tile: int) -> Layout:
    """Return the layout with about `tile` elements a program instead (not for form "tiles")."""
    return replace(plan, G=max(tile // plan.W, 1))


def rotates(
    x: Tensor,
    fmt: Format,
    size: int,
    amax: Tensor | None,
    global_amax: Tensor | None,
    amin: Tensor | None,
    piece: int = 0,
) -> Layout | None:
    """Return the tiling under which one program can transform blocks of `size` and then quantize; None if it cannot.

    It can where tiles have no gaps and hold whole blocks of both kinds, and where no range of the transformed tensor must be
    known beforehand.
    """
    amax, global_amax, _ = given_range(x.shape, fmt, amax, global_amax, amin)
    plan = layout_of(x, fmt, amax is None, piece)
    if isinstance(plan, str) or size > 256 or size & (size - 1) or size < 2:
        return None
    found_inside = plan.whole_blocks and (global_amax is not None or not fmt.is_two_level)
    tiled = plan.form == "flat" and (plan.G * plan.W) % size == 0
    return plan if tiled and (amax is not None or found_inside) else None


def unlike(x: Tensor, fmt: Format) -> str | None:
    """Return why no kernel here serves `x` under `fmt`, or None."""
    if x.dtype not in DTYPES:
        return f"the tensor is {x.dtype}; the kernels take float32, float16 and bfloat16"
    if x.numel() == 0:
        return "the tensor is empty"
    if fmt.why_not(x.shape) is not None:
        return None  # the caller reports it
    found = layout_of(x, fmt)
    return found if isinstance(found, str) else None


@functools.lru_cache(maxsize=8)
def converts_float8(device: torch.device) -> bool:
    """Whether the device has FP8 conversions (compute capability 8.9 and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _kind(e: Element, hardware: bool) -> str:
    if hardware and e.name in ("e4m3", "e5m2"):
        return e.name
    return "nf4" if e.kind == "codebook" else e.kind


def element_constants(e: Element, hardware: bool) -> dict[str, Any]:
    """Return the compile-time description of an element type; `hardware`: whether the device converts FP8."""
    return {
        "KIND": _kind(e, hardware),
        "MBITS": e.mantissa_bits,
        "MIN_EXP": 1 - e.bias + 127,
        "E_MAX": e.max,
        "E_MIN": e.min,
    }


@functools.lru_cache(maxsize=1024)
def scale_constants(fmt: Format, device: torch.device, given: bool = False) -> dict[str, Any]:
    """Return the compile-time description of a format; `given`: the kernel is handed effective scales."""
    hardware = converts_float8(device)
    out = {
        **element_constants(fmt.element, hardware),
        "EMAX": fmt.element.emax,
        "ZERO": fmt.zero is not None,
        "SCALE": "given" if given else "two" if isinstance(fmt.scale, Format) else fmt.scale.name,
        "RULE": fmt.rule,
        "I_KIND": "int",
        "I_MBITS": 0,
        "I_MIN_EXP": 0,
        "I_MAX": 1.0,
        "I_SMALL": 1.0,
        "OUTER": "f32",
        "TOP": 1.0,
    }
    if isinstance(fmt.scale, Format) and not given:
        inner = fmt.scale
        e = inner.element
        out |= {"I_KIND": _kind(e, hardware), "I_MBITS": e.mantissa_bits, "I_MIN_EXP": 1 - e.bias + 127}
        out |= {"I_MAX": e.max, "I_SMALL": e.smallest_positive, "OUTER": str(inner.scale)}
        tops = {"46": fmt.element.max * FOUR_OVER_SIX_TOP, "fp8": e.max}
        out["TOP"] = tops.get(fmt.rule, fmt.element.max * e.max)
    return out


@functools.lru_cache(maxsize=8)
def nf4_table(device: torch.device) -> Tensor:
    """Return NF4 as one float32 tensor: 32 borders, 64 codes and 64 values by place (33 used), 16 values by code.

    Piece i of [-1, 1] are the numbers that round to i when brought to [0, 31]; place i is its lower end. A piece has at most one
    border, and a number beyond it goes with the next place. No border lies near an end of a piece (tested), so that rounding may
    put a number into a neighbouring piece.
    """
    table = torch.tensor(NF4_TABLE, dtype=torch.float32)
    borders = (table[1:] + table[:-1]) / 2
    pieces = torch.round(borders * 15.5 + 15.5)
    border, codes = torch.full((32,), 2.0), torch.zeros(64, dtype=torch.int64)
    for i in range(33):
        codes[i] = (pieces < i).sum()
        if (pieces == i).any():
            border[i] = borders[pieces == i][0]
    return torch.cat([border, codes.float(), table[codes], table]).to(device)


def prefix(shape: Sequence[int]) -> tuple[int, ...]:
    """Return `shape`, a scalar's as (1,)."""
    return tuple(shape) or (1,)
