"""Weight-MSE calibration: activations by their largest magnitudes, weights by the least squared error (`calib/weights.py`)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from modelopt.core.config import Config
from modelopt.numerics import Format
from modelopt.torch.quantization.algorithms.base import Algorithm, Job, calibrate_weights, observe
from modelopt.torch.quantization.algorithms.max import make_observer
from modelopt.torch.quantization.calib.observers import Ranges
from modelopt.torch.quantization.calib.weights import mse_ranges, multipliers


class MseConfig(Config):
    """The multiples of the largest magnitude to try; or all E4M3 block scales, for the formats that have them."""

    step_size: float = 0.1
    start_multiplier: float = 0.25
    stop_multiplier: float = 4.0
    fp8_scale_sweep: bool = False
    distributed_sync: bool = True


class Mse(Algorithm):
    """Weights by least squared error."""

    name: ClassVar[str] = "mse"
    Config: ClassVar[type[Config]] = MseConfig

    @classmethod
    def run(cls, model: nn.Module, config: Any, job: Job) -> None:
        """Find activation ranges, then search those of the weights."""
        factors = multipliers(config.start_multiplier, config.stop_multiplier, config.step_size)

        def find(weight: Tensor, fmt: Format, tensor_amax: Tensor | None) -> Ranges | None:
            return mse_ranges(weight, fmt, factors, config.fp8_scale_sweep, tensor_amax)

        observe(model, job, make_observer)
        calibrate_weights(model, find, job)
