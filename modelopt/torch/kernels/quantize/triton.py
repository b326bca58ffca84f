"""quantize in one pass: codes are packed in registers, and the scale of a block is stored by the program that used it.

Widths of 4, 6 and 8 bits are packed by the kernel where rows and blocks fill whole words; otherwise it writes a byte per code
and torch packs.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from modelopt.numerics import Format, packing, parse
from modelopt.numerics import reference as law
from modelopt.torch.kernels import subbyte
from modelopt.torch.kernels import triton_plan as planning
from modelopt.torch.kernels.amax import triton as amax_kernel
from modelopt.torch.kernels.quantize import reference
from modelopt.torch.kernels.triton_butterflies import rotated_tile
from modelopt.torch.kernels.triton_codes import encode, one_per_byte, store_packed
from modelopt.torch.kernels.triton_launch import Launch
from modelopt.torch.kernels.triton_math import block_scale, inside, places, quotient_for, tile
from modelopt.torch.kernels.triton_ranges import better_of_two, outer_scale, tile_range

UNIT = {4: 8, 6: 16, 8: 1}  # codes that fill whole words (8 bits: bytes)
_PIECE = 32  # packed codes: a thread has whole pieces, so that it stores 16 bytes of them


def why_not(x: Tensor, fmt: Format) -> str | None:
    """Return why this kernel does not serve `x`, or None."""
    return planning.unlike(x, fmt)


def name_of(x: Tensor, fmt: Format) -> str:
    """Return which kernel serves `x`, "cuda" or "triton"."""
    return "cuda" if subbyte.preferred(x, fmt, True) else "triton"


@triton.jit(do_not_specialize=["n", "width", "block", "parts", "blocks", "inner", "block_0", "block_1", "grid_1"])
def _quantize(
    x_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    amax_ptr,
    amin_ptr,
    global_ptr,
    table_ptr,
    n,
    width,
    block,
    parts,
    blocks,
    inner,
    block_0,
    block_1,
    grid_1,
    BITS: tl.constexpr,
    PACK: tl.constexpr,
    UNIT: tl.constexpr,
    I_BITS: tl.constexpr,
    FIND: tl.constexpr,
    FORM: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    V: tl.constexpr,
    STEPS: tl.constexpr,
    MULTIPLE: tl.constexpr,
    ROTATE: tl.constexpr,
    KIND: tl.constexpr,
    MBITS: tl.constexpr,
    MIN_EXP: tl.constexpr,
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
    OUTER: tl.constexpr,
    TOP: tl.constexpr,
):
    width *= MULTIPLE
    block *= MULTIPLE
    w = places(C, V)
    W: tl.constexpr = C * V
    short: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    unit: tl.constexpr = UNIT if PACK else 1
    masked: tl.constexpr = FIND and not ZERO and RULE != "46" and KIND != "e4m3" and KIND != "e5m2"
    flip: tl.constexpr = KIND == "int" and E_MIN < 0 and BITS > 1
    units = tl.arange(0, W // unit)[None, None, :] if unit > 1 else w
    outer = outer_scale(global_ptr, TOP, OUTER, SCALE)
    if FORM == "columns":  # one scale for all steps
        start, first, column, live, cell = tile(
            n, width, block, parts, blocks, inner, block_0, block_1, grid_1, 0, STEPS, G, W, FORM
        )
        exists = cell < width
        amax, amin = tile_range(0.0, cell, exists, amax_ptr, amin_ptr, ZERO, False)
        scale, stored, zero = block_scale(
            amax, amin, outer, table_ptr, E_MAX, E_MIN, EMAX, ZERO, SCALE, RULE, I_KIND, I_MBITS, I_MIN_EXP, I_MAX, I_SMALL
        )
    for step in range(STEPS):
        start, first, column, live, cell = tile(
            n, width, block, parts, blocks, inner, block_0, block_1, grid_1, step, STEPS, G, W, FORM
        )
        here = inside(w, first, column, live, width, block, FORM)
        x = tl.load(x_ptr + (start + w), mask=here, other=0.0).to(tl.float32)
        if ROTATE > 0:
            x = rotated_tile(x, ROTATE, G, C, V).to(x_ptr.dtype.element_ty).to(tl.float32)
        if FORM != "columns":
            exists = True if FORM == "tiles" else live
            amax, amin = tile_range(x, cell, exists, amax_ptr, amin_ptr, ZERO, FIND)
            if FIND and RULE == "46":
                amax, q, chosen = better_of_two(
                    x,
                    amax,
                    outer,
                    table_ptr,
                    KIND,
                    MBITS,
                    MIN_EXP,
                    E_MAX,
                    E_MIN,
                    EMAX,
                    I_KIND,
                    I_MBITS,
                    I_MIN_EXP,
                    I_MAX,
                    I_SMALL,
                    short,
                )
            scale, stored, zero = block_scale(
                amax, amin, outer, table_ptr, E_MAX, E_MIN, EMAX, ZERO, SCALE, RULE, I_KIND, I_MBITS, I_MIN_EXP, I_MAX, I_SMALL
            )
        if not (FIND and RULE == "46"):
            q = quotient_for(x, scale, zero, E_MAX, E_MIN, KIND, ZERO, SCALE, masked, short)
        codes = encode(q, x, zero, table_ptr, KIND, MBITS, MIN_EXP, BITS, masked, ZERO, flip)
        at, unit_first, unit_column, unit_live, unit_cell = tile(
            n, width // unit, block // unit, parts, blocks, inner, block_0, block_1, grid_1, step, STEPS, G, W // unit, FORM
        )
        there = inside(units, unit_first, unit_column, live, width // unit, block // unit, FORM)
        if PACK and BITS == 6:
            pieces = (tl.program_id(0).to(tl.int64) * STEPS + step) * G
            store_packed(codes_ptr, pieces * (W // unit), codes, x, n * (W // unit), BITS, G, W, KIND, flip)
        elif PACK:
            store_packed(codes_ptr, at + units, codes, x, there, BITS, G, W, KIND, flip, unit == 8 and BITS == 8)
        else:
            if BITS < 8:
                codes = one_per_byte(codes, x, KIND, BITS, flip)
            store_packed(codes_ptr, at + units, codes, x, there, 8, G, W, KIND, flip and BITS == 8)
        kept = stored
        if SCALE == "two":
            kept = encode(stored, stored, 0.0, table_ptr, I_KIND, I_MBITS, I_MIN_EXP, I_BITS)
        elif SCALE == "e8m0":
            kept = (stored.to(tl.int32, bitcast=True) >> 23) & 0xFF
        elif SCALE == "e4m3":
            kept = encode(stored, stored, 0.0, table_ptr, "float", 3, 121, 8)
        if FORM == "columns":
            once = exists & (tl.program_id(0) < parts) & (step == 0)
        elif FORM == "flat":
            once = live & (((tl.program_id(0) * STEPS + step) * G + tl.arange(0, G)[:, None, None]) % parts == 0)
        elif FORM == "tiles":  # programs that share a block store the same value
            once = True
        else:
            once = live & (first == 0)
        tl.store(scales_ptr + cell, kept.to(scales_ptr.dtype.element_ty), mask=once)
        if ZERO:
            tl.store(zeros_ptr + cell, zero.to(tl.int32).to(zeros_ptr.dtype.element_ty), mask=once)


def quantize(
    x: Tensor, fmt: Format, amax: Tensor | None = None, global_amax: Tensor | None = None, amin: Tensor | None = None
) -> list[Tensor]:
    """Return [codes, *scales, (zero points)]. Raises ShapeError, FormatError."""
    law.check(x, fmt)
    parts = _launch(x, fmt, amax, global_amax, amin)
    return reference.quantize(x, fmt, amax, global_amax, amin) if parts is None else parts


def rotated(
    x: Tensor, size: int, fmt: Format, amax: Tensor | None, global_amax: Tensor | None, amin: Tensor | None
) -> list[Tensor] | None:
    """Return the parts of `x` with blocks of `size` transformed (see `kernels.hadamard`); None where one pass cannot do it."""
    law.check(x, fmt)
    piece = _PIECE if fmt.element.bits < 8 else 0
    if planning.rotates(x, fmt, size, amax, global_amax, amin, piece) is None:
        return None
    return _launch(x, fmt, amax, global_amax, amin, size.bit_length() - 1)


def _launch(
    x: Tensor, fmt: Format, amax: Tensor | None, global_amax: Tensor | None, amin: Tensor | None, rotate: int = 0
) -> list[Tensor] | None:
    found = amax_kernel.ranges(x, fmt, amax, global_amax, amin)
    if found is None or found[-1]:
        return None
    amax, global_amax, amin, _ = found
    x = x.contiguous()
    if rotate == 0 and subbyte.preferred(x, fmt, True):
        return subbyte.quantize(x, fmt, amax, global_amax)
    prepared = _prepared(x.shape, x.dtype, x.device, fmt.text, amax is None, rotate)
    if prepared is None:
        return None
    launch, pack, shape = prepared
    codes = torch.empty(shape, dtype=torch.uint8, device=x.device)
    stored, zeros = _scale_tensors(x, fmt, global_amax)
    raw = [t.view(torch.uint8) if t.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else t for t in (stored[0], zeros)]
    launch(
        x,
        codes,
        *raw,
        codes if amax is None else amax,
        codes if amin is None else amin,
        codes if global_amax is None else global_amax,
        planning.nf4_table(x.device) if fmt.element.kind == "codebook" else codes,
    )
    parts = [codes if pack else packing.pack_bits(codes, fmt.element.bits), *stored]
    return [*parts, zeros] if fmt.zero is not None else parts


@functools.lru_cache(maxsize=4096)
def _prepared(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, text: str, found: bool, rotate: int
) -> tuple[Launch, bool, tuple[int, ...]] | None:
    """Return (launch, whether it packs, shape of the codes) for tensors of one kind; `found`: the kernel finds the ranges."""
    fmt = parse(text)
    bits = fmt.element.bits
    sizes = fmt.block.sizes(shape) if len(shape) else ()
    plan = planning.layout(tuple(shape), sizes, found, piece=_PIECE if bits < 8 else 0)
    if isinstance(plan, str):
        return None
    plan = planning.shortened(plan, fmt, found, codes=True, rotated=rotate > 0)
    last = planning.prefix(shape)[-1]
    unit = 8 if plan.form == "columns" and bits == 8 and last % 8 == 0 else UNIT.get(bits)
    pack = last * bits % 8 == 0 and packs(plan, unit) and (bits != 6 or plan.form == "flat")
    constants = {
        **plan.constants,
        **planning.scale_constants(fmt, device),
        "FIND": found,
        "ROTATE": rotate,
        "BITS": bits,
        "PACK": pack,
        "UNIT": unit or 1,
        "I_BITS": fmt.scale.element.bits if isinstance(fmt.scale, Format) else 8,
    }
    width = last * bits // 8 if pack else last
    return Launch(_quantize, plan.programs[0], plan.arguments, constants), pack, (*planning.prefix(shape)[:-1], width)


def packs(plan: planning.Layout, unit: int | None) -> bool:
    """Return whether units of so many codes lie within the pieces, rows and blocks of a tiling."""
    if unit is None or unit > plan.W or plan.width % unit:
        return False
    return plan.form == "columns" or plan.blocks == 1 or plan.block % unit == 0


def _scale_tensors(x: Tensor, fmt: Format, global_amax: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """Return (scales level by level, zero points); the kernel fills the first level and the zero points."""
    grid = fmt.grid(x.shape)
    first = torch.empty(grid, dtype=fmt.stored_scale.dtype, device=x.device)
    zero = torch.empty(grid, dtype=fmt.element.dtype, device=x.device) if fmt.zero is not None else first
    if not isinstance(fmt.scale, Format) or global_amax is None:
        return [first], zero
    element = fmt.scale.stored_scale
    top = planning.scale_constants(fmt, x.device)["TOP"]
    ratio = global_amax / torch.full_like(global_amax, top)  # by a tensor: CUDA does not divide by Python numbers
    outer = law.store_scale(law.cast_scale(ratio, element), element)
    return [first, outer.reshape(fmt.scale.grid(grid))], zero
