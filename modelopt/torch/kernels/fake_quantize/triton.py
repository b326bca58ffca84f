"""fake_quantize and its clipped gradient in one pass over the tensor: each byte is read once and written once.

A block whose range is not given is reduced and rounded by the same program, up to `triton_plan.WIDEST` elements; the range of
a longer one (a whole tensor, a tile of rows) is found by the amax kernel first.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from modelopt.numerics import Format, parse
from modelopt.numerics import reference as law
from modelopt.torch.kernels import subbyte
from modelopt.torch.kernels import triton_plan as planning
from modelopt.torch.kernels.amax import triton as amax_kernel
from modelopt.torch.kernels.fake_quantize import reference
from modelopt.torch.kernels.triton_butterflies import rotated_tile
from modelopt.torch.kernels.triton_launch import Launch
from modelopt.torch.kernels.triton_math import block_scale, inside, places, round_to, tile
from modelopt.torch.kernels.triton_ranges import better_of_two, outer_scale, tile_range


def why_not(x: Tensor, fmt: Format) -> str | None:
    """Return why these kernels do not serve `x`, or None."""
    return planning.unlike(x, fmt)


def name_of(x: Tensor, fmt: Format) -> str:
    """Return which kernel serves `x`, "cuda" or "triton"."""
    return "cuda" if subbyte.preferred(x, fmt, False) else "triton"


@triton.jit(do_not_specialize=["n", "width", "block", "parts", "blocks", "inner", "block_0", "block_1", "grid_1"])
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
            amax, q, y = better_of_two(
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
        else:
            if FORM != "columns":
                scale, stored, zero = block_scale(
                    amax,
                    amin,
                    outer,
                    table_ptr,
                    E_MAX,
                    E_MIN,
                    EMAX,
                    ZERO,
                    SCALE,
                    RULE,
                    I_KIND,
                    I_MBITS,
                    I_MIN_EXP,
                    I_MAX,
                    I_SMALL,
                )
            if CLIP:
                grad = tl.load(grad_ptr + (start + w), mask=here, other=0.0)
                y = tl.where((x >= (E_MIN - zero) * scale) & (x <= (E_MAX - zero) * scale), grad, 0.0)
            else:
                y = round_to(x, scale, zero, table_ptr, E_MAX, E_MIN, KIND, MBITS, MIN_EXP, ZERO, SCALE, short)
        tl.store(y_ptr + (start + w), y.to(y_ptr.dtype.element_ty), mask=here)


def fake_quantize(
    x: Tensor, fmt: Format, amax: Tensor | None = None, global_amax: Tensor | None = None, amin: Tensor | None = None
) -> Tensor:
    """Return `x` rounded to `fmt`, contiguous. Raises ShapeError, FormatError."""
    law.check(x, fmt)
    out = _launch(x, None, fmt, amax, global_amax, amin)
    return reference.fake_quantize(x, fmt, amax, global_amax, amin) if out is None else out


def rotated(
    x: Tensor, size: int, fmt: Format, amax: Tensor | None, global_amax: Tensor | None, amin: Tensor | None
) -> Tensor | None:
    """Return `x` with blocks of `size` transformed (see `kernels.hadamard`), then rounded; None where one pass cannot do it."""
    law.check(x, fmt)
    if planning.rotates(x, fmt, size, amax, global_amax, amin) is None:
        return None
    return _launch(x, None, fmt, amax, global_amax, amin, size.bit_length() - 1)


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
    rotate: int = 0,
) -> Tensor | None:
    found = amax_kernel.ranges(x, fmt, amax, global_amax, amin)
    if found is None:
        return None
    x = x.contiguous()
    amax, global_amax, amin, given = found
    if grad is None and rotate == 0 and not given and subbyte.preferred(x, fmt, False):
        return subbyte.fake_quantize(x, fmt, amax, global_amax)
    like = x if grad is None else grad.contiguous()
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    launch = _prepared(x.shape, x.dtype, like.dtype, x.device, fmt.text, amax is None, given, grad is not None, rotate)
    if launch is None:
        return None
    table = planning.nf4_table(x.device) if fmt.element.kind == "codebook" else out
    launch(
        x,
        like,
        out,
        out if amax is None else amax,
        out if amin is None else amin,
        out if global_amax is None else global_amax,
        table,
    )
    return out


@functools.lru_cache(maxsize=4096)
def _prepared(
    shape: torch.Size,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    device: torch.device,
    text: str,
    found: bool,
    given: bool,
    clip: bool,
    rotate: int,
) -> Launch | None:
    """Return the launch for tensors of one kind; `found`: the kernel finds the ranges. The types tell kinds apart."""
    fmt = parse(text)
    plan = planning.layout(tuple(shape), fmt.block.sizes(shape) if len(shape) else (), found)
    if isinstance(plan, str):
        return None
    plan = planning.shortened(plan, fmt, found, rotated=rotate > 0, clipped=clip)
    constants = plan.constants | planning.scale_constants(fmt, device, given) | {"FIND": found, "CLIP": clip, "ROTATE": rotate}
    return Launch(_fake_quantize, plan.programs[0], plan.arguments, constants)
