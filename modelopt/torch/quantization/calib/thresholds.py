"""Where to clip, given a histogram of |x| with counts c_i at centers m_i and bins of width w.

    percentile   the end of the first bin by which p percent of the counts lie
    mse          argmin_t sum_i c_i (m_i - Q_t(m_i))^2          Q_t: the format's own rounding under amax = t
    entropy      argmin_t KL(P_t || Q_t): P_t = the counts up to t, those beyond added to its last bin; Q_t = the same counts
                 without those beyond, spread evenly, among the non-empty bins, over the bins that round to one code

The candidates t are ends of bins, from the one that gives each code a bin of its own up to the last non-empty one.
Source: NVIDIA, "8-bit inference with TensorRT" (GTC 2017) for the entropy method, with the groups taken from the format's own
rounding instead of equal splits, so that it serves floats too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modelopt.numerics import Element, Format
from modelopt.numerics.reference import apply_scales, compute_scales
from modelopt.torch.calibration import Histogram

NUM_CANDIDATES = 256
_TINY = 1e-12


def percentile_amax(stat: Histogram, percentile: float) -> float:
    """Return the end of the first bin by which `percentile` percent of all values lie."""
    assert stat.counts is not None
    cumulative = stat.counts.cumsum(0).double()
    index = int(torch.searchsorted(cumulative, cumulative[-1] * (percentile / 100.0)))
    return (min(index, stat.num_bins - 1) + 1) * stat.limit / stat.num_bins


def candidates(stat: Histogram, start: int) -> list[int]:
    """Return the numbers of bins that a threshold may keep, at most about `NUM_CANDIDATES`, the last non-empty bin included."""
    assert stat.counts is not None
    last = int(stat.counts.nonzero()[-1]) + 1
    start = min(start, last)
    step = max(1, (last - start) // NUM_CANDIDATES)
    return sorted({*range(start, last, step), last})


def mse_amax(stat: Histogram, fmt: Format) -> float:
    """Return the threshold with the least squared error under `fmt` (one scale for the tensor)."""
    assert stat.counts is not None
    centers, counts = stat.centers(), stat.counts.double()
    width = stat.limit / stat.num_bins
    best, best_error = 0.0, float("inf")
    for kept in candidates(stat, 1):
        amax = torch.tensor(kept * width, dtype=torch.float32)
        rounded = apply_scales(centers, compute_scales(amax, fmt), fmt)
        error = float(((rounded - centers).double().square() * counts).sum())
        if error < best_error:
            best, best_error = float(amax), error
    return best


def entropy_amax(stat: Histogram, fmt: Format) -> float:
    """Return the threshold with the least KL divergence between the clipped counts and what `fmt` keeps of them."""
    assert stat.counts is not None
    counts, centers = stat.counts.double(), stat.centers()
    counts[0] = 0  # zeros are exact under every threshold, and would drown the rest
    width = stat.limit / stat.num_bins
    if not bool(counts.any()):
        return width
    beyond = counts.sum() - counts.cumsum(0)
    best, best_loss = width, float("inf")
    for kept in candidates(stat, 2 ** max(fmt.element.bits - 1, 1)):
        groups = code_groups(centers[:kept], kept * width, fmt.element)
        loss = divergence(counts[:kept], float(beyond[kept - 1]), groups)
        if loss < best_loss:
            best, best_loss = kept * width, loss
    return best


def code_groups(centers: Tensor, amax: float, element: Element) -> Tensor:
    """Return, for ascending `centers` [n], the index of the code that each rounds to under `amax`: int64, from 0."""
    codes = element.cast(centers / torch.tensor(amax / element.max, dtype=torch.float32))
    return torch.cat([codes.new_zeros(1), (codes[1:] != codes[:-1]).float()]).cumsum(0).long()


def divergence(counts: Tensor, outliers: float, groups: Tensor) -> float:
    """Return KL(P || Q) in nats: P is `counts` [n] with `outliers` in its last bin, Q the mean of each group's non-empty bins."""
    p = counts.clone()
    p[-1] += outliers
    filled = counts > 0
    total = torch.zeros(int(groups[-1]) + 1, dtype=torch.float64).index_add_(0, groups, counts)
    share = torch.zeros_like(total).index_add_(0, groups, filled.double())
    q = torch.where(filled, (total / share.clamp(min=1))[groups], 0.0)
    p, q = p / p.sum(), (q / q.sum().clamp(min=_TINY)).clamp(min=_TINY)
    return float(torch.where(p > 0, p * (p.clamp(min=_TINY) / q).log(), 0.0).sum())
