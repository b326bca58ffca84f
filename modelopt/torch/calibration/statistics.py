"""Statistics of a tensor that is seen in parts: what calibration gathers once and every format can use.

    AbsMax        a_g = max |x| over each block g                    MinMax     (min(x, 0), max(x, 0)) of each block
    ChannelRange  min, max and sum of each channel                   Histogram  counts of |x| in n bins of width 2^e / n

Each is a commutative monoid: `merge` of two parts is the statistic of the whole, whatever the order, so batches and ranks may
be split at will. The histogram keeps no data: its range is a power of two, and when a larger value comes, neighbouring
bins are added until it fits, which is exact because a bin of the new width is the union of old ones. Memory is O(bins).
Positions with weight 0 (padding) are not there: NaN or infinities in them change nothing.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from modelopt.core.errors import CalibrationError, CheckpointError
from modelopt.numerics import Block, parse
from modelopt.torch import kernels
from modelopt.torch.kernels.chunks import block_range

WHOLE = Block(("...",))
_MOST_BINS, _LEAST_EXPONENT = 32768, -100  # which the kernel can count: beyond, bins over range overflows


class Statistic:
    """Base: `reduce` one tensor, `absorb` the result, `merge` another statistic of the same kind."""

    kind: ClassVar[str] = ""
    fields: ClassVar[tuple[str, ...]] = ()

    def settings(self) -> dict[str, Any]:
        """What was asked for, as JSON data: statistics merge and are re-used only where it is equal."""
        return {}

    def reduce(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        """Return the statistic of one tensor `x` as tensors. `mask` (bool, broadcastable to `x`) says which positions count."""
        raise NotImplementedError

    def absorb(self, reduced: tuple[Tensor, ...]) -> None:
        """Add what `reduce` returned."""
        raise NotImplementedError

    def update(self, x: Tensor, token_weights: Tensor | None = None) -> None:
        """Add a tensor. `token_weights`: one number for each leading position of `x`, or broadcastable to it; 0 is ignored."""
        self.absorb(self.reduce(x.detach(), as_mask(x, token_weights)))

    @property
    def empty(self) -> bool:
        """Whether nothing was seen yet."""
        return getattr(self, self.fields[0]) is None

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as tensors."""
        return {name: getattr(self, name) for name in self.fields if getattr(self, name) is not None}

    def merge(self, other: Statistic) -> Self:
        """Add the statistic of other data. Raises CalibrationError if it was gathered in another way."""
        if (self.kind, self.settings()) != (other.kind, other.settings()):
            raise CalibrationError(
                f"Cannot merge statistics of different kinds: {self.kind} {self.settings()} and {other.kind} {other.settings()}."
            )
        if not other.empty:
            self.absorb(tuple(other.tensors().values()))
        return self

    def same_shape(self, mine: Tensor, new: Tensor) -> None:
        """Raise CalibrationError if the scale groups of two batches differ."""
        if mine.shape != new.shape:
            raise CalibrationError(
                f"The scale groups changed from {tuple(mine.shape)} to {tuple(new.shape)} between two batches. "
                "A static format needs groups that do not depend on the batch: use a per-tensor or a dynamic one."
            )


def as_mask(x: Tensor, token_weights: Tensor | None) -> Tensor | None:
    """Bring weights to a bool tensor that broadcasts to `x`: [B, T] for x [B, T, C] becomes [B, T, 1]."""
    if token_weights is None:
        return None
    mask = token_weights.to(x.device) != 0
    if mask.dim() < x.dim() and mask.shape == x.shape[: mask.dim()]:
        mask = mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim()))
    return mask


class AbsMax(Statistic):
    """The largest magnitude of each block, float32; a scalar for the whole tensor."""

    kind = "absmax"
    fields = ("values",)

    def __init__(self, block: Block = WHOLE) -> None:
        self.block = block
        self.values: Tensor | None = None

    def settings(self) -> dict[str, Any]:
        return {"block": str(self.block)}

    def reduce(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        if mask is not None:
            x = x.masked_fill(~mask, 0)
        if not self.block.whole:
            return (kernels.amax(x, f"i8{self.block}*f32"),)
        if x.numel() == 0:
            return (torch.zeros((), device=x.device),)
        low, high = torch.aminmax(x)
        return (torch.maximum(-low, high).float(),)

    def absorb(self, reduced: tuple[Tensor, ...]) -> None:
        (new,) = reduced
        if self.values is None:
            self.values = new.clone()
        else:
            self.same_shape(self.values, new)
            self.values = torch.maximum(self.values, new.to(self.values.device))


class MinMax(Statistic):
    """The smallest and largest value of each block, zero included, float32."""

    kind = "minmax"
    fields = ("low", "high")

    def __init__(self, block: Block = WHOLE) -> None:
        self.block = block
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def settings(self) -> dict[str, Any]:
        return {"block": str(self.block)}

    def reduce(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        if mask is not None:
            x = x.masked_fill(~mask, 0)
        return block_range(x, parse(f"u8{self.block}*f32+u8"))

    def absorb(self, reduced: tuple[Tensor, ...]) -> None:
        low, high = reduced
        if self.low is None or self.high is None:
            self.low, self.high = low.clone(), high.clone()
        else:
            self.same_shape(self.low, low)
            self.low = torch.minimum(self.low, low.to(self.low.device))
            self.high = torch.maximum(self.high, high.to(self.high.device))


class ChannelRange(Statistic):
    """Minimum, maximum and mean over `dims` (negative), for an affine bias: shape of `x` with those dimensions 1."""

    kind = "channel_range"
    fields = ("low", "high", "total", "count")

    def __init__(self, dims: tuple[int, ...] | list[int]) -> None:
        self.dims = tuple(dims)
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.total: Tensor | None = None
        self.count: Tensor | None = None

    def settings(self) -> dict[str, Any]:
        return {"dims": list(self.dims)}

    def reduce(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        if x.dim() < -min(self.dims):
            raise CalibrationError(f"A bias over dimensions {self.dims} needs a tensor of that rank, got shape {tuple(x.shape)}.")
        x = x.float()
        here = torch.ones((), dtype=torch.bool, device=x.device) if mask is None else mask
        low = torch.where(here, x, torch.inf).amin(self.dims, keepdim=True)
        high = torch.where(here, x, -torch.inf).amax(self.dims, keepdim=True)
        total = torch.where(here, x, 0).sum(self.dims, keepdim=True, dtype=torch.float64)
        count = here.expand_as(x).sum(self.dims, keepdim=True).double()
        return low, high, total, count

    def absorb(self, reduced: tuple[Tensor, ...]) -> None:
        low, high, total, count = reduced
        if self.low is None or self.high is None or self.total is None or self.count is None:
            self.low, self.high, self.total, self.count = (t.clone() for t in reduced)
            return
        self.same_shape(self.low, low)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.total, self.count = self.total + total, self.count + count

    def mean(self) -> Tensor:
        """Return the mean of each channel, float32 (0 where no position counted)."""
        assert self.total is not None and self.count is not None
        return (self.total / self.count.clamp(min=1)).float()

    def centered_amax(self) -> Tensor:
        """Return max |x - mean| over everything, a float32 scalar."""
        assert self.low is not None and self.high is not None and self.count is not None
        mean = self.mean()
        spread = torch.maximum(self.high - mean, mean - self.low)
        return torch.where(self.count > 0, spread, 0).amax()


class Histogram(Statistic):
    """Counts of |x| in `num_bins` equal bins over [0, 2^exponent), the smallest power of two that holds everything seen."""

    kind = "histogram"
    fields = ("counts", "exponent", "peak")

    def __init__(self, num_bins: int = 4096) -> None:
        if num_bins < 2 or num_bins & (num_bins - 1):
            raise CalibrationError(f"A histogram that grows by joining bins needs a power of two of them, got {num_bins}.")
        self.num_bins = num_bins
        self.counts: Tensor | None = None
        self.exponent: Tensor | None = None  # int64 scalar; the bins end at 2^exponent
        self.peak: Tensor | None = None  # the exact max |x|

    def settings(self) -> dict[str, Any]:
        return {"num_bins": self.num_bins}

    @property
    def limit(self) -> float:
        """The end of the last bin."""
        return 2.0 ** int(self.exponent) if self.exponent is not None else 0.0

    def centers(self) -> Tensor:
        """Return the middle of each bin, float32 [num_bins]."""
        return ((torch.arange(self.num_bins, dtype=torch.float64) + 0.5) * (self.limit / self.num_bins)).float()

    def reduce(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        x = x if mask is None else x.masked_select(mask.expand_as(x))
        by_kernel = x.is_cuda and x.numel() > 0 and self.num_bins <= _MOST_BINS and x.dtype != torch.float64
        magnitude = x if by_kernel else x.float().abs().flatten()
        peak = kernels.amax(x, f"i8{WHOLE}*f32").reshape(()).cpu() if by_kernel else _largest(magnitude)
        if not torch.isfinite(peak):  # the caller reports it by name; there is no bin for it
            return torch.zeros(self.num_bins, dtype=torch.int64), torch.tensor(-126), peak
        exponent = _exponent_above(float(peak))
        if by_kernel and exponent > _LEAST_EXPONENT:
            counts, _ = kernels.histogram(x, self.num_bins, 2.0**exponent)
        else:
            counts = _counted(magnitude.float().abs().flatten() if by_kernel else magnitude, self.num_bins, exponent)
        return counts.to(torch.int64).cpu(), torch.tensor(exponent), peak

    def absorb(self, reduced: tuple[Tensor, ...]) -> None:
        counts, exponent, peak = reduced
        if self.counts is None or self.exponent is None or self.peak is None:
            self.counts, self.exponent, self.peak = counts.clone(), exponent.clone(), peak.clone()
            return
        top = max(int(self.exponent), int(exponent))
        self.counts = _widened(self.counts, top - int(self.exponent)) + _widened(counts, top - int(exponent))
        self.exponent, self.peak = torch.tensor(top), torch.maximum(self.peak, peak)


def _largest(magnitude: Tensor) -> Tensor:
    return magnitude.amax().cpu() if magnitude.numel() else torch.zeros(())


def _counted(magnitude: Tensor, num_bins: int, exponent: int) -> Tensor:
    """Return the counts of `magnitude` (1-D) in equal bins over [0, 2^exponent)."""
    if magnitude.numel() == 0:
        return torch.zeros(num_bins)
    if magnitude.numel() < 1 << 24:
        return torch.histc(magnitude, num_bins, 0.0, 2.0**exponent)
    index = (magnitude * (num_bins / 2.0**exponent)).to(torch.int64).clamp_(max=num_bins - 1)
    return torch.bincount(index, minlength=num_bins)  # float32 counts are exact below 2^24 only


def _exponent_above(value: float) -> int:
    """Return the smallest e >= -126 with value < 2^e (at most 128)."""
    return max(math.frexp(value)[1], -126) if value > 0 else -126


def _widened(counts: Tensor, doublings: int) -> Tensor:
    """Return the counts over a range 2^doublings times as wide."""
    n = counts.numel()
    group = min(2**doublings, n)
    joined = counts.reshape(-1, group).sum(1)
    return torch.nn.functional.pad(joined, (0, n - joined.numel()))


KINDS: dict[str, type[Statistic]] = {"absmax": AbsMax, "minmax": MinMax, "channel_range": ChannelRange, "histogram": Histogram}


def gather(statistics: dict[str, Statistic]) -> None:
    """Merge the statistics of all ranks, in place; does nothing where `torch.distributed` does not run."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    parts: list[Any] = [None] * world
    mine = {name: {k: t.cpu() for k, t in s.tensors().items()} for name, s in statistics.items() if not s.empty}
    torch.distributed.all_gather_object(parts, mine)
    for other, part in enumerate(parts):
        for name, tensors in part.items() if other != rank else ():
            if name in statistics:
                own = statistics[name].tensors()
                device = next(iter(own.values())).device if own else "cpu"
                statistics[name].absorb(tuple(t.to(device) for t in tensors.values()))


def save(statistics: dict[str, Statistic], path: str | Path) -> None:
    """Write statistics (name -> statistic) to a safetensors file, so that another format needs no forward pass.

    Example:
        >>> save({"fc.input_quantizer": stat}, "statistics.safetensors")  # doctest: +SKIP
    """
    from safetensors.torch import save_file

    kinds = {name: {"kind": s.kind, **s.settings()} for name, s in statistics.items()}
    tensors = {f"{name}/{k}": t.contiguous().cpu() for name, s in statistics.items() for k, t in s.tensors().items()}
    save_file(tensors, str(path), metadata={"modelopt_statistics": json.dumps(kinds)})


def load(path: str | Path) -> dict[str, Statistic]:
    """Read what `save` wrote. Raises CheckpointError if the file is missing, corrupt or something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get("modelopt_statistics")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no file of calibration statistics that can be read: {error}") from error
    if text is None:
        raise CheckpointError(
            f"{path} is a safetensors file without calibration statistics (no modelopt_statistics in its header)."
        )
    try:
        return {name: _restored(name, dict(kind), tensors) for name, kind in json.loads(text).items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} holds calibration statistics of an unknown kind: {error}") from error


def _restored(name: str, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Statistic:
    cls = KINDS[settings.pop("kind")]
    if "block" in settings:
        settings["block"] = parse(f"i8{settings['block']}*f32").block
    stat = cls(**settings)
    for field in cls.fields:
        setattr(stat, field, tensors.get(f"{name}/{field}"))
    return stat
