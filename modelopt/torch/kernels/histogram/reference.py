"""The histogram of |x| by its law, in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 20


def histogram(x: Tensor, num_bins: int, limit: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (counts, int64 [num_bins]; max |x|, float32); see `kernels.histogram`."""
    counts = torch.zeros(num_bins, dtype=torch.int64, device=x.device)
    peak = torch.zeros((), device=x.device)
    flat = x.detach().reshape(-1)
    for i in range(0, flat.numel(), _CHUNK):
        magnitude = flat[i : i + _CHUNK].float().abs()
        peak = torch.maximum(peak, magnitude.amax())
        counts += torch.bincount(bins(magnitude, num_bins, limit), minlength=num_bins)
    return counts, peak


def bins(magnitude: Tensor, num_bins: int, limit: Tensor | None) -> Tensor:
    """Return the bin of each of `magnitude` (float32, 1-D), int64; NaN is in the last one, with a limit it is left out."""
    if limit is None:
        leading = (magnitude.view(torch.int32) >> (32 - num_bins.bit_length())).to(torch.int64)
        return torch.where(magnitude.isnan(), num_bins - 1, leading)
    place = magnitude * (torch.full_like(limit, num_bins) / limit)
    return place[~place.isnan()].clamp_(max=num_bins - 1).to(torch.int64)
