"""Histogram calibration: activations that have one static scale are clipped by entropy, percentile or squared error.

Other activations and all weights are calibrated as by `max`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import nn

from modelopt.core.config import Config
from modelopt.torch.quantization.algorithms.base import Algorithm, Job, bias_dims, calibrate_weights, make_max_observer, observe
from modelopt.torch.quantization.calib.histogram import HistogramObserver, serves
from modelopt.torch.quantization.calib.observers import Observer
from modelopt.torch.quantization.calib.weights import max_ranges
from modelopt.torch.quantization.nn.modules.tensor_quantizer import TensorQuantizer


class HistogramConfig(Config):
    """How the threshold is chosen, from how many bins (a power of two), and the percentile for that choice."""

    threshold: Literal["entropy", "percentile", "mse"] = "entropy"
    num_bins: int = 4096
    percentile: float = 99.99


class HistogramAlgorithm(Algorithm):
    """Activations by histograms, weights by their largest magnitudes."""

    name: ClassVar[str] = "histogram"
    Config: ClassVar[type[Config]] = HistogramConfig

    @classmethod
    def run(cls, model: nn.Module, config: Any, job: Job) -> None:
        """Find activation ranges in one run over the data, then weight ranges."""

        def make(quantizer: TensorQuantizer) -> Observer:
            if quantizer.format is not None and serves(quantizer.format) and bias_dims(quantizer) is None:
                return HistogramObserver(quantizer.format, config.threshold, config.num_bins, config.percentile)
            return make_max_observer(quantizer)

        observe(model, job, make)
        calibrate_weights(model, max_ranges, job)
