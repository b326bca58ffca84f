"""`modelopt::histogram`: counts of |x| and the largest |x|, from one read.

    limit given   n equal bins over [0, limit):  bin = min(trunc(|x| * RN(n / limit)), n - 1); what lies beyond is in the last
    limit None    the bin is the leading log2(n) bits of |x| as float32: exponent, then mantissa; n is a power of two from 256 up

Schema: histogram(Tensor x, int num_bins, Tensor? limit=None) -> (Tensor, Tensor)

The logarithmic bins do not depend on the data: counts of batches and ranks add up, and no range must be known beforehand. With
2048 bins an octave has 8 of them; `edges(n)` are their lower ends. Infinities have their own, NaN is in the last one; equal bins
leave NaN out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modelopt.core.errors import ShapeError
from modelopt.torch.kernels.choice import forced
from modelopt.torch.kernels.histogram import cuda, reference
from modelopt.torch.kernels.library import define


def histogram(x: Tensor, num_bins: int = 2048, limit: Tensor | float | None = None) -> tuple[Tensor, Tensor]:
    """Return (counts of |x|, int64 [num_bins]; max |x|, a float32 scalar in which NaN wins) of a floating tensor of any shape.

    Args:
        x: the tensor.
        num_bins: of equal bins any number from 1 to 32768; of logarithmic ones a power of two from 256 to 32768.
        limit: where equal bins end, a positive number or a tensor with one element; None for logarithmic bins.

    Raises ShapeError for another number of bins.

    >>> histogram(torch.tensor([0.5, -1.5, 3.9, 9.0]), 4, 4.0)
    (tensor([1, 1, 0, 2]), tensor(9.))
    """
    if limit is not None and not isinstance(limit, Tensor):
        limit = torch.full((), float(limit), device=x.device)
    return torch.ops.modelopt.histogram(x, num_bins, limit)


def edges(num_bins: int) -> Tensor:
    """Return the lower ends of the logarithmic bins, float32 [num_bins]; the last ones are infinite and NaN.

    >>> edges(2048)[127 * 8 : 127 * 8 + 3]
    tensor([1.0000, 1.1250, 1.2500])
    """
    return (torch.arange(num_bins, dtype=torch.int32) << (32 - num_bins.bit_length())).view(torch.float32)


def _check(num_bins: int, limit: Tensor | None) -> None:
    power = num_bins & (num_bins - 1) == 0
    if not 0 < num_bins <= 32768 or (limit is None and not (power and num_bins >= 256)):
        raise ShapeError(
            f"A histogram has 1 to 32768 bins, without a limit a power of two from 256 to 32768 of them; got {num_bins}."
        )
    if limit is not None and limit.numel() != 1:
        raise ShapeError(f"The limit of a histogram is one number, got {tuple(limit.shape)}.")


def _run(x: Tensor, num_bins: int, limit: Tensor | None = None) -> tuple[Tensor, Tensor]:
    _check(num_bins, limit)
    limit = None if limit is None else limit.float().reshape(()).to(x.device)
    if x.is_cuda and not forced() and cuda.why_not(x, num_bins) is None:
        return cuda.histogram(x, num_bins, limit)
    return reference.histogram(x, num_bins, limit)


def _fake(x: Tensor, num_bins: int, limit: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return x.new_empty((num_bins,), dtype=torch.int64), x.new_empty((), dtype=torch.float32)


define("histogram(Tensor x, int num_bins, Tensor? limit=None) -> (Tensor, Tensor)", _run, _fake)
