"""Layers that engines fuse into one matrix product share their input scale and their second-level weight scale.

    q, k, v        gate, up        w1, w3        (siblings under one parent that read one tensor)

Engines compute fused layers with one scale. Sharing it in the model, at the end of calibration, makes the fake-quantized model
and the exported one the same. The shared range is the largest of the group. Which layers read one tensor is what calibration saw
(`trace.sharing`); the table of names speaks for layers that never ran, and tests hold it against the graph.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from modelopt.torch.quantization.nn.modules import QuantModule, TensorQuantizer
from modelopt.torch.trace.sharing import seen_inputs

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


def fused_groups(model: nn.Module, names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Return the groups among the layers `names` of `model`: those that read one tensor, by name only where nothing ran."""
    names = list(names)
    ran, groups = seen_inputs(model) or ((), ())
    known = set(names)
    seen = [tuple(n for n in group if n in known) for group in groups]
    return tuple(group for group in [*seen, *groups_of(n for n in names if n not in set(ran))] if len(group) > 1)


def share_scales(model: nn.Module) -> list[tuple[str, ...]]:
    """Give the quantizers of each group the group's largest range, in place; return the groups.

    Inputs: the range of static and two-level formats. Weights: the tensor-wide range of two-level formats only, because engines
    keep other weight scales apart. Groups whose members have different formats are left as they are.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantModule) and _quantizes(module)}
    groups = fused_groups(model, layers)
    for group in groups:
        modules = [layers[name] for name in group]
        _share([getattr(m, "input_quantizer", None) for m in modules])
        _share_weights(modules)
    return list(groups)


def _quantizes(module: QuantModule) -> bool:
    return any(isinstance(q, TensorQuantizer) and q.is_enabled for q in module.children())


def _share_weights(modules: list[QuantModule]) -> None:
    members = [list(m.quantized_tensors()) for m in modules]
    if any(len(one) != 1 or one[0].packed is not None for one in members):
        return
    quantizers = [one[0].weight_quantizer for one in members]
    formats = {q.format if isinstance(q, TensorQuantizer) and q.is_enabled else None for q in quantizers}
    fmt = formats.pop() if len(formats) == 1 else None
    if fmt is None or not fmt.needs_global:
        return
    for quantizer, one in zip(quantizers, members, strict=True):
        if quantizer.amax is None and fmt.dynamic:  # no algorithm ran; the range is what the weight itself has
            quantizer.amax = one[0].tensor.detach().abs().amax().float()
    _share(quantizers)


def _share(quantizers: list[nn.Module | None]) -> None:
    ready = [q for q in quantizers if isinstance(q, TensorQuantizer) and q.is_enabled and q.amax is not None]
    formats = {q.format for q in ready}
    if len(ready) < 2 or len(ready) != len(quantizers) or len(formats) != 1:
        return
    fmt = formats.pop()
    key = "_global_amax" if fmt is not None and fmt.needs_global and not fmt.dynamic else "_amax"
    values = [_scalar(q, key) for q in ready]
    if any(v is None for v in values):
        return
    largest = torch.stack([v.to(ready[0].amax.device) for v in values if v is not None]).amax()
    for quantizer, old in zip(ready, values, strict=True):
        like = getattr(quantizer, key)
        if like is None or (old is not None and not torch.equal(old, largest.to(old.device))):
            setattr(quantizer, key, largest.to(quantizer.amax.device).reshape(() if like is None else like.shape))


def _scalar(quantizer: TensorQuantizer, key: str) -> Tensor | None:
    value = getattr(quantizer, key)
    if value is None and key == "_global_amax":
        value = quantizer.amax.amax()
    return value.float().reshape(()) if value is not None and value.numel() == 1 else None
