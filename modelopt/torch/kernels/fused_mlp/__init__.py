"""`modelopt::fp8_mlp`: Linear, activation and Linear on FP8 codes as one op, the intermediate written once, in FP8.

Schema: fp8_mlp(Tensor x, Tensor[] weights, Tensor?[] biases, str activation, str input_format, Tensor? input_amax,
                Tensor hidden_amax) -> Tensor

    h = act(q(x) W1^T + b1) [* (q(x) U^T + c)]      y = q'(h) W2^T + b2      q: fake_quantize to E4M3, q': the same with one scale

`weights` are uint8 codes [N, K] and float32 scales of each layer in turn (first, up if gated, second), one scale or one per row.
It has no gradient: it is for inference. `explain_mlp` says which kernel serves; README.md says how they work.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modelopt.core.errors import ConfigError, ShapeError
from modelopt.torch.kernels.choice import fast_module, forced
from modelopt.torch.kernels.fused_mlp import reference
from modelopt.torch.kernels.library import define

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
INPUT_FORMATS = ("e4m3[...]*f32", "e4m3[-1]~*f32")


def fp8_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: str,
    input_format: str,
    input_amax: Tensor | None,
    hidden_amax: Tensor,
) -> Tensor:
    """Return the output [..., N2] of two linear layers with an activation between them, in the dtype of `x` [..., K].

    Args:
        weights: codes and scale of the first layer, of the one whose output is multiplied (optional), of the second.
        biases: one for each layer, or None.
        activation: "relu", "gelu", "gelu_tanh" or "silu".
        input_format: E4M3 with one static scale, or a dynamic one per token ("e4m3[-1]~*f32").
        input_amax: the range of x for the static format.
        hidden_amax: the range of what the second layer reads.

    Raises ConfigError for an unknown activation or input format, ShapeError for weights that do not chain.

    >>> w = torch.ops.modelopt.quantize(torch.eye(32), "e4m3[...]*f32")
    >>> top = torch.tensor(4.0)
    >>> fp8_mlp(torch.ones(2, 32), [*w, *w], [None, None], "relu", "e4m3[...]*f32", top, top).shape
    torch.Size([2, 32])
    """
    if activation not in ACTIVATIONS:
        raise ConfigError(f'The activation is "{activation}"; fp8_mlp knows {", ".join(ACTIVATIONS)}.')
    if input_format not in INPUT_FORMATS:
        raise ConfigError(f'The input format is "{input_format}"; fp8_mlp takes {" or ".join(INPUT_FORMATS)}.')
    _check(x, weights, biases)
    return torch.ops.modelopt.fp8_mlp(x, list(weights), list(biases), activation, input_format, input_amax, hidden_amax)


def _check(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
    if len(biases) not in (2, 3) or len(weights) != 2 * len(biases):
        raise ShapeError(f"fp8_mlp takes two or three layers, got {len(weights)} tensors of weights and {len(biases)} biases.")
    shapes = [tuple(w.shape) for w in weights[::2]]
    hidden = shapes[0][0]
    chained = all(s == (hidden, x.shape[-1]) for s in shapes[:-1]) and shapes[-1][1:] == (hidden,)
    if not chained:
        raise ShapeError(f"Weights of {shapes} do not follow one another for an input of {tuple(x.shape)}.")


def explain_mlp(x: Tensor, weights: Sequence[Tensor]) -> str:
    """Return "triton", or "reference: " and the reason."""
    if forced():
        return "reference: MODELOPT_KERNELS=reference"
    if not x.is_cuda:
        return f"reference: the tensor is on {x.device}"
    kernel = fast_module("fused_mlp")
    reason = "Triton is not installed" if kernel is None else kernel.why_not(x, list(weights))
    return f"reference: {reason}" if reason else "triton"


def _run(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    activation: str,
    input_format: str,
    input_amax: Tensor | None,
    hidden_amax: Tensor,
) -> Tensor:
    kernel = fast_module("fused_mlp") if x.is_cuda and not forced() else None
    if kernel is not None and kernel.why_not(x, weights) is None:
        return kernel.fp8_mlp(x, weights, biases, activation, input_format, input_amax, hidden_amax)
    return reference.fp8_mlp(x, weights, biases, activation, input_format, input_amax, hidden_amax)


def _fake(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    activation: str,
    input_format: str,
    input_amax: Tensor | None,
    hidden_amax: Tensor,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weights[-2].shape[0]))


define(
    "fp8_mlp(Tensor x, Tensor[] weights, Tensor?[] biases, str activation, str input_format, Tensor? input_amax, "
    "Tensor hidden_amax) -> Tensor",
    _run,
    _fake,
)
