"""quantize in one pass: codes are packed in registers, and the scale of a block is stored by the program that used it.

Widths of 4, 6 and 8 bits are packed by the kernel where rows fill whole bytes; otherwise it writes a byte per code and
torch packs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from modelopt.numerics import Format, packing
from modelopt.numerics import reference as law
from modelopt.torch.kernels import triton_plan as planning
from modelopt.torch.kernels.amax import triton as amax_kernel
from modelopt.torch.kernels.quantize import reference
from modelopt.torch.kernels.triton_codes import encode, store_packed
from modelopt.torch.kernels.triton_math import block_scale, inside, quotient_for, tile
from modelopt.torch.kernels.triton_ranges import better_of_two, outer_scale, tile_range

UNIT = {4: 2, 6: 8, 8: 1}  # codes that fill whole bytes


def why_not(x: Tensor, fmt: Format) -> str | None:
    """Return why this kernel does not serve `x`, or None."""
    return planning.unlike(x, fmt)


@triton.jit(do_not_specialize=["n", "parts", "blocks", "inner", "block_0", "block_1", "grid_1"])
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
    W: tl.constexpr,
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
    start, first, column, live, cell = tile(n, width, block, parts, blocks, inner, block_0, block_1, grid_1, G, W, FORM)
    w = tl.arange(0, W)[None, :]
    here = inside(w, first, column, live, width, block, FORM)
    x = tl.load(x_ptr + (start + w), mask=here, other=0.0).to(tl.float32)
    outer = outer_scale(global_ptr, TOP, OUTER, SCALE)
    exists = (cell < width) if FORM == "columns" else live
    amax, amin = tile_range(x, cell, exists, amax_ptr, amin_ptr, ZERO, FIND)
    if FIND and RULE == "46":
        amax = better_of_two(
            x, amax, outer, table_ptr, KIND, MBITS, MIN_EXP, E_MAX, E_MIN, EMAX, I_KIND, I_MBITS, I_MIN_EXP, I_MAX, I_SMALL
        )
    scale, stored, zero = block_scale(
        amax, amin, outer, table_ptr, E_MAX, E_MIN, EMAX, ZERO, SCALE, RULE, I_KIND, I_MBITS, I_MIN_EXP, I_MAX, I_SMALL
    )
    q = quotient_for(x, scale, zero, E_MAX, E_MIN, KIND, ZERO, SCALE)
    codes = encode(q, x, zero, table_ptr, KIND, MBITS, MIN_EXP, BITS)
    unit: tl.constexpr = UNIT if PACK else 1
    at, unit_first, unit_column, _, _ = tile(
        n, width // unit, block // unit, parts, blocks, inner, block_0, block_1, grid_1, G, W // unit, FORM
    )
    there = inside(tl.arange(0, W // unit)[None, :], unit_first, unit_column, live, width // unit, block // unit, FORM)
    store_packed(codes_ptr, at, codes, there, BITS if PACK else 8, G, W)
    if SCALE == "two":
        stored = encode(stored, stored, zero, table_ptr, I_KIND, I_MBITS, I_MIN_EXP, I_BITS)
    elif SCALE == "e8m0":
        stored = (stored.to(tl.int32, bitcast=True) >> 23) & 0xFF
    elif SCALE == "e4m3":
        stored = encode(stored, stored, zero, table_ptr, "float", 3, 121, 8)
    if FORM == "columns":
        once = exists & (tl.program_id(0) < parts)
    elif FORM == "flat":
        once = live & ((tl.program_id(0) * G + tl.arange(0, G)[:, None]) % parts == 0)
    else:  # programs that share a block store the same value
        once = live & (first == 0)
    tl.store(scales_ptr + cell, stored.to(scales_ptr.dtype.element_ty), mask=once)
    if ZERO:
        tl.store(zeros_ptr + cell, zero.to(tl.int32).to(zeros_ptr.dtype.element_ty), mask=once)


def quantize(
    x: Tensor, fmt: Format, amax: Tensor | None = None, global_amax: Tensor | None = None, amin: Tensor | None = None
) -> list[Tensor]:
    """Return [codes, *scales, (zero points)]. Raises ShapeError, FormatError."""
    law.check(x, fmt)
    found = amax_kernel.ranges(x, fmt, amax, global_amax, amin)
    plan = None if found is None else planning.layout_of(x, fmt, whole=amax is None and found[0] is None)
    if found is None or found[-1] or plan is None or isinstance(plan, str):
        return reference.quantize(x, fmt, amax, global_amax, amin)
    amax, global_amax, amin, _ = found
    x = x.contiguous()
    shape, bits = planning.prefix(x.shape), fmt.element.bits
    pack = shape[-1] * bits % 8 == 0 and _packs(plan, bits)
    last = shape[-1] * bits // 8 if pack else shape[-1]
    codes = torch.empty((*shape[:-1], last), dtype=torch.uint8, device=x.device)
    stored, zeros = _scale_tensors(x, fmt, global_amax)
    raw = [t.view(torch.uint8) if t.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else t for t in (*stored, zeros)]
    inner = fmt.scale.element.bits if isinstance(fmt.scale, Format) else 8
    _quantize[plan.programs](
        x,
        codes,
        raw[0],
        raw[-1],
        codes if amax is None else amax,
        codes if amin is None else amin,
        codes if global_amax is None else global_amax,
        planning.nf4_table(x.device) if fmt.element.kind == "codebook" else codes,
        *plan.arguments,
        **plan.constants,
        # wide programs: two of them a multiprocessor, so that one loads while the other stores
        **({"maxnreg": 64} if plan.warps >= 16 else {}),
        **planning.scale_constants(fmt, x.device),
        FIND=amax is None,
        BITS=bits,
        PACK=pack,
        UNIT=UNIT.get(bits, 1),
        I_BITS=inner,
    )
    parts = [codes if pack else packing.pack_bits(codes, bits), *stored]
    return [*parts, zeros] if fmt.zero is not None else parts


def _packs(plan: planning.Layout, bits: int) -> bool:
    unit = UNIT.get(bits)
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
