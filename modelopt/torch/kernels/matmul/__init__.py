"""`modelopt::quantized_linear`: a linear layer whose weight is held as packed codes.

Schema: quantized_linear(Tensor x, Tensor[] weight, str weight_format, SymInt n, Tensor? bias, str input_format,
                         Tensor? input_amax) -> Tensor

    y = q(x) W^T + b      x [..., K], W = dequantize(weight) [n, K] in x's dtype, y [..., n];  q: fake_quantize, or nothing for ""

`weight` are the parts of `modelopt::quantize`. The product is accumulated in float32. The gradient with respect to x passes
straight through q; the weight has none. `explain_linear` says which kernel serves; README.md says how they work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modelopt.numerics import Format, Quantized, parse
from modelopt.torch.kernels import scaled_mm
from modelopt.torch.kernels.choice import fast_module, forced
from modelopt.torch.kernels.library import autograd, define, notation
from modelopt.torch.kernels.matmul import reference
from modelopt.torch.kernels.matmul.plan import check


def quantized_linear(
    x: Tensor,
    weight: Sequence[Tensor] | Quantized,
    weight_format: Format | str,
    n: int,
    bias: Tensor | None = None,
    input_format: Format | str = "",
    input_amax: Tensor | None = None,
) -> Tensor:
    """Return q(x) W^T + bias, [..., n] in the dtype of `x` [..., K].

    Args:
        weight: parts of the packed weight [n, K], or a `Quantized`.
        input_format: how x is quantized first; "" leaves it as it is.
        input_amax: the range of x for static formats (tensor-wide for dynamic two-level ones).

    >>> parts = torch.ops.modelopt.quantize(torch.eye(32), "i8[1,...]*f32")
    >>> quantized_linear(torch.ones(2, 32), parts, "i8[1,...]*f32", 32).shape
    torch.Size([2, 32])
    """
    parts = weight.parts if isinstance(weight, Quantized) else list(weight)
    return torch.ops.modelopt.quantized_linear(
        x, parts, notation(weight_format), n, bias, notation(input_format) if input_format else "", input_amax
    )


def explain_linear(x: Tensor, weight: Sequence[Tensor], weight_format: Format | str, n: int, input_format: str = "") -> str:
    """Return the name of the path that would serve this product, or "reference: " or "dequantize: " and the reason."""
    if forced():
        return "reference: MODELOPT_KERNELS=reference"
    if not x.is_cuda:
        return f"reference: the tensor is on {x.device}"
    fmt = parse(notation(weight_format))
    if scaled_mm.why_not(x, weight, fmt, n, input_format) is None:
        return "scaled_mm"
    kernel = fast_module("matmul")
    if kernel is None:
        return "reference: Triton is not installed"
    reason = kernel.why_not(x, list(weight), fmt, n)
    return f"dequantize: {reason}" if reason else kernel.route(x, fmt, n, input_format)


def _run(
    x: Tensor,
    weight: list[Tensor],
    weight_format: str,
    n: int,
    bias: Tensor | None,
    input_format: str,
    input_amax: Tensor | None,
) -> Tensor:
    fmt = parse(weight_format)
    check(x, weight[0], fmt, n)
    if x.is_cuda and not forced() and scaled_mm.why_not(x, weight, fmt, n, input_format) is None:
        return scaled_mm.block_scaled_linear(x, weight, fmt, n, bias, input_format, input_amax)
    kernel = fast_module("matmul") if x.is_cuda and not forced() else None
    if kernel is not None and kernel.why_not(x, weight, fmt, n) is None:
        with torch.cuda.device(x.device):
            return kernel.quantized_linear(x, weight, fmt, n, bias, input_format, input_amax)
    return reference.quantized_linear(x, weight, fmt, n, bias, input_format, input_amax)


def _fake(
    x: Tensor,
    weight: list[Tensor],
    weight_format: str,
    n: int,
    bias: Tensor | None,
    input_format: str,
    input_amax: Tensor | None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.format, ctx.n, bias, _, _ = inputs
    ctx.save_for_backward(*weight)
    ctx.k, ctx.has_bias, ctx.count = x.shape[-1], bias is not None, len(weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weight = torch.ops.modelopt.dequantize(list(ctx.saved_tensors), ctx.format, [ctx.n, ctx.k], grad.dtype)
    bias = grad.reshape(-1, ctx.n).sum(0) if ctx.has_bias else None
    return grad @ weight, [None] * ctx.count, None, None, bias, None, None


define(
    "quantized_linear(Tensor x, Tensor[] weight, str weight_format, SymInt n, Tensor? bias, str input_format, "
    "Tensor? input_amax) -> Tensor",
    _run,
    _fake,
)
autograd("quantized_linear", _backward, _setup_context)
