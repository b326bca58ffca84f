"""Cuts a model to what survives and gives its modules and configs the sizes that its code then needs.

Everything is computed and checked before the first write, so a refusal leaves the model untouched. Parameters keep their identity
(`.data` is replaced): ties and hooks stay valid, gradients are cleared. An optimizer that holds moments of the old shapes must be
made anew. `describe` is what happened as JSON, `reapply` repeats it on a freshly built model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from modelopt.core.errors import TraceError
from modelopt.torch.trace.axes.construct import plan_config
from modelopt.torch.trace.axes.expr import Attr
from modelopt.torch.trace.axes.places import owners, path_of, read, write
from modelopt.torch.trace.axes.solve import Repair, solve

_SHOWN = 4
DESCRIBED = "The config describes the pruned model."


@dataclass(frozen=True)
class Changes:
    """What was changed: old and new value of each attribute, old and new shape of each parameter and buffer.

    `leaves` are the attributes as leaves; `config` says whether the model's config describes the result, and if not, why.
    """

    attributes: dict[str, tuple[int, int]]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    leaves: dict[Attr, int] = field(default_factory=dict, repr=False)
    config: str = ""

    @property
    def described(self) -> bool:
        """Whether a model built from the new config has exactly these shapes."""
        return self.config == DESCRIBED

    def __str__(self) -> str:
        rows = [f"{k}: {a} -> {b}" for k, (a, b) in [*self.attributes.items(), *self.shapes.items()]]
        return "\n".join([*rows, self.config] if self.config else rows)


def apply(axes: Any, model: nn.Module, drop: Iterable[int]) -> Changes:
    """Remove the atoms in `drop` from `model`, which must have the names and shapes of the model that was traced.

    Raises TraceError, before anything is changed, where the model's code cannot follow (the message names the line).
    """
    drop = frozenset(drop)
    tensors = tensors_of(model, axes.shapes)
    repair = solve(axes, drop)
    if repair.unsatisfied:
        shown = "; ".join(str(e) for e in repair.unsatisfied[:_SHOWN])
        raise TraceError(
            f"The model cannot be cut like this: {len(repair.unsatisfied)} sizes in its code would be wrong: {shown}. The model "
            "was not changed. Pass what is to be dropped through `relax` first, which keeps what these lines need."
        )
    values = dict(repair.values)
    places = {a: read(model, a) for a in values}
    for attr, now in places.items():
        if now != axes.provenance.values[attr]:
            raise TraceError(
                f"{attr} is {now!r}, but was {axes.provenance.values[attr]} when the model was traced. Trace it again."
            )
    kept = axes.kept(drop)
    cuts = {name: kept[name] for name in tensors if _changes(kept[name], axes.shapes[name])}
    shapes = {name: (axes.shapes[name], _new_shape(dims, axes.shapes[name])) for name, dims in cuts.items()}
    config = _describe_by_config(model, axes, cuts, repair, values, places)
    for name, dims in cuts.items():
        tensors[name].grad = None
        tensors[name].data = _cut(tensors[name], dims)
    for attr, value in values.items():
        write(model, attr, value)
    _settle(model)
    # Every name of a tied tensor, because a loader may rebuild the structure before it ties.
    named = {**shapes, **{alias: shapes[name] for alias, name in axes.aliases.items() if name in shapes}}
    return Changes({str(a): (places[a], v) for a, v in values.items()}, named, values, config)


def _describe_by_config(
    model: nn.Module, axes: Any, cuts: Mapping[str, Any], repair: Repair, values: dict[Attr, int], places: dict[Attr, Any]
) -> str:  # fmt: skip
    """Add to `values` what a config that describes the pruned model has; return what to tell about it."""
    known = {a: values.get(a, axes.provenance.values[a]) for a in repair.known}
    cuts = {**cuts, **{alias: cuts[name] for alias, name in axes.aliases.items() if name in cuts}}
    shapes = {n: _new_shape(dims, axes.shapes[axes.aliases.get(n, n)]) for n, dims in cuts.items()}
    plan = plan_config(model, shapes, known, lambda name, old: _cut(old, cuts[name]) if name in cuts else old)
    if plan is None:
        return ""
    if plan.reason:
        return f"The config cannot describe the pruned model: {plan.reason}. It loads through its saved description."
    for attr, value in plan.values.items():
        now = read(model, attr)
        if now != value:
            values[attr], places[attr] = value, now
    return DESCRIBED


def tensors_of(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers under the names of `shapes`, each checked to be a plain tensor of that shape.

    Raises TraceError for a model that is not the traced one, is sharded (DTensor, FSDP), quantized, or not initialized.
    """
    found = dict(model.named_buffers(remove_duplicate=False))
    found.update(model.named_parameters(remove_duplicate=False))
    for name, shape in shapes.items():
        tensor = found.get(name)
        if tensor is None:
            raise TraceError(f'The model has no parameter "{name}", which the traced one has. Trace this model.')
        if torch.nn.parameter.is_lazy(tensor) or type(tensor.data) is not torch.Tensor:
            raise TraceError(
                f'"{name}" is a {type(tensor.data).__name__}, whose entries cannot be cut. Prune before sharding (FSDP, DTensor) '
                "or quantizing, and after the first forward pass of lazy modules."
            )
        if tuple(tensor.shape) != tuple(shape):
            raise TraceError(f'"{name}" has shape {tuple(tensor.shape)}, but {tuple(shape)} was traced. Trace the model again.')
    return {name: found[name] for name in shapes}


def _changes(dims: tuple[Any, ...], shape: tuple[int, ...]) -> bool:
    return any(d is not None and len(d) != n for d, n in zip(dims, shape, strict=True))


def _new_shape(dims: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n if d is None else len(d) for d, n in zip(dims, shape, strict=True))


@torch.no_grad()
def _cut(tensor: torch.Tensor, dims: tuple[Any, ...]) -> torch.Tensor:
    data = tensor.data
    channels_last = data.dim() == 4 and not data.is_contiguous() and data.is_contiguous(memory_format=torch.channels_last)
    for k, kept in enumerate(dims):
        if kept is not None and len(kept) != data.shape[k]:
            data = data.index_select(k, torch.as_tensor(kept, device=data.device))
    return data.contiguous(memory_format=torch.channels_last) if channels_last else data.contiguous()


def _settle(model: nn.Module) -> None:
    """What layers derive from their weights: the packed weights of recurrent layers on a GPU."""
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()


# ---- the description that travels with a checkpoint
def describe(changes: Changes) -> dict[str, Any]:
    """Return the changes as plain JSON: `{"attributes": [[owner, name, path, new], ...], "shapes": {name: [...]}}`."""
    attributes = [[a.owner, a.name, list(path_of(a)), v] for a, v in changes.leaves.items()]
    return {"attributes": attributes, "shapes": {name: list(new) for name, (_, new) in changes.shapes.items()}}


def _parsed(description: Any) -> tuple[list[tuple[Attr, int]], dict[str, tuple[int, ...]]]:
    """Check the types of a description. Raises TraceError."""
    wanted = 'The description of a pruned structure must be {"attributes": [[owner, name, path, number], ...], "shapes": {...}}.'
    if not isinstance(description, Mapping) or set(description) != {"attributes", "shapes"}:
        raise TraceError(wanted)
    attributes, shapes = description["attributes"], description["shapes"]
    if not isinstance(attributes, list) or not isinstance(shapes, Mapping):
        raise TraceError(wanted)
    rows = []
    for row in attributes:
        typed = isinstance(row, list) and len(row) == 4 and isinstance(row[0], str) and isinstance(row[1], str)
        if not typed or not isinstance(row[2], list) or type(row[3]) is not int or not all(type(p) in (int, str) for p in row[2]):
            raise TraceError(f"{wanted} Seen: {row!r:.80}")
        rows.append((Attr(row[0], row[1], tuple(row[2])), row[3]))
    for name, shape in shapes.items():
        if not isinstance(name, str) or not isinstance(shape, list) or not all(type(n) is int for n in shape):
            raise TraceError(f"{wanted} Seen the shape {shape!r:.80} of {name!r:.80}.")
    return rows, {name: tuple(shape) for name, shape in shapes.items()}


def reapply(model: nn.Module, description: Mapping[str, Any]) -> nn.Module:
    """Give a freshly built dense model the shapes and attributes of `describe`; values are the leading entries of the old ones.

    Raises TraceError, before anything is changed, where the description does not fit the model.
    """
    rows, shapes = _parsed(description)
    found = dict(model.named_buffers(remove_duplicate=False))
    found.update(model.named_parameters(remove_duplicate=False))
    # Only modules and configs of this model can be named: the description comes from a file.
    known = {path for path, _ in owners(model)}
    most = max([n for t in found.values() for n in t.shape], default=1)
    for attr, value in rows:
        if attr.owner not in known or attr.name.startswith("__"):
            raise TraceError(f"{attr} belongs to no module or config of the model. Is it the model that was pruned?")
        try:
            now = read(model, attr)
        except (IndexError, KeyError, TypeError) as error:
            raise TraceError(
                f"The model has no attribute {attr}, which is to be set. Is it the model that was pruned?"
            ) from error
        if not (now is None or type(now) is int) or not 0 < value <= max(most, now or 1):
            raise TraceError(f"{attr} cannot become {value}: it is {now!r}.")
    for name, shape in shapes.items():
        old = tuple(found[name].shape) if name in found else None
        if old is None or len(old) != len(shape) or any(n > m or n < 1 for n, m in zip(shape, old, strict=False)):
            raise TraceError(f'"{name}" of shape {old} cannot become {shape}. The model is not the one that was pruned.')
    for name, shape in shapes.items():
        found[name].grad = None
        found[name].data = found[name].data[tuple(slice(n) for n in shape)].clone()
    for attr, value in rows:
        write(model, attr, value)
    _settle(model)
    return model
