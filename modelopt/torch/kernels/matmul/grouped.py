"""`modelopt::quantized_grouped_linear`: the products of fused experts, whose matrices are held as packed codes.

Schema: quantized_grouped_linear(Tensor x, Tensor offsets, Tensor[] weight, str weight_format, SymInt n, Tensor? bias,
                                 str input_format, Tensor? input_amax) -> Tensor

    y[i] = q(x)[i] W_e^T + b_e    for offsets[e] <= i < offsets[e + 1]; rows behind offsets[E] are zero

x [T, K] sorted by expert, offsets int32 [E + 1] on x's device, b [E, n]. `weight` are the parts of `modelopt::quantize` for each
matrix [n, K], stacked (codes [E, n, bytes], scales [E, ...]), and `weight_format` is the format of one matrix. The gradient with
respect to x passes straight through q; the weight has none. `explain_grouped` says what serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modelopt.core.errors import ShapeError
from modelopt.numerics import Format, parse
from modelopt.torch.kernels.choice import fast_module, forced
from modelopt.torch.kernels.dequantize import dequantize
from modelopt.torch.kernels.fake_quantize import fake_quantize
from modelopt.torch.kernels.library import autograd, define, notation
from modelopt.torch.kernels.matmul.plan import check


def quantized_grouped_linear(
    x: Tensor,
    offsets: Tensor,
    weight: Sequence[Tensor],
    weight_format: Format | str,
    n: int,
    bias: Tensor | None = None,
    input_format: Format | str = "",
    input_amax: Tensor | None = None,
) -> Tensor:
    """Return q(x) times the matrix of each row's expert, [T, n] in the dtype of `x` [T, K]. Raises ShapeError.

    Args:
        offsets: where the rows of each expert begin, and where the last ones end: int32 [E + 1] on x's device.
        weight: the parts of each expert's packed matrix [n, K], stacked.
        bias: [E, n], or None.
        input_format: how x is quantized first; "" leaves it as it is.

    >>> matrices = [torch.ops.modelopt.quantize(torch.eye(32) * e, "i8[1,...]*f32") for e in (1, 2)]
    >>> parts = [torch.stack(p) for p in zip(*matrices)]
    >>> offsets = torch.tensor([0, 1, 3], dtype=torch.int32)
    >>> quantized_grouped_linear(torch.ones(3, 32), offsets, parts, "i8[1,...]*f32", 32)[:, 0]
    tensor([1., 2., 2.])
    """
    if x.dim() != 2 or offsets.dim() != 1 or offsets.dtype != torch.int32 or weight[0].shape[0] != offsets.shape[0] - 1:
        raise ShapeError(
            f"Wanted x [T, K], int32 offsets [E + 1] and parts stacked over E experts; got x {list(x.shape)}, offsets "
            f"{offsets.dtype} {list(offsets.shape)} and codes {list(weight[0].shape)}."
        )
    text = notation(input_format) if input_format else ""
    return torch.ops.modelopt.quantized_grouped_linear(
        x, offsets, list(weight), notation(weight_format), n, bias, text, input_amax
    )


def explain_grouped(x: Tensor, weight: Sequence[Tensor], weight_format: Format | str, n: int, input_format: str = "") -> str:
    """Return the name of the kernel that would serve this product, or "reference: " and the reason."""
    if forced():
        return "reference: MODELOPT_KERNELS=reference"
    if not x.is_cuda:
        return f"reference: the tensor is on {x.device}"
    if fast_module("matmul") is None:
        return "reference: Triton is not installed"
    fmt = parse(notation(weight_format))
    from modelopt.torch.kernels.matmul import experts

    reason = experts.why_not(x, list(weight), fmt, n)
    return f"reference: {reason}" if reason else experts.route(x, list(weight), fmt, n, input_format)


def reference(
    x: Tensor,
    offsets: Tensor,
    weight: list[Tensor],
    fmt: Format,
    n: int,
    bias: Tensor | None,
    input_format: str,
    input_amax: Tensor | None,
) -> Tensor:
    """The law: one expert after the other."""
    given = fake_quantize(x, input_format, input_amax) if input_format else x
    y, edges = x.new_zeros(x.shape[0], n), offsets.tolist()
    for e, (begin, end) in enumerate(zip(edges, edges[1:], strict=False)):
        if begin < end:
            matrix = dequantize([p[e] for p in weight], fmt, torch.Size((n, x.shape[-1])), x.dtype)
            y[begin:end] = torch.nn.functional.linear(given[begin:end], matrix, None if bias is None else bias[e])
    return y


def _run(
    x: Tensor,
    offsets: Tensor,
    weight: list[Tensor],
    weight_format: str,
    n: int,
    bias: Tensor | None,
    input_format: str,
    input_amax: Tensor | None,
) -> Tensor:
    fmt = parse(weight_format)
    check(x, weight[0], fmt, n, offsets.numel() - 1)
    if x.is_cuda and not forced() and fast_module("matmul") is not None:
        from modelopt.torch.kernels.matmul import experts

        if experts.why_not(x, weight, fmt, n) is None:
            with torch.cuda.device(x.device):
                return experts.product(x, offsets, weight, fmt, n, bias, input_format, input_amax)
    return reference(x, offsets, weight, fmt, n, bias, input_format, input_amax)


def _fake(
    x: Tensor,
    offsets: Tensor,
    weight: list[Tensor],
    weight_format: str,
    n: int,
    bias: Tensor | None,
    input_format: str,
    input_amax: Tensor | None,
) -> Tensor:
    return x.new_empty((x.shape[0], n))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offsets, weight, ctx.format, ctx.n, bias, _, _ = inputs
    ctx.save_for_backward(offsets, *weight)
    ctx.k, ctx.has_bias, ctx.count = x.shape[-1], bias is not None, len(weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    offsets, *weight = ctx.saved_tensors
    edges, experts = offsets.tolist(), weight[0].shape[0]
    to_x, to_bias = grad.new_zeros(grad.shape[0], ctx.k), grad.new_zeros(experts, ctx.n) if ctx.has_bias else None
    for e, (begin, end) in enumerate(zip(edges, edges[1:], strict=False)):
        if begin < end:
            parts = [p[e] for p in weight]
            to_x[begin:end] = grad[begin:end] @ torch.ops.modelopt.dequantize(parts, ctx.format, [ctx.n, ctx.k], grad.dtype)
            if to_bias is not None:
                to_bias[e] = grad[begin:end].sum(0)
    return to_x, None, [None] * ctx.count, None, None, to_bias, None, None


define(
    "quantized_grouped_linear(Tensor x, Tensor offsets, Tensor[] weight, str weight_format, SymInt n, Tensor? bias, "
    "str input_format, Tensor? input_amax) -> Tensor",
    _run,
    _fake,
)
autograd("quantized_grouped_linear", _backward, _setup_context)
