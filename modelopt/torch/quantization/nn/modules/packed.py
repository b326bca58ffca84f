"""A weight held as packed codes and scales, in buffers, and given back as values on demand.

bytes held = ceil(n * bits / 8) codes + scales      forward() = dequantize(codes, scales), equal to the fake-quantized weight

Codes are those of matrices [out, in], whatever the parameter's layout was; `stored()` gives the values in that layout.
`PackedExperts` holds the matrices of fused experts, each quantized by itself, with every part stacked over the experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modelopt.core.errors import CheckpointError
from modelopt.torch import kernels


class PackedTensor(nn.Module):
    """Codes and scales of one tensor. Buffers: `part_0` the codes, `part_1`... the scales (and zero points).

    `transposed`: the parameter was stored [in, out].
    """

    def __init__(
        self, parts: Sequence[Tensor], format: str, shape: Sequence[int], dtype: torch.dtype, transposed: bool = False
    ) -> None:
        super().__init__()
        self.format = format
        self.shape = tuple(int(n) for n in shape)
        self.dtype = dtype
        self.transposed = transposed
        self.count = len(parts)
        for i, part in enumerate(parts):
            self.register_buffer(f"part_{i}", part)

    @property
    def parts(self) -> list[Tensor]:
        """Codes, scales and zero points, in the order of the quantize op."""
        return [getattr(self, f"part_{i}") for i in range(self.count)]

    def forward(self) -> Tensor:
        """Return the values, of the original dtype, as [out, in]."""
        return kernels.dequantize(self.parts, self.format, self.shape, self.dtype)

    def stored(self) -> Tensor:
        """Return the values in the layout of the parameter that was packed."""
        return self().mT if self.transposed else self()

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the parameter that was packed."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape

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
        """Return the structure as JSON: format, shape, dtype, layout if it is not the usual one, shape and dtype of each part."""
        parts = [{"shape": list(p.shape), "dtype": str(p.dtype).removeprefix("torch.")} for p in self.parts]
        data = {"format": self.format, "shape": list(self.shape), "dtype": str(self.dtype).removeprefix("torch."), "parts": parts}
        return {**data, "transposed": True} if self.transposed else data

    @classmethod
    def from_description(cls, data: dict[str, Any], device: torch.device | str | None = None) -> PackedTensor:
        """Build the structure that `describe` named, with zeroed parts to load tensors into."""
        parts = [torch.zeros(p["shape"], dtype=dtype_of(p["dtype"]), device=device) for p in data["parts"]]
        known = (parts, data["format"], data["shape"], dtype_of(data["dtype"]), bool(data.get("transposed", False)))
        return PackedExperts(*known, data["stored"]) if "stored" in data else PackedTensor(*known)

    def extra_repr(self) -> str:
        """Format, shape and bytes."""
        return f"{self.format}, shape={list(self.shape)}, bytes={sum(p.nbytes for p in self.parts)}"


class PackedExperts(PackedTensor):
    """The matrices of fused experts, `shape` [E, out, in]; the first dimension of every part is the expert.

    `stored`: the shape of the parameter that was packed, where the experts' matrices are not stacked in three dimensions.
    """

    def __init__(
        self,
        parts: Sequence[Tensor],
        format: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        transposed: bool = False,
        stored: Sequence[int] | None = None,
    ) -> None:
        super().__init__(parts, format, shape, dtype, transposed)
        self._stored_shape = super().stored_shape if stored is None else tuple(int(n) for n in stored)

    @classmethod
    def of(cls, experts: Sequence[PackedTensor], transposed: bool, stored: Sequence[int]) -> PackedExperts:
        """Stack the packed matrices of all experts, which have one format."""
        first = experts[0]
        parts = [torch.stack(p) for p in zip(*(e.parts for e in experts), strict=True)]
        return cls(parts, first.format, (len(experts), *first.shape), first.dtype, transposed, stored)

    def expert(self, index: int) -> PackedTensor:
        """Return the matrix of one expert [out, in]; its parts are views."""
        return PackedTensor([p[index] for p in self.parts], self.format, self.shape[1:], self.dtype, self.transposed)

    def forward(self) -> Tensor:
        """Return the values [E, out, in], of the original dtype."""
        return torch.stack([self.expert(e)() for e in range(self.shape[0])])

    def stored(self) -> Tensor:
        """Return the values in the layout of the parameter that was packed."""
        return super().stored().reshape(self._stored_shape)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the parameter that was packed."""
        return self._stored_shape

    def describe(self) -> dict[str, Any]:
        """As of one tensor, and the shape of the parameter."""
        return {**super().describe(), "stored": list(self._stored_shape)}


def dtype_of(name: str) -> torch.dtype:
    """Return the torch dtype called `name`. Raises CheckpointError for anything else."""
    value = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(value, torch.dtype):
        raise CheckpointError(f"{name!r} is no dtype.")
    return value
