"""Observers: a statistic together with the way from it to the ranges that a format needs.

format                                  ranges                                  statistic
e4m3[...]*f32, i8[1,...]*f32            amax of each block                      AbsMax(block)
e2m1[16]~*e4m3[...]*f32                 amax of the whole tensor                AbsMax([...])
e2m1[16]*e4m3[...]*f32                  amax of each block, and of the tensor   AbsMax(block)
u8[...]*f32+u8                          minimum and maximum of each block       MinMax(block)
any per-tensor one, with a static bias  bias = mean, amax of |x - bias|         ChannelRange(dims)
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from modelopt.core.errors import CalibrationError, ConfigError
from modelopt.numerics import Format, parse
from modelopt.torch.calibration import AbsMax, ChannelRange, MinMax, Statistic, TokenMask
from modelopt.torch.calibration.statistics import WHOLE, as_mask


@dataclass(frozen=True)
class Ranges:
    """What a quantizer is given: fields that are None are left as they are."""

    amax: Tensor
    global_amax: Tensor | None = None
    amin: Tensor | None = None
    bias: Tensor | None = None


class Observer(Protocol):
    """Sees tensors, and answers with an amax."""

    statistic: Statistic

    def update(self, x: Tensor, token_weights: Tensor | None = None) -> None:
        """Add a tensor; positions of weight 0 do not count."""

    def amax(self) -> Tensor:
        """Return the range found, float32. Raises CalibrationError if nothing was seen."""

    def ranges(self) -> Ranges:
        """Return everything the format needs."""

    def reset(self) -> None:
        """Forget everything."""


class _Base:
    statistic: Statistic

    def update(self, x: Tensor, token_weights: Tensor | None = None) -> None:
        """Add a tensor; positions of weight 0 do not count."""
        self.statistic.update(x, token_weights)

    def _seen(self) -> None:
        if self.statistic.empty:
            raise CalibrationError("This observer has seen no tensor. Run data through the model before asking for its amax.")

    def amax(self) -> Tensor:
        """Return the range found, float32."""
        return self.ranges().amax

    def ranges(self) -> Ranges:
        """Return everything the format needs."""
        raise NotImplementedError


class MaxObserver(_Base):
    """The largest magnitude, of each block where the format's ranges are static, of the tensor where only that is needed.

    Example:
        >>> o = MaxObserver("e4m3[...]*f32"); o.update(torch.tensor([1.0, -3.0])); o.amax()
        tensor(3.)
    """

    def __init__(self, fmt: Format | str = "i8[...]*f32") -> None:
        self.format = parse(fmt) if isinstance(fmt, str) else fmt
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.statistic = AbsMax(WHOLE if self.format.dynamic else self.format.block)

    def ranges(self) -> Ranges:
        """Return amax, and the tensor-wide one for a static two-level format."""
        self._seen()
        values = self.statistic.tensors()["values"]
        return Ranges(values, values.amax() if self.format.needs_global and not self.format.dynamic else None)


class MinMaxObserver(_Base):
    """The smallest and the largest value of each block, for formats with a zero point."""

    def __init__(self, fmt: Format | str) -> None:
        self.format = parse(fmt) if isinstance(fmt, str) else fmt
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.statistic = MinMax(self.format.block)

    def ranges(self) -> Ranges:
        """Return amax and amin."""
        self._seen()
        state = self.statistic.tensors()
        return Ranges(state["high"], amin=state["low"])


class AffineObserver(_Base):
    """Mean of each channel and the largest distance from it, in one pass, for a quantizer with a static bias.

    Raises ConfigError for formats whose range is neither the tensor's nor computed at each call.
    """

    def __init__(self, fmt: Format | str, dims: tuple[int, ...]) -> None:
        self.format = parse(fmt) if isinstance(fmt, str) else fmt
        if not (self.format.dynamic or self.format.block.whole) or self.format.zero is not None:
            raise ConfigError(f"A bias goes with a per-tensor or a dynamic symmetric format, not with {self.format}.")
        self.dims = dims
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.statistic = ChannelRange(self.dims)

    def ranges(self) -> Ranges:
        """Return amax of |x - bias| and the bias."""
        self._seen()
        assert isinstance(self.statistic, ChannelRange)
        return Ranges(self.statistic.centered_amax(), bias=self.statistic.mean())


class Watch:
    """What a quantizer's `observer` is during a run: the observer, the masks, and results shared with other quantizers.

    Layers that read one tensor (q, k and v; gate and up) reduce it once: `shared` holds, for each kind of statistic, the last
    tensor seen (weakly, with its version) and its result. Inference tensors have no version and are not shared.
    """

    def __init__(self, observer: Observer, tokens: TokenMask, heads_first: bool, shared: dict[Any, Any]) -> None:
        self.observer = observer
        self.tokens = tokens
        self.heads_first = heads_first
        self.shared = shared
        statistic = observer.statistic
        self.key = (statistic.kind, str(statistic.settings()), heads_first)

    def update(self, x: Tensor, token_weights: Tensor | None = None) -> None:
        """Add a tensor."""
        x = x.detach() if x.requires_grad else x
        version = -1 if x.is_inference() else x._version
        last = self.shared.get(self.key)
        if token_weights is None and version >= 0 and last is not None and last[0]() is x and last[1] == version:
            self.observer.statistic.absorb(last[2])
            return
        mask = self.tokens.for_tensor(x, self.heads_first) if token_weights is None else as_mask(x, token_weights)
        reduced = self.observer.statistic.reduce(x, mask)
        if token_weights is None:
            self.shared[self.key] = (weakref.ref(x), version, reduced)
        self.observer.statistic.absorb(reduced)


def nonfinite(ranges: Ranges) -> bool:
    """Whether NaN or an infinity was seen."""
    tensors = [t for t in (ranges.amax, ranges.amin, ranges.bias) if t is not None]
    return not all(bool(torch.isfinite(t).all()) for t in tensors)


MaxCalibrator = MaxObserver
