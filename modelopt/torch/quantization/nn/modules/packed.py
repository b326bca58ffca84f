"""A weight held as packed codes and scales, in buffers, and given back as values on demand.

bytes held = ceil(n * bits / 8) codes + scales      forward() = dequantize(codes, scales), equal to the fake-quantized weight
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modelopt.core.errors import CheckpointError
from modelopt.torch import kernels


class PackedTensor(nn.Module):
    """Codes and scales of one tensor. Buffers: `part_0` the codes, `part_1`... the scales (and zero points)."""

    def __init__(self, parts: Sequence[Tensor], format: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.format = format
        self.shape = tuple(int(n) for n in shape)
        self.dtype = dtype
        self.count = len(parts)
        for i, part in enumerate(parts):
            self.register_buffer(f"part_{i}", part)

    @property
    def parts(self) -> list[Tensor]:
        """Codes, scales and zero points, in the order of the quantize op."""
        return [getattr(self, f"part_{i}") for i in range(self.count)]

    def forward(self) -> Tensor:
        """Return the values, of the original shape and dtype."""
        return kernels.dequantize(self.parts, self.format, self.shape, self.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedTensor:
        """Move codes and scales between devices; a change of dtype changes the dtype of the values, never of the parts."""
        probe = fn(torch.empty(0, dtype=self.dtype))
        kept = self.parts
        super()._apply(fn, recurse)
        for i, part in enumerate(kept):
            moved = getattr(self, f"part_{i}")
            if moved.dtype != part.dtype:
                setattr(self, f"part_{i}", part.to(moved.device))
        if probe.dtype.is_floating_point:
            self.dtype = probe.dtype
        return self

    def describe(self) -> dict[str, Any]:
        """Return the structure as JSON: format, shape, dtype, and shape and dtype of each part."""
        parts = [{"shape": list(p.shape), "dtype": str(p.dtype).removeprefix("torch.")} for p in self.parts]
        return {"format": self.format, "shape": list(self.shape), "dtype": str(self.dtype).removeprefix("torch."), "parts": parts}

    @classmethod
    def from_description(cls, data: dict[str, Any], device: torch.device | str | None = None) -> PackedTensor:
        """Build the structure that `describe` named, with zeroed parts to load tensors into."""
        parts = [torch.zeros(p["shape"], dtype=dtype_of(p["dtype"]), device=device) for p in data["parts"]]
        return cls(parts, data["format"], data["shape"], dtype_of(data["dtype"]))

    def extra_repr(self) -> str:
        """Format, shape and bytes."""
        return f"{self.format}, shape={list(self.shape)}, bytes={sum(p.nbytes for p in self.parts)}"


def dtype_of(name: str) -> torch.dtype:
    """Return the torch dtype called `name`. Raises CheckpointError for anything else."""
    value = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(value, torch.dtype):
        raise CheckpointError(f"{name!r} is no dtype.")
    return value
