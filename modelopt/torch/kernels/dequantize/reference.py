"""dequantize by the law (`modelopt.numerics.reference`)."""

from __future__ import annotations

import torch
from torch import Tensor

from modelopt.numerics import Format, Quantized


def dequantize(parts: list[Tensor], fmt: Format, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return the values of `parts`, contiguous. Raises ShapeError if parts are missing or of the wrong size."""
    return Quantized.from_parts(list(parts), fmt, shape, dtype).dequantize().contiguous()
