"""fake_quantize and its clipped gradient in one pass over the tensor: each byte is read once and written once.

A block whose range is not given is reduced and rounded by the same program, up to `triton_plan.WIDEST` elements; the range of
a longer one (a whole tensor, a tile of rows) is found by the amax kernel first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from modelopt.numerics import Format
from modelopt.numerics import reference as law
from modelopt.torch.kernels import triton_plan as planning
from modelopt.torch.kernels.amax import triton as amax_kernel
from modelopt.torch.kernels.fake_quantize import reference
from modelopt.torch.kernels.triton_math import block_scale, inside, round_to, tile
from modelopt.torch.kernels.triton_ranges import better_of_two, outer_scale, tile_range


def why_not(x: Tensor, fmt: Format) -> str | None:
    """Return why these kernels do not serve `x`, or None."""
    return planning.unlike(x, fmt)


@triton.jit(do_not_specialize=["n", "parts", "blocks", "inner", "block_0", "block_1", "grid_1"])
def _fake_quantize(
    x_ptr,
    grad_ptr,
    y_ptr,
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
    CLIP: tl.constexpr,
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
    scale, _, zero = block_scale(
        amax, amin, outer, table_ptr, E_MAX, E_MIN, EMAX, ZERO, SCALE, RULE, I_KIND, I_MBITS, I_MIN_EXP, I_MAX, I_SMALL
    )
    if CLIP:
        grad = tl.load(grad_ptr + (start + w), mask=here, other=0.0)
        y = tl.where((x >= (E_MIN - zero) * scale) & (x <= (E_MAX - zero) * scale), grad, 0.0)
    else:
        y = round_to(x, scale, zero, table_ptr, E_MAX, E_MIN, KIND, MBITS, MIN_EXP, ZERO, SCALE)
    tl.store(y_ptr + (start + w), y.to(y_ptr.dtype.element_ty), mask=here)


def fake_quantize(
    x: Tensor, fmt: Format, amax: Tensor | None = None, global_amax: Tensor | None = None, amin: Tensor | None = None
) -> Tensor:
    """Return `x` rounded to `fmt`, contiguous. Raises ShapeError, FormatError."""
    law.check(x, fmt)
    out = _launch(x, None, fmt, amax, global_amax, amin)
    return reference.fake_quantize(x, fmt, amax, global_amax, amin) if out is None else out


def clipped_gradient(
    grad: Tensor, x: Tensor, fmt: Format, amax: Tensor | None, global_amax: Tensor | None, amin: Tensor | None
) -> Tensor:
    """Return `grad` where x lies within the range that the scales can represent, and 0 elsewhere."""
    out = _launch(x, grad, fmt, amax, global_amax, amin)
    return reference.clipped_gradient(grad, x, fmt, amax, global_amax, amin) if out is None else out


def _launch(
    x: Tensor,
    grad: Tensor | None,
    fmt: Format,
    amax: Tensor | None,
    global_amax: Tensor | None,
    amin: Tensor | None,
) -> Tensor | None:
    found = amax_kernel.ranges(x, fmt, amax, global_amax, amin)
    if found is None:
        return None
    x = x.contiguous()
    like = x if grad is None else grad.contiguous()
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    amax, global_amax, amin, given = found
    plan = planning.layout_of(x, fmt, whole=amax is None)
    if isinstance(plan, str):
        return None
    constants = plan.constants | planning.scale_constants(fmt, x.device, given) | {"FIND": amax is None, "CLIP": grad is not None}
    if amax is None and fmt.rule == "46":
        constants["num_warps"] *= 2  # two roundings of a tile: at 32 elements a thread they need 186 registers
    table = planning.nf4_table(x.device) if fmt.element.kind == "codebook" else out
    _fake_quantize[plan.programs](
        x,
        like,
        out,
        out if amax is None else amax,
        out if amin is None else amin,
        out if global_amax is None else global_amax,
        table,
        *plan.arguments,
        **constants,
    )
    return out
