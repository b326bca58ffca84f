"""dequantize by the law (`modelopt.numerics.reference`), in chunks that fit the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from modelopt.numerics import Format, Quantized
from modelopt.torch.kernels import chunks


def dequantize(parts: list[Tensor], fmt: Format, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return the values of `parts`, contiguous. Raises ShapeError if parts are missing or of the wrong size."""
    q = Quantized.from_parts(list(parts), fmt, shape, dtype)
    return chunks.chunked_values(q) if q.codes.numel() else q.dequantize()
