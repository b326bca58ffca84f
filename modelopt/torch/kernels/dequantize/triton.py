"""dequantize in one pass: bytes to codes to values, each block's scale read once per program."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from modelopt.numerics import Format, parse
from modelopt.numerics import reference as law
from modelopt.torch.kernels import triton_plan as planning
from modelopt.torch.kernels.dequantize import reference
from modelopt.torch.kernels.quantize.triton import packs
from modelopt.torch.kernels.triton_codes import decode, load_packed
from modelopt.torch.kernels.triton_launch import Launch
from modelopt.torch.kernels.triton_math import inside, places, tile

UNIT = {4: 2, 6: 8, 8: 1}  # codes that fill whole bytes


def why_not(codes: Tensor, fmt: Format) -> str | None:
    """Return why this kernel does not serve packed `codes`, or None."""
    if fmt.element.bits not in UNIT:
        return f"codes of {fmt.element.bits} bits; the kernel unpacks 4, 6 and 8"
    return "the tensor is empty" if codes.numel() == 0 else None


@triton.jit(do_not_specialize=["n", "width", "block", "parts", "blocks", "inner", "block_0", "block_1", "grid_1"])
def _dequantize(
    codes_ptr,
    y_ptr,
    scales_ptr,
    outer_ptr,
    zeros_ptr,
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
    UNIT: tl.constexpr,
    SIGNED: tl.constexpr,
    FORM: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    V: tl.constexpr,
    STEPS: tl.constexpr,
    MULTIPLE: tl.constexpr,
    KIND: tl.constexpr,
    MBITS: tl.constexpr,
    MIN_EXP: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE: tl.constexpr,
    I_KIND: tl.constexpr,
    S_KIND: tl.constexpr,
):
    width *= MULTIPLE
    block *= MULTIPLE
    w = places(C, V)
    W: tl.constexpr = C * V
    start, first, column, live, cell = tile(n, width, block, parts, blocks, inner, block_0, block_1, grid_1, 0, STEPS, G, W, FORM)
    exists = (cell < width) if FORM == "columns" else True if FORM == "tiles" else live
    if SCALE == "e8m0":
        code = tl.load(scales_ptr + cell, mask=exists, other=127).to(tl.int32)
        bits = tl.where(code == 0, 0x00400000, code << 23)
        scale = tl.where(code == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    elif SCALE == "e4m3" or (SCALE == "two" and I_KIND != "int"):
        scale = decode(tl.load(scales_ptr + cell, mask=exists, other=0).to(tl.int32), table_ptr, S_KIND, 3, 121, 8, True)
    else:
        scale = tl.load(scales_ptr + cell, mask=exists, other=1.0).to(tl.float32)
    if SCALE == "two":
        scale = scale * tl.load(outer_ptr).to(tl.float32)
    if ZERO:
        zero = tl.load(zeros_ptr + cell, mask=exists, other=0).to(tl.float32)
    units = tl.arange(0, C)[None, :, None] * (V // UNIT) + tl.arange(0, V // UNIT)[None, None, :]
    for step in range(STEPS):
        start, first, column, live, cells = tile(
            n, width, block, parts, blocks, inner, block_0, block_1, grid_1, step, STEPS, G, W, FORM
        )
        at, unit_first, unit_column, unit_live, unit_cell = tile(
            n, width // UNIT, block // UNIT, parts, blocks, inner, block_0, block_1, grid_1, step, STEPS, G, W // UNIT, FORM
        )
        there = inside(units, unit_first, unit_column, live, width // UNIT, block // UNIT, FORM)
        codes = load_packed(codes_ptr, at, there, BITS, C, G, V)
        value = decode(codes, table_ptr, KIND, MBITS, MIN_EXP, BITS, SIGNED)
        if ZERO:
            value = value - zero
        y = value * scale
        here = inside(w, first, column, live, width, block, FORM)
        tl.store(y_ptr + (start + w), y.to(y_ptr.dtype.element_ty), mask=here)


def dequantize(parts: list[Tensor], fmt: Format, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return the values of `parts`, contiguous. Raises ShapeError if parts are missing or of the wrong size."""
    q = law.Quantized.from_parts(list(parts), fmt, shape, dtype)
    given = fmt.is_two_level and not fmt.needs_global
    scale = law.effective_scale(q.scales, fmt) if given else q.scales[0]
    raw = scale.view(torch.uint8) if scale.dtype == torch.float8_e4m3fn else scale
    types = (dtype, raw.dtype, q.scales[-1].dtype, None if q.zero is None else q.zero.dtype)
    launch = _prepared(tuple(q.codes.shape), tuple(shape), types, scale.numel(), q.codes.device, fmt.text)
    if launch is None:
        return reference.dequantize(parts, fmt, shape, dtype)
    out = torch.empty(tuple(shape), dtype=dtype, device=q.codes.device)
    launch(
        q.codes.contiguous(),
        out,
        raw.contiguous(),
        q.scales[-1],
        raw if q.zero is None else q.zero.contiguous(),
        planning.nf4_table(out.device) if fmt.element.kind == "codebook" else out,
    )
    return out


@functools.lru_cache(maxsize=4096)
def _prepared(
    codes_shape: tuple[int, ...],
    tensor_shape: tuple[int, ...],
    types: tuple[torch.dtype | None, ...],
    scales: int,
    device: torch.device,
    text: str,
) -> Launch | None:
    """Return the launch for codes of one kind; None where the kernel does not serve them."""
    fmt, shape = parse(text), planning.prefix(tensor_shape)
    bits = fmt.element.bits
    inner = fmt.scale.element.name if isinstance(fmt.scale, Format) else "e4m3"
    if shape[-1] * bits % 8 or codes_shape != (*shape[:-1], shape[-1] * bits // 8) or types[0] not in planning.DTYPES:
        return None
    if inner != "e4m3" and fmt.needs_global and not inner.startswith(("i", "u")):
        return None
    plan = planning.layout(shape, fmt.block.sizes(shape))
    if isinstance(plan, str) or not packs(plan, UNIT.get(bits)) or scales != math.prod(fmt.grid(torch.Size(tensor_shape))):
        return None
    given = fmt.is_two_level and not fmt.needs_global
    constants = planning.scale_constants(fmt, device)
    constants = {
        **replace(plan, cuts=1).constants,
        **{name: constants[name] for name in ("KIND", "MBITS", "MIN_EXP", "ZERO", "I_KIND")},
        "SCALE": "given" if given else constants["SCALE"],
        "BITS": bits,
        "S_KIND": "e4m3" if planning.converts_float8(device) else "float",
        "UNIT": UNIT[bits],
        "SIGNED": fmt.element.min < 0,
    }
    return Launch(_dequantize, plan.programs[0], plan.arguments, constants)
