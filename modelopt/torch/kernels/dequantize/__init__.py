"""`modelopt::dequantize`: packed codes and scales back to values.

Schema: dequantize(Tensor[] parts, str format, SymInt[] shape, ScalarType dtype) -> Tensor

`parts` are those of `modelopt::quantize`. The values equal those of `modelopt::fake_quantize` with the same ranges.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modelopt.numerics import Format, Quantized, parse
from modelopt.torch.kernels.choice import fast_kernel
from modelopt.torch.kernels.dequantize import reference
from modelopt.torch.kernels.library import define, notation


def dequantize(parts: Sequence[Tensor] | Quantized, fmt: Format | str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the values of `parts` (or of a `Quantized`) in `shape` and `dtype`."""
    tensors = parts.parts if isinstance(parts, Quantized) else list(parts)
    return torch.ops.modelopt.dequantize(tensors, notation(fmt), list(shape), dtype)


def _run(parts: list[Tensor], format: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    fmt = parse(format)
    kernel = fast_kernel("dequantize", parts[0], fmt)
    return (kernel or reference).dequantize(parts, fmt, torch.Size(shape), dtype)


def _fake(parts: list[Tensor], format: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    return parts[0].new_empty(shape, dtype=dtype)


define("dequantize(Tensor[] parts, str format, SymInt[] shape, ScalarType dtype) -> Tensor", _run, _fake)
