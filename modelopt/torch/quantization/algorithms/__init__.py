"""Calibration algorithms by name: one file each, found when first asked for.

An algorithm has a `name`, a `Config` (frozen, unknown keys refused) and `run(model, config, job)`. Names that are known and not
part of this version are errors that say so, before a model is touched.
"""

from __future__ import annotations

from typing import Any

from modelopt.core.errors import ConfigError, MissingAlgorithmError, did_you_mean
from modelopt.core.registry import Registry
from modelopt.torch.quantization.algorithms.base import Algorithm as Algorithm
from modelopt.torch.quantization.algorithms.base import Job as Job

_HERE = "modelopt.torch.quantization.algorithms"
ALGORITHMS: Registry[type[Algorithm]] = Registry(
    "calibration algorithm",
    max=f"{_HERE}.max:Max",
    histogram=f"{_HERE}.histogram:HistogramAlgorithm",
    mse=f"{_HERE}.mse:Mse",
)
MISSING: tuple[str, ...] = (
    *("awq", "awq_lite", "awq_clip", "awq_full", "smoothquant", "svdquant", "local_hessian", "gptq", "lsq"),
    *("nvfp4_act_headroom", "auto_quantize"),
)


def steps(algorithm: Any) -> list[tuple[str, dict[str, Any]]]:
    """Bring an algorithm (name, mapping with "method", list of these, None) to (name, settings) pairs; None is no pair.

    Raises ConfigError where it is none of these.
    """
    if algorithm is None:
        return []
    if isinstance(algorithm, list | tuple):
        return [pair for one in algorithm for pair in steps(one)]
    if isinstance(algorithm, str):
        return [(algorithm, {})]
    if isinstance(algorithm, dict):
        method = algorithm.get("method")
        if method is None or isinstance(method, str):
            rest = {k: v for k, v in algorithm.items() if k != "method"}
            if method is not None:
                return [(method, rest)]
            if "method" in algorithm and not rest:
                return []
    raise ConfigError(f'An algorithm is a name, a mapping with the key "method", a list of these, or None; got {algorithm!r}.')


def check_algorithm(algorithm: Any) -> list[tuple[type[Algorithm], Any]]:
    """Return (class, parsed settings) for each step. Touches no model.

    Raises MissingAlgorithmError (known, not in this version), UnknownNameError (did you mean), ConfigError (settings).

    Example:
        >>> [cls.name for cls, _ in check_algorithm({"method": "mse", "fp8_scale_sweep": True})]
        ['mse']
    """
    found = []
    for name, settings in steps(algorithm):
        if name in MISSING:
            known = ", ".join(ALGORITHMS.names())
            raise MissingAlgorithmError(
                f'The calibration algorithm "{name}" is not part of this version (it has {known}). '
                'The same formats work with {"algorithm": "max"}.'
            )
        if name not in ALGORITHMS:
            hint = did_you_mean(name, [*ALGORITHMS.names(), *MISSING])
            error = ALGORITHMS.unknown(name)
            raise type(error)(str(error) if not hint or hint in str(error) else f"{error}{hint}")
        cls = ALGORITHMS.get(name)
        found.append((cls, cls.Config.parse(settings, f'algorithm "{name}"')))
    return found
