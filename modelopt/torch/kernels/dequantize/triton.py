"""dequantize in one pass: bytes to codes to values, each block's scale read once per program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from modelopt.numerics import Format
from modelopt.numerics import reference as law
from modelopt.torch.kernels import triton_plan as planning
from modelopt.torch.kernels.dequantize import reference
from modelopt.torch.kernels.quantize.triton import UNIT, _packs
from modelopt.torch.kernels.triton_codes import decode, load_packed
from modelopt.torch.kernels.triton_math import inside, tile


def why_not(codes: Tensor, fmt: Format) -> str | None:
    """Return why this kernel does not serve packed `codes`, or None."""
    if fmt.element.bits not in UNIT:
        return f"codes of {fmt.element.bits} bits; the kernel unpacks 4, 6 and 8"
    return "the tensor is empty" if codes.numel() == 0 else None


@triton.jit(do_not_specialize=["n", "parts", "blocks", "inner", "block_0", "block_1", "grid_1"])
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
    W: tl.constexpr,
    KIND: tl.constexpr,
    MBITS: tl.constexpr,
    MIN_EXP: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE: tl.constexpr,
    I_KIND: tl.constexpr,
    S_KIND: tl.constexpr,
):
    start, first, column, live, cell = tile(n, width, block, parts, blocks, inner, block_0, block_1, grid_1, G, W, FORM)
    at, unit_first, unit_column, _, _ = tile(
        n, width // UNIT, block // UNIT, parts, blocks, inner, block_0, block_1, grid_1, G, W // UNIT, FORM
    )
    units = tl.arange(0, W // UNIT)[None, :]
    there = inside(units, unit_first, unit_column, live, width // UNIT, block // UNIT, FORM)
    codes = load_packed(codes_ptr, at, there, BITS, G, W)
    exists = (cell < width) if FORM == "columns" else live
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
    value = decode(codes, table_ptr, KIND, MBITS, MIN_EXP, BITS, SIGNED)
    if ZERO:
        value = value - tl.load(zeros_ptr + cell, mask=exists, other=0).to(tl.float32)
    y = value * scale
    w = tl.arange(0, W)[None, :]
    here = inside(w, first, column, live, width, block, FORM)
    tl.store(y_ptr + (start + w), y.to(y_ptr.dtype.element_ty), mask=here)


def dequantize(parts: list[Tensor], fmt: Format, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return the values of `parts`, contiguous. Raises ShapeError if parts are missing or of the wrong size."""
    q = law.Quantized.from_parts(list(parts), fmt, shape, dtype)
    plan = _plan(q)
    if plan is None:
        return reference.dequantize(parts, fmt, shape, dtype)
    out = torch.empty(tuple(shape), dtype=dtype, device=q.codes.device)
    constants = planning.scale_constants(fmt, q.codes.device)
    given = fmt.is_two_level and not fmt.needs_global
    scale = law.effective_scale(q.scales, fmt) if given else q.scales[0]
    raw = scale.view(torch.uint8) if scale.dtype == torch.float8_e4m3fn else scale
    _dequantize[plan.programs](
        q.codes.contiguous(),
        out,
        raw.contiguous(),
        q.scales[-1],
        raw if q.zero is None else q.zero.contiguous(),
        planning.nf4_table(out.device) if fmt.element.kind == "codebook" else out,
        *plan.arguments,
        **plan.constants,
        **{name: constants[name] for name in ("KIND", "MBITS", "MIN_EXP", "ZERO", "I_KIND")},
        SCALE="given" if given else constants["SCALE"],
        BITS=fmt.element.bits,
        S_KIND="e4m3" if planning.converts_float8(out.device) else "float",
        UNIT=UNIT[fmt.element.bits],
        SIGNED=fmt.element.min < 0,
    )
    return out


def _plan(q: law.Quantized) -> planning.Layout | None:
    """Return the tiling of the tensor that `q` stands for; None where the kernel does not serve it."""
    shape, bits = planning.prefix(q.shape), q.format.element.bits
    wanted = (*shape[:-1], shape[-1] * bits // 8)
    inner = q.format.scale.element.name if isinstance(q.format.scale, Format) else "e4m3"
    if shape[-1] * bits % 8 or tuple(q.codes.shape) != wanted or q.dtype not in planning.DTYPES:
        return None
    if inner != "e4m3" and q.format.needs_global and not inner.startswith(("i", "u")):
        return None
    plan = planning.layout(shape, q.format.block.sizes(shape))
    if isinstance(plan, str) or not _packs(plan, bits) or q.scales[0].numel() != _cells(q):
        return None
    return plan


def _cells(q: law.Quantized) -> int:
    count = 1
    for n in q.format.grid(q.shape):
        count *= n
    return count
