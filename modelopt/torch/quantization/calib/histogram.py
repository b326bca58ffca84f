"""Histogram calibration: clip where it costs least, from a histogram that holds no data.

The observer keeps a `Histogram` (O(bins) memory, range grown by joining bins) and asks `thresholds.py` for the amax.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from modelopt.core.errors import ConfigError, did_you_mean
from modelopt.numerics import Format, parse
from modelopt.torch.calibration import Histogram
from modelopt.torch.quantization.calib.observers import Ranges, _Base
from modelopt.torch.quantization.calib.thresholds import entropy_amax, mse_amax, percentile_amax

Method = Literal["entropy", "percentile", "mse"]
METHODS = ("entropy", "percentile", "mse")


class HistogramObserver(_Base):
    """Amax of a per-tensor format, chosen by `method`.

    Args:
        fmt: a format with one static scale for the tensor.
        method: "entropy" (least KL divergence), "percentile" (of |x|), "mse" (least squared error).
        num_bins: a power of two.
        percentile: in percent, for that method.

    Example:
        >>> o = HistogramObserver("i8[...]*f32", "percentile", percentile=50.0)
        >>> o.update(torch.arange(100.0)); bool(45 < o.amax() < 55)
        True
    """

    def __init__(
        self, fmt: Format | str = "i8[...]*f32", method: str = "entropy", num_bins: int = 4096, percentile: float = 99.99
    ) -> None:
        self.format = parse(fmt) if isinstance(fmt, str) else fmt
        if not serves(self.format):
            raise ConfigError(f"A histogram calibrates formats with one static scale for the tensor, not {self.format}.")
        if method not in METHODS:
            raise ConfigError(
                f'There is no histogram method "{method}".{did_you_mean(method, METHODS)} Known: {", ".join(METHODS)}.'
            )
        if not 0 < percentile <= 100:
            raise ConfigError(f"The percentile must be above 0 and at most 100, got {percentile}.")
        self.method, self.num_bins, self.percentile = method, num_bins, percentile
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.statistic = Histogram(self.num_bins)

    def ranges(self) -> Ranges:
        """Return amax by the method given at construction."""
        return Ranges(self.compute_amax(self.method))

    def compute_amax(self, method: str | None = None, percentile: float | None = None) -> Tensor:
        """Return amax by another method, from the same histogram; a float32 scalar, never above the largest |x|."""
        self._seen()
        assert isinstance(self.statistic, Histogram)
        stat, method = self.statistic, method or self.method
        peak = stat.peak
        assert peak is not None and stat.counts is not None
        if not bool(torch.isfinite(peak)) or not bool(stat.counts.any()):
            return peak
        if method == "percentile":
            found = percentile_amax(stat, percentile or self.percentile)
        else:
            found = (entropy_amax if method == "entropy" else mse_amax)(stat, self.format)
        return torch.minimum(torch.tensor(found, dtype=torch.float32), peak)


def serves(fmt: Format) -> bool:
    """Whether a histogram of |x| can choose the range of `fmt`."""
    return fmt.block.whole and not fmt.dynamic and fmt.zero is None and not fmt.is_two_level


HistogramCalibrator = HistogramObserver


def histogram_calibration(model: Any, forward_loop: Any, method: str = "entropy", **options: Any) -> Any:
    """Calibrate `model` with histograms; see `modelopt.torch.quantization.model_calib.histogram_calibration`."""
    from modelopt.torch.quantization import model_calib

    return model_calib.histogram_calibration(model, forward_loop, method, **options)
