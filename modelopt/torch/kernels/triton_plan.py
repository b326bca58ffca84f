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
from modelopt.numerics.reference import FOUR_OVER_SIX_TOP

TILE = 4096  # elements of one program
SMALL_TILE = 2048  # the same where blocks are short, and each thread computes several scales
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

    @property
    def programs(self) -> tuple[int]:
        """The launch grid."""
        if self.form == "tiles":
            slices = self.count // (self.inner * self.blocks * self.parts)
            return (slices * -(-self.inner // self.G) * self.blocks * self.parts,)
        tiles = -(-self.count // self.G)
        return (tiles * self.parts if self.form == "columns" else tiles,)

    @property
    def whole_blocks(self) -> bool:
        """Whether a block lies in one tile row, so that one program sees all of it."""
        return self.form in ("flat", "rows") and self.parts == 1

    @property
    def arguments(self) -> tuple[int, ...]:
        """The run-time arguments of `triton_math.tile`."""
        return (self.count, self.width, self.block, self.parts, self.blocks, self.inner, self.block_0, self.block_1, self.grid_1)

    @property
    def warps(self) -> int:
        """Warps of one program: 32 elements a thread."""
        return max(1, min(32, self.G * self.W // 1024))

    @property
    def constants(self) -> dict[str, Any]:
        """The compile-time arguments of the tiling, and the launch options."""
        return {"FORM": self.form, "G": self.G, "W": self.W, "num_warps": self.warps, "enable_fp_fusion": False}


@functools.lru_cache(maxsize=4096)
def layout(shape: tuple[int, ...], sizes: tuple[int, ...], whole: bool = False, tile: int = TILE) -> Layout | str:
    """Return the tiling of a tensor of `shape` with blocks of `sizes`, or why there is none.

    `whole` asks for tiles that hold whole blocks where that can be (up to WIDEST elements).
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
        return Layout("columns", rows, width, w, -(-width // w), 1, 1, 1, 1, 1, max(tile // w, 1), w)
    (n0, b0), (n1, b1) = ((1, 1), (1, 1), *zip(shape[:-1], sizes[:-1], strict=True))[-2:]
    power = triton.next_power_of_2(block)
    w = min(power, WIDEST if whole and power <= WIDEST else tile)
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


def layout_of(x: Tensor, fmt: Format, whole: bool = False) -> Layout | str:
    """Return the tiling of `x` (not empty) under the blocks of `fmt`, or why there is none."""
    return layout(tuple(x.shape), fmt.block.sizes(x.shape) if x.dim() else (), whole)


def retiled(plan: Layout, tile: int) -> Layout:
    """Return the layout with about `tile` elements a program instead (not for form "tiles")."""
    return replace(plan, G=max(tile // plan.W, 1))


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
    """Return the 15 borders and 16 values of NF4 as one float32 tensor."""
    table = torch.tensor(NF4_TABLE, dtype=torch.float32)
    return torch.cat([(table[1:] + table[:-1]) / 2, table]).to(device)


def prefix(shape: Sequence[int]) -> tuple[int, ...]:
    """Return `shape`, a scalar's as (1,)."""
    return tuple(shape) or (1,)
