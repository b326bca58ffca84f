"""Scales must be finite and positive, and dequantized weights finite, or an engine would answer with NaN."""

from __future__ import annotations

import torch
from torch import Tensor

from modelopt.core.errors import ExportError
from modelopt.numerics.reference import Quantized, load_scale
from modelopt.torch.export.checkpoint import Checkpoint


def check_scale(name: str, scale: Tensor) -> None:
    """Raise ExportError, naming the tensor and the first index, unless every value of `scale` is finite and positive."""
    values = scale.detach().float().reshape(-1)
    bad = ~(values.isfinite() & (values > 0))
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise ExportError(
            f"The scale {name} (shape {tuple(scale.shape)}) is {float(values[index])} at flat index {index}; scales "
            "must be finite and positive. Calibrate with data that reaches this layer, or leave the layer unquantized."
        )


def check_quantized(name: str, q: Quantized) -> None:
    """Raise ExportError unless all scales of the packed weight `name` are finite and positive."""
    for level, (stored, fmt) in enumerate(zip(q.scales, q.format.levels, strict=True)):
        check_scale(f"{name}.weight_scale" + ("" if level == 0 else f"_{level + 1}"), load_scale(stored, fmt.stored_scale))


def check_finite(checkpoint: Checkpoint) -> Checkpoint:
    """Check the scales that are known already: inputs, keys and values, pre-quant scales. Weights are checked when packed."""
    for record in checkpoint.records():
        if record.input_scale is not None:
            check_scale(f"{record.name}.input_scale", record.input_scale)
        if record.pre_quant_scale is not None and not bool(torch.isfinite(record.pre_quant_scale).all()):
            raise ExportError(f"{record.name}.pre_quant_scale is not finite everywhere.")
    for kv in checkpoint.kv.values():
        for key, scale in (("k_scale", kv.k_scale), ("v_scale", kv.v_scale)):
            if scale is not None:
                check_scale(f"{kv.name}.{key}", scale)
    return checkpoint
