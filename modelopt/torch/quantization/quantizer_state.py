"""The structure of the quantizers of a model as JSON: what must exist before tensors can be loaded.

    {"fc.weight_quantizer": {"quantizers": [{"format", "enabled", "config", "clip_grad", "buffers": {"_amax": {...}}}]}}

More than one entry is a `SequentialQuantizer`; a buffer has a shape and a dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from modelopt.core.errors import CheckpointError, did_you_mean
from modelopt.torch.opt.surgery import walk
from modelopt.torch.quantization.nn.modules.packed import PackedTensor, dtype_of
from modelopt.torch.quantization.nn.modules.tensor_quantizer import BUFFERS, SequentialQuantizer, TensorQuantizer

MAX_ELEMENTS = 2**40


def structure_of(model: nn.Module) -> dict[str, Any]:
    """Return the structure of every quantizer of `model`, by name."""
    found: dict[str, Any] = {}
    members: set[int] = set()
    for name, module in walk(model):
        if isinstance(module, SequentialQuantizer):
            members.update(id(q) for q in module)
            found[name] = {"quantizers": [_describe(q) for q in module]}
        elif isinstance(module, TensorQuantizer) and id(module) not in members:
            found[name] = {"quantizers": [_describe(module)]}
    return found


def _describe(quantizer: TensorQuantizer) -> dict[str, Any]:
    buffers = {name: getattr(quantizer, name) for name in BUFFERS}
    return {
        "format": None if quantizer.format is None else str(quantizer.format),
        "enabled": quantizer.enabled,
        "clip_grad": quantizer.clip_grad,
        "config": None if quantizer.config is None else quantizer.config.to_json(),
        "buffers": {
            n: {"shape": list(b.shape), "dtype": str(b.dtype).removeprefix("torch.")} for n, b in buffers.items() if b is not None
        },
    }


def apply_structure(model: nn.Module, structure: dict[str, Any]) -> None:
    """Give the quantizers of a converted `model` the described structure, with zeroed buffers on the device of their module.

    Raises CheckpointError where the model has no such quantizer.
    """
    names = {name for name, module in walk(model) if isinstance(module, TensorQuantizer | SequentialQuantizer)}
    for name, entry in structure.items():
        if name not in names:
            raise CheckpointError(
                f'The saved state has the quantizer "{name}", and this model has none of that name.'
                f"{did_you_mean(name, names)} The state belongs to another architecture."
            )
        parent_name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        device = next((t.device for t in [*parent.parameters(), *parent.buffers()]), None)
        made = [_build(item, name, device) for item in _items(entry, name)]
        current = parent._modules[leaf]
        old = list(current) if isinstance(current, SequentialQuantizer) else [current]
        if len(old) == len(made):  # keep the objects, which others may hold
            for kept, new in zip(old, made, strict=True):
                kept.__dict__.update({**new.__dict__, "training": kept.training})
        else:
            parent._modules[leaf] = made[0] if len(made) == 1 else SequentialQuantizer(*made)


def _items(entry: Any, name: str) -> list[dict[str, Any]]:
    items = entry.get("quantizers") if isinstance(entry, dict) else None
    if not isinstance(items, list) or not 1 <= len(items) <= 8 or not all(isinstance(i, dict) for i in items):
        raise CheckpointError(f'The saved state of the quantizer "{name}" is not a list of quantizers.')
    return items


def _build(item: dict[str, Any], name: str, device: torch.device | None) -> TensorQuantizer:
    quantizer = TensorQuantizer()
    try:
        if item.get("config") is not None:
            quantizer.set_from_cfg(item["config"])
        quantizer.format = item["format"]
        quantizer.enabled = bool(item["enabled"]) and quantizer.format is not None
        quantizer.clip_grad = bool(item["clip_grad"])
        buffers = item["buffers"].items()
    except (KeyError, AttributeError) as error:
        raise CheckpointError(f'The saved state of the quantizer "{name}" is incomplete: {error}.') from error
    for key in BUFFERS:
        setattr(quantizer, key, None)
    for key, spec in buffers:
        if key not in BUFFERS:
            raise CheckpointError(f'The saved state of the quantizer "{name}" has an unknown buffer "{key}".')
        setattr(quantizer, key, torch.zeros(_shape(spec, name), dtype=dtype_of(spec.get("dtype")), device=device))
    return quantizer


def _shape(spec: Any, name: str) -> list[int]:
    shape = spec.get("shape") if isinstance(spec, dict) else None
    if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise CheckpointError(f'The saved state of the quantizer "{name}" has a buffer without a shape.')
    total = 1
    for n in shape:
        total *= n
    if total > MAX_ELEMENTS:
        raise CheckpointError(f'The saved state of the quantizer "{name}" asks for a buffer of {total} elements.')
    return shape


def packed_of(model: nn.Module) -> dict[str, Any]:
    """Return the description of every packed weight: name of the packed module -> description."""
    return {name: module.describe() for name, module in walk(model) if isinstance(module, PackedTensor)}
