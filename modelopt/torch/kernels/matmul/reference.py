"""quantized_linear by the law: dequantize the weight, quantize-dequantize the input, multiply."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from modelopt.numerics import Format
from modelopt.torch.kernels.dequantize import dequantize
from modelopt.torch.kernels.fake_quantize import fake_quantize


def quantized_linear(
    x: Tensor, weight: list[Tensor], fmt: Format, n: int, bias: Tensor | None, input_format: str, input_amax: Tensor | None
) -> Tensor:
    """Return q(x) W^T + bias, [..., n] in the dtype of `x`."""
    values = dequantize(weight, fmt, torch.Size((n, x.shape[-1])), x.dtype)
    return F.linear(fake_quantize(x, input_format, input_amax) if input_format else x, values, bias)
