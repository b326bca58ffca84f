"""What can be known to be wrong before a model is changed: formats, shapes, weights that are not finite, missing data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from modelopt.core.errors import CalibrationError, FormatError, ModelOptError
from modelopt.torch.quantization.config import QuantizeConfig
from modelopt.torch.quantization.conversion import PlannedModule

Decisions = dict[str, tuple[Any, bool | None]]


def check(planned: Iterable[PlannedModule], decisions: Decisions, config: QuantizeConfig, has_data: bool) -> None:
    """Raise the first reason for which quantization with these decisions cannot work. Nothing is changed.

    ConfigError (a key that nothing serves), FormatError (a shape that cannot take a format), CalibrationError (NaN or infinity in
    a weight; activations that need data where none is given).
    """
    weights: set[str] = set()
    for p in planned:
        for quantizer, tensor_name, tensor, expert in p.base.weights_of(p.module):
            name = p.full_name(quantizer)
            weights.add(name)
            cfgs, enable = decisions.get(name, (None, None))
            if enable and cfgs:
                full = p.full_name(tensor_name) + ("" if expert is None else f"[{expert}]")
                _check_weight(full, tensor, cfgs)
    waiting = []
    for name, (cfgs, enable) in decisions.items():
        if not enable or not cfgs:
            continue
        for cfg in cfgs:
            try:
                cfg.check_served()
            except ModelOptError as error:
                raise type(error)(f"{name}: {error}") from error
            if name not in weights and cfg.to_format().needs_calibration and cfg.fixed_amax is None:
                waiting.append(name)
    if waiting and config.algorithm is not None and not has_data:
        raise CalibrationError(
            f"{len(waiting)} activation quantizers need data to find their range, and no forward_loop was given: "
            f"{shorten(waiting)}. Pass forward_loop (a function that runs the model on data, or an iterable of batches), "
            "or choose dynamic activations."
        )


def _check_weight(name: str, tensor: Tensor, cfgs: Iterable[Any]) -> None:
    for cfg in cfgs:
        reason = cfg.to_format().why_not(tuple(tensor.shape))
        if reason is not None:
            pattern = f"*{name.rpartition('.')[0]}*" if "." in name else "*"
            raise FormatError(
                f"{name} of shape {list(tensor.shape)} cannot be held as {cfg.to_format()}: {reason}. "
                f'Exclude it with {{"quantizer_name": "{pattern}", "enable": False}}, or choose another format.'
            )
    check_finite(name, tensor)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise CalibrationError, naming the tensor and the first index, if it holds NaN or infinity."""
    tensor = tensor.detach()
    if tensor.device.type == "meta" or tensor.numel() == 0 or not tensor.is_floating_point():
        return
    low, high = torch.aminmax(tensor)  # one pass, no copy; NaN comes through
    if math.isfinite(float(low)) and math.isfinite(float(high)):
        return
    flat = int((~torch.isfinite(tensor)).reshape(-1).to(torch.uint8).argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat), tensor.shape)]
    raise CalibrationError(f"{name} holds {float(tensor[tuple(index)])} at index {index}. Repair the weights before quantizing.")


def shorten(names: list[str], limit: int = 6) -> str:
    """Return the first names of a list, and how many more there are."""
    more = f", ... and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
