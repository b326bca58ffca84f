"""fp8_mlp by the law: the fake-quantized modules one after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from modelopt.torch.kernels.dequantize import dequantize
from modelopt.torch.kernels.fake_quantize import fake_quantize

HIDDEN = "e4m3[...]*f32"


def activate(x: Tensor, activation: str) -> Tensor:
    """Return the activation of `x`, in its dtype."""
    if activation.startswith("gelu"):
        return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    return F.relu(x) if activation == "relu" else F.silu(x)


def linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + bias for the E4M3 weight [N, K] with one scale, or one per row."""
    text = HIDDEN if scale.numel() == 1 else "e4m3[1,...]*f32"
    return F.linear(x, dequantize([codes, scale], text, torch.Size(codes.shape), x.dtype), bias)


def fp8_mlp(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    activation: str,
    input_format: str,
    input_amax: Tensor | None,
    hidden_amax: Tensor,
) -> Tensor:
    """Return second(q'(act(first(q(x))) [* up(q(x))])), [..., N2] in the dtype of `x`."""
    pairs = list(zip(weights[::2], weights[1::2], biases, strict=True))
    xq = fake_quantize(x, input_format, input_amax)
    h = activate(linear(xq, *pairs[0]), activation)
    if len(pairs) == 3:
        h = h * linear(xq, *pairs[1])
    return linear(fake_quantize(h, HIDDEN, hidden_amax), *pairs[-1])
