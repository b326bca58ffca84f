"""Max calibration: the range of a scale group is the largest magnitude seen in it.

A quantizer whose `calibrator` is "histogram" gets a histogram instead, where its format has one static scale.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from modelopt.core.config import Config
from modelopt.torch.quantization.algorithms.base import Algorithm, Job, bias_dims, calibrate_weights, make_max_observer, observe
from modelopt.torch.quantization.calib.histogram import HistogramObserver, serves
from modelopt.torch.quantization.calib.observers import Observer
from modelopt.torch.quantization.calib.weights import max_ranges
from modelopt.torch.quantization.nn.modules.tensor_quantizer import TensorQuantizer


class MaxConfig(Config):
    """Max calibration has no settings of its own; statistics of all ranks are always merged."""

    distributed_sync: bool = True


class Max(Algorithm):
    """Weights and activations by their largest magnitudes."""

    name: ClassVar[str] = "max"
    Config: ClassVar[type[Config]] = MaxConfig

    @classmethod
    def run(cls, model: nn.Module, config: Any, job: Job) -> None:
        """Find activation ranges (one run over the data where any is needed), then weight ranges."""
        observe(model, job, make_observer)
        calibrate_weights(model, max_ranges, job)


def make_observer(quantizer: TensorQuantizer) -> Observer:
    """Return what the quantizer's own `calibrator` asks for: the largest magnitude, or a histogram (entropy)."""
    fmt = quantizer.format
    assert fmt is not None
    wants_histogram = quantizer.config is not None and quantizer.config.calibrator == "histogram"
    if wants_histogram and serves(fmt) and bias_dims(quantizer) is None:
        return HistogramObserver(fmt)
    return make_max_observer(quantizer)
