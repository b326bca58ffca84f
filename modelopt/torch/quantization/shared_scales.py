"""Layers that engines fuse into one matrix product share their input scale and their second-level weight scale.

    q, k, v        gate, up        w1, w3        (names of siblings under one parent)

Engines compute fused layers with one scale. Sharing it in the model, at the end of calibration, makes the fake-quantized model
and the exported one the same. The shared range is the largest of the group.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from modelopt.torch.quantization.nn.modules import QuantModule, TensorQuantizer

SIBLINGS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


def groups_of(names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Return the groups (two members or more) among dotted module `names`, in order of appearance.

    >>> groups_of(["a.q_proj", "a.k_proj", "a.o_proj", "b.q_proj"])
    (('a.q_proj', 'a.k_proj'),)
    """
    family = {leaf: index for index, leaves in enumerate(SIBLINGS) for leaf in leaves}
    found: dict[tuple[str, int], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        if leaf in family:
            found.setdefault((parent, family[leaf]), []).append(name)
    return tuple(tuple(members) for members in found.values() if len(members) > 1)


def share_scales(model: nn.Module) -> list[tuple[str, ...]]:
    """Give the quantizers of each group the group's largest range, in place; return the groups.

    Inputs: the range of static and two-level formats. Weights: the tensor-wide range of two-level formats only, because engines
    keep other weight scales apart. Groups whose members have different formats are left as they are.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantModule)}
    groups = groups_of(layers)
    for group in groups:
        _share([getattr(layers[name], "input_quantizer", None) for name in group], weights=False)
        _share([getattr(layers[name], "weight_quantizer", None) for name in group], weights=True)
    return list(groups)


def _share(quantizers: list[nn.Module | None], weights: bool) -> None:
    ready = [q for q in quantizers if isinstance(q, TensorQuantizer) and q.is_enabled and q.amax is not None]
    formats = {q.format for q in ready}
    if len(ready) < 2 or len(ready) != len(quantizers) or len(formats) != 1:
        return
    fmt = formats.pop()
    if fmt is None or (weights and not fmt.needs_global):
        return
    key = "_global_amax" if fmt.needs_global and not fmt.dynamic else "_amax"
    values = [_scalar(q, key) for q in ready]
    if any(v is None for v in values):
        return
    largest = torch.stack([v.to(ready[0].amax.device) for v in values if v is not None]).amax()
    for quantizer, old in zip(ready, values, strict=True):
        if old is not None and not torch.equal(old, largest.to(old.device)):
            like = getattr(quantizer, key)
            setattr(quantizer, key, largest.to(old.device).reshape(() if like is None else like.shape))


def _scalar(quantizer: TensorQuantizer, key: str) -> Tensor | None:
    value = getattr(quantizer, key)
    if value is None and key == "_global_amax":
        value = quantizer.amax.amax()
    return value.float().reshape(()) if value is not None and value.numel() == 1 else None
