"""`modelopt::fake_quantize`: x rounded to what a format can hold, with a straight-through gradient.

Schema: fake_quantize(Tensor x, str format, Tensor? amax, Tensor? global_amax, Tensor? amin, bool clip_grad) -> Tensor

The output has the shape and dtype of `x` and is contiguous. The gradient with respect to `x` passes through unchanged; with
`clip_grad` it is zero where x lies outside the representable range (the clipped straight-through estimator of PACT and LSQ).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modelopt.numerics import Format, parse
from modelopt.torch.kernels.choice import fast_kernel
from modelopt.torch.kernels.fake_quantize import reference
from modelopt.torch.kernels.library import autograd, define, notation


def fake_quantize(
    x: Tensor,
    fmt: Format | str,
    amax: Tensor | None = None,
    global_amax: Tensor | None = None,
    amin: Tensor | None = None,
    *,
    clip_grad: bool = False,
) -> Tensor:
    """Return `x` (any floating dtype and shape) rounded to `fmt`; see `modelopt.numerics.reference.fake_quantize`.

    >>> fake_quantize(torch.tensor([0.1, 5.3, 6.0]), "e2m1[...]*f32")
    tensor([0., 6., 6.])
    """
    return torch.ops.modelopt.fake_quantize(x, notation(fmt), amax, global_amax, amin, clip_grad)


def _run(
    x: Tensor,
    format: str,
    amax: Tensor | None = None,
    global_amax: Tensor | None = None,
    amin: Tensor | None = None,
    clip_grad: bool = False,
) -> Tensor:
    fmt = parse(format)
    kernel = fast_kernel("fake_quantize", x, fmt)
    return (kernel or reference).fake_quantize(x, fmt, amax, global_amax, amin)


def _fake(
    x: Tensor,
    format: str,
    amax: Tensor | None = None,
    global_amax: Tensor | None = None,
    amin: Tensor | None = None,
    clip_grad: bool = False,
) -> Tensor:
    return x.new_empty(x.shape)


def _run_mask(
    grad: Tensor,
    x: Tensor,
    format: str,
    amax: Tensor | None = None,
    global_amax: Tensor | None = None,
    amin: Tensor | None = None,
) -> Tensor:
    fmt = parse(format)
    kernel = fast_kernel("fake_quantize", x, fmt)
    return (kernel or reference).clipped_gradient(grad, x, fmt, amax, global_amax, amin)


def _fake_mask(
    grad: Tensor,
    x: Tensor,
    format: str,
    amax: Tensor | None = None,
    global_amax: Tensor | None = None,
    amin: Tensor | None = None,
) -> Tensor:
    return grad.new_empty(grad.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.format, amax, global_amax, amin, ctx.clip_grad = inputs
    if ctx.clip_grad:
        ctx.save_for_backward(x, amax, global_amax, amin)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.clip_grad:
        x, amax, global_amax, amin = ctx.saved_tensors
        grad = torch.ops.modelopt.clipped_gradient(grad, x, ctx.format, amax, global_amax, amin)
    return grad, None, None, None, None, None


define(
    "fake_quantize(Tensor x, str format, Tensor? amax=None, Tensor? global_amax=None, Tensor? amin=None, "
    "bool clip_grad=False) -> Tensor",
    _run,
    _fake,
)
define(
    "clipped_gradient(Tensor grad, Tensor x, str format, Tensor? amax=None, Tensor? global_amax=None, "
    "Tensor? amin=None) -> Tensor",
    _run_mask,
    _fake_mask,
)
autograd("fake_quantize", _backward, _setup_context)
