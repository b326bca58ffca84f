"""Calibrate a model that has quantizers: find the range of every scale group, from the weights and from data.

    calibrate(model, "max", forward_loop)                   by algorithm, as a config names it
    max_calibrate, histogram_calibration, mse_calibrate     the same as verbs
    collect_statistics(model, forward_loop)                 gather once; `calibrate(..., statistics=...)` then needs no forward

All change the quantizers only, and return the model.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from modelopt.core.errors import CalibrationError
from modelopt.core.logging import Progress, null_progress, warn
from modelopt.torch.calibration import ForwardLoop, Statistic
from modelopt.torch.quantization.algorithms import ALGORITHMS as ALGORITHMS
from modelopt.torch.quantization.algorithms import check_algorithm as check_algorithm
from modelopt.torch.quantization.algorithms.base import Job, check_weights, observe, waiting_activations
from modelopt.torch.quantization.shared_scales import share_scales
from modelopt.torch.quantization.validate import shorten


def calibrate(
    model: nn.Module,
    algorithm: Any = "max",
    forward_loop: ForwardLoop | None = None,
    *,
    progress: Progress = null_progress,
    statistics: dict[str, Statistic] | None = None,
) -> nn.Module:
    """Find the ranges of all enabled quantizers of `model`, in place, and return it.

    Args:
        model: a model that has quantizers.
        algorithm: a name, {"method": name, ...settings}, a list of these that run in order, or None: then weights keep the
            ranges that they take from themselves, and activations are calibrated (by max) only if there is data.
        forward_loop: callable(model), or an iterable of batches (dict, tuple or tensor). Not run if nothing waits for it.
        progress: called as (done, total or None, what).
        statistics: quantizer name -> statistic (see `collect_statistics`); used where it fits, and filled with what is gathered.

    Raises:
        MissingAlgorithmError, UnknownNameError, ConfigError: the algorithm, before anything happens.
        CalibrationError: no data where it is needed, a quantizer that it never reached, values that are not finite.

    Example:
        >>> calibrate(model, "max", [batch_0, batch_1])  # doctest: +SKIP
    """
    todo = check_algorithm(algorithm)
    job = Job(forward_loop, progress, {} if statistics is None else statistics)
    check_weights(model)
    if not todo:
        _without_algorithm(model, job)
    for cls, config in todo:
        cls.run(model, config, job)
    share_scales(model)  # engines fuse these layers; sharing here makes the fake-quantized model the exported one
    return model


def _without_algorithm(model: nn.Module, job: Job) -> None:
    waiting = waiting_activations(model)
    if job.forward_loop is not None or (waiting and waiting.keys() <= job.statistics.keys()):
        observe(model, job)
    elif waiting:
        warn(
            f"No calibration algorithm and no data: {len(waiting)} static activation quantizers will take their range from each "
            f"tensor they see: {shorten(list(waiting))}. Call calibrate(model, 'max', forward_loop) before export.",
            stacklevel=4,
        )


def collect_statistics(
    model: nn.Module, forward_loop: ForwardLoop, *, algorithm: Any = "max", progress: Progress = null_progress
) -> dict[str, Statistic]:
    """Calibrate, and return the statistics by quantizer name: every other format that needs the same ones needs no forward.

    `modelopt.torch.calibration.save` and `load` keep them in a safetensors file.
    """
    statistics: dict[str, Statistic] = {}
    calibrate(model, algorithm, forward_loop, progress=progress, statistics=statistics)
    return statistics


def max_calibrate(model: nn.Module, forward_loop: ForwardLoop | None = None, **options: Any) -> nn.Module:
    """Calibrate by largest magnitudes. `options` are those of `calibrate`."""
    return calibrate(model, "max", forward_loop, **options)


def calibrate_amax(
    model: nn.Module, forward_loop: ForwardLoop | None = None, algorithm: Any = "max", **options: Any
) -> nn.Module:
    """Find the amax of every quantizer: `calibrate` with the data first."""
    return calibrate(model, algorithm, forward_loop, **options)


def mse_calibrate(
    model: nn.Module,
    forward_loop: ForwardLoop | None = None,
    *,
    start_multiplier: float = 0.25,
    stop_multiplier: float = 4.0,
    step_size: float = 0.1,
    fp8_scale_sweep: bool = False,
    **options: Any,
) -> nn.Module:
    """Calibrate weights by least squared error over multiples of their amax, or over all E4M3 block scales."""
    settings = {
        "method": "mse",
        "start_multiplier": start_multiplier,
        "stop_multiplier": stop_multiplier,
        "step_size": step_size,
        "fp8_scale_sweep": fp8_scale_sweep,
    }
    return calibrate(model, settings, forward_loop, **options)


def histogram_calibration(
    model: nn.Module,
    forward_loop: ForwardLoop | None = None,
    method: str = "entropy",
    *,
    num_bins: int = 4096,
    percentile: float = 99.99,
    **options: Any,
) -> nn.Module:
    """Calibrate per-tensor activations by histograms: `method` is "entropy", "percentile" or "mse"."""
    settings = {"method": "histogram", "threshold": method, "num_bins": num_bins, "percentile": percentile}
    return calibrate(model, settings, forward_loop, **options)


def smoothquant_calibration(model: nn.Module, forward_loop: ForwardLoop | None = None, **settings: Any) -> nn.Module:
    """SmoothQuant. Not part of this version: raises MissingAlgorithmError."""
    return calibrate(model, {"method": "smoothquant", **settings}, forward_loop)


def awq_calibration(model: nn.Module, forward_loop: ForwardLoop | None = None, **settings: Any) -> nn.Module:
    """AWQ. Not part of this version: raises MissingAlgorithmError."""
    return calibrate(model, {"method": "awq_lite", **settings}, forward_loop)


def require_calibrated(model: nn.Module) -> None:
    """Raise CalibrationError if an enabled activation quantizer that needs a range has none."""
    lacking = [name for name, q in waiting_activations(model).items() if q.amax is None]
    if lacking:
        raise CalibrationError(
            f"{len(lacking)} quantizers have no range yet: {shorten(lacking)}. Call calibrate with data first."
        )
