"""Layers that an engine fuses into one matrix share one input scale and one second-level weight scale: the largest.

The groups are the checkpoint's `shared_inputs`. Models calibrated here share them already, so that the fake-quantized model
and the exported one are the same; this pass makes it true for checkpoints from elsewhere, and quantizes anew where it must.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from modelopt.core.errors import ExportError
from modelopt.numerics.reference import global_amax
from modelopt.torch.export.checkpoint import Checkpoint, Deferred, LayerRecord


def share_scales(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with equal scales in every group. Raises ExportError for packed weights that differ."""
    layers = dict(checkpoint.layers)
    for group in checkpoint.shared_inputs:
        members = [layers[name] for name in group if name in layers]
        for record in _share_inputs(_share_weights(members)):
            layers[record.name] = record
    return checkpoint.replace(layers=layers)


def _share_inputs(members: list[LayerRecord]) -> list[LayerRecord]:
    scales = [m.input_scale for m in members if m.input_scale is not None]
    if len(scales) != len(members) or len({m.input_format for m in members}) != 1 or len(members) < 2:
        return members
    largest = torch.stack([s.reshape(()) for s in scales]).amax()
    return [m if torch.equal(m.input_scale.reshape(()), largest) else replace(m, input_scale=largest) for m in members]


def _share_weights(members: list[LayerRecord]) -> list[LayerRecord]:
    formats = {m.weight_format for m in members}
    fmt = members[0].weight_format if members else None
    if len(members) < 2 or len(formats) != 1 or fmt is None or not fmt.needs_global:
        return members
    deferred = [m.weight for m in members if isinstance(m.weight, Deferred)]
    if len(deferred) != len(members):
        packed = [m.quantized() for m in members]
        if any(q is None or not torch.equal(q.scales[1], packed[0].scales[1]) for q in packed):
            names = ", ".join(m.name for m in members)
            raise ExportError(
                f"{names} are fused by engines but were packed with different weight scales. Quantize them together."
            )
        return members
    tops = [_global(w) for w in deferred]
    largest = torch.stack([t.reshape(()) for t in tops]).amax()
    return [
        m if torch.equal(t.reshape(()), largest) else replace(m, weight=replace(m.weight, global_amax=largest))
        for m, t in zip(members, tops, strict=True)
    ]


def _global(weight: Deferred) -> torch.Tensor:
    if weight.global_amax is not None:
        return weight.global_amax.float()
    if weight.amax is not None:
        return weight.amax.float().amax()
    return global_amax(weight.tensor.detach())
