"""Depth: remove whole residual blocks, y = x + f(x), whose output lives in the same dimensions as their input.

A *stack* is a ModuleList or Sequential; a *unit* is a child of it that ran once and whose first output has the shape and the
very labels of its first input: only a residual sum (or nothing at all) unifies the two. Units are ranked by

    influence = 1 - mean over tokens of cos(x, y)                                   (ShortGPT, arXiv 2403.03853)

The model without a unit equals the model in which the unit returns its input; `skipping` makes the latter for the oracle.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelopt.core.errors import CheckpointError, ConfigError
from modelopt.core.match import matches
from modelopt.torch.trace.axes.construct import builder_of
from modelopt.torch.trace.axes.places import configs
from modelopt.torch.trace.inputs import MODEL_ERRORS, quiet_run
from modelopt.torch.utils.network import get_submodule


@dataclass(frozen=True)
class Stack:
    """The removable units of one container, by index."""

    name: str
    size: int
    units: tuple[int, ...]


def find_stacks(model: nn.Module, axes: Any, exclude: Sequence[str] = ()) -> tuple[Stack, ...]:
    """Return the containers that have at least two units, in the order of the model.

    A block is no unit if a pattern of `exclude` names it or one of its parameters.
    """
    calls: dict[str, list[Any]] = {}
    for call in axes.calls:
        calls.setdefault(call.name, []).append(call)
    stacks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            keys = [f"{name}.{key}" if name else key for key in module._modules]
            units = tuple(i for i, k in enumerate(keys) if _is_unit(calls.get(k, [])) and not _named(model, k, exclude))
            if len(units) > 1:
                stacks.append(Stack(name, len(module), units))
    return tuple(stacks)


def _named(model: nn.Module, name: str, patterns: Sequence[str]) -> bool:
    names = [name, *(f"{name}.{p}" for p, _ in get_submodule(model, name).named_parameters())] if patterns else []
    return any(matches(n, pattern) for pattern in patterns for n in names)


def _is_unit(calls: Sequence[Any]) -> bool:
    if len(calls) != 1 or not calls[0].inputs or not calls[0].outputs:
        return False
    x, y = calls[0].inputs[0], calls[0].outputs[0]
    labelled = any(a is not None for a in x.axes)
    return labelled and x.id != y.id and tuple(x.shape) == tuple(y.shape) and tuple(x.axes) == tuple(y.axes)


def first_tensor(value: Any) -> Tensor | None:
    """Return the first floating-point tensor in nested tuples, lists, mappings and model outputs."""
    return next(iter(tensors_of(value)), None)


def tensors_of(value: Any) -> list[Tensor]:
    """Return all floating-point tensors in nested tuples, lists, mappings and model outputs, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [t for item in items for t in tensors_of(item)]


def removed_units(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> set[str]:
    """Return the dotted names of the units that are not in `kept`, before they are removed."""
    return {
        f"{name}.{key}" if name else key
        for name, indices in kept.items()
        for i, key in enumerate(get_submodule(model, name)._modules)
        if i not in set(indices)
    }


def _replace_first(value: Any, old: Tensor, new: Tensor) -> Any:
    if value is old:
        return new
    if isinstance(value, tuple | list):
        return type(value)(_replace_first(v, old, new) for v in value)
    if isinstance(value, Mapping):
        clone = copy.copy(value)
        for key in value:
            clone[key] = _replace_first(value[key], old, new)  # type: ignore[index]
        return clone
    return value


def _hooked(model: nn.Module, names: Sequence[str], act: Callable[..., Any]) -> list[Any]:
    def make(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            return act(name, first_tensor([*args, *kwargs.values()]), first_tensor(output), output)

        return hook

    return [get_submodule(model, n).register_forward_hook(make(n), with_kwargs=True) for n in names]


def influence(model: nn.Module, stacks: Sequence[Stack], run: Callable[[nn.Module], Any]) -> dict[str, float]:
    """Return {unit: 1 - mean cos(input, output) over tokens}; `run(model)` makes the forward passes."""
    sums: dict[str, list[float]] = {}

    def observe(name: str, x: Tensor | None, y: Tensor | None, output: Any) -> None:
        if x is not None and y is not None and x.shape == y.shape:
            dim = 1 if x.dim() == 4 else -1
            cosine = nn.functional.cosine_similarity(x.float(), y.float(), dim=dim)
            sums.setdefault(name, []).append(float(1 - cosine.mean()))

    names = [unit_name(s, i) for s in stacks for i in s.units]
    handles = _hooked(model, names, observe)
    try:
        with quiet_run(model):
            run(model)
    finally:
        for handle in handles:
            handle.remove()
    return {name: sum(values) / len(values) for name, values in sums.items()}


def unit_name(stack: Stack, index: int) -> str:
    """Return the dotted name of a unit."""
    return f"{stack.name}.{index}" if stack.name else str(index)


def choose_units(stacks: Sequence[Stack], scores: Mapping[str, float], share: float) -> dict[str, list[int]]:
    """Return {container: indices that stay} when `share` of the units goes, the least influential first.

    Raises ConfigError where there is no unit at all.
    """
    if not stacks:
        raise ConfigError(
            "There are no residual blocks to remove: no ModuleList or Sequential holds blocks whose output lives in the "
            'dimensions of their input. Leave "layers" out of the ratios.'
        )
    kept = {}
    for stack in stacks:
        count = min(int(round(len(stack.units) * share)), len(stack.units) - 1)
        ranked = sorted(stack.units, key=lambda i: (scores.get(unit_name(stack, i), float("inf")), i))
        gone = set(ranked[:count])
        if gone:
            kept[stack.name] = [i for i in range(stack.size) if i not in gone]
    return kept


def renamed(description: Mapping[str, Any], kept: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return the description of a cut model in the names that its modules have after `remove_units(model, kept)`."""
    if not kept:
        return dict(description)

    def name_of(name: str) -> str | None:
        for container, indices in sorted(kept.items(), key=lambda item: -len(item[0])):
            prefix = f"{container}." if container else ""
            index, dot, rest = name.removeprefix(prefix).partition(".")
            if name.startswith(prefix) and index.isdigit():
                if int(index) not in indices:
                    return None
                name = f"{prefix}{list(indices).index(int(index))}{dot}{rest}"
        return name

    rows = [[new, *row[1:]] for row in description["attributes"] if (new := name_of(row[0])) is not None]
    shapes = {new: shape for name, shape in description["shapes"].items() if (new := name_of(name)) is not None}
    return {"attributes": rows, "shapes": shapes}


@contextlib.contextmanager
def skipping(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Let the named units return their input, as if they were not there."""

    def act(name: str, x: Tensor | None, y: Tensor | None, output: Any) -> Any:
        return output if x is None or y is None else _replace_first(output, y, x)

    handles = _hooked(model, names, act)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def remove_units(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> dict[str, tuple[Any, Any]]:
    """Keep only the given units of each container, renumber the rest, and shorten what the model's config says of them.

    Returns {attribute: (before, after)}. Raises CheckpointError for containers or indices that are not there.
    """
    changes: dict[str, tuple[Any, Any]] = {}
    for name, indices in kept.items():
        size = len(get_submodule(model, name)._modules)
        fits = indices and list(indices) == sorted(set(indices)) and indices[0] >= 0
        if not fits or (size != len(indices) and indices[-1] >= size):
            raise CheckpointError(f'"{name}" has {size} blocks; the indices {list(indices)[:8]} do not fit.')
    for name in sorted(kept, key=lambda n: (-len(n), n)):  # the inner ones first, whose names change with the outer ones
        indices = list(kept[name])
        modules = list(get_submodule(model, name)._modules.values())
        if len(modules) == len(indices):
            continue
        numbers = _numbers(modules)
        changes.update(_shorten_config(model, name, len(modules), indices))
        container = get_submodule(model, name)
        container._modules.clear()
        for new, old in enumerate(indices):
            container._modules[str(new)] = modules[old]
            for owner, key in numbers[old]:
                owner.__dict__[key] = new
        changes[f"{name}.length"] = (len(modules), len(indices))
    return changes


def _numbers(modules: Sequence[Any]) -> list[list[tuple[nn.Module, str]]]:
    """Return for each unit the (module, attribute) pairs that hold its index in every unit: `layer_idx` and its like."""
    tables = []
    for index, module in enumerate(modules):
        found = {}
        for path, child in module.named_modules():
            for key, value in child.__dict__.items():
                if type(value) is int and value == index:
                    found[path, key] = (child, key)
        tables.append(found)
    common = set(tables[0]).intersection(*tables[1:]) if tables else set()
    return [[found[p] for p in sorted(common)] for found in tables]


def _shorten_config(model: nn.Module, name: str, size: int, indices: list[int]) -> dict[str, tuple[Any, Any]]:
    """Change what the model's config says of the container: the count of its blocks, and lists with one entry per block.

    Which of the numbers that equal `size` is the count is found by building the model without weights. Where none is, the
    config stays as it is.
    """
    builder = builder_of(model)
    if builder is None:
        return {}
    root, config, build = builder
    parts = [(path, part if isinstance(part, dict) else vars(part)) for path, part in configs(config, root, set())]
    counts = [(path, k) for path, part in parts for k, v in part.items() if type(v) is int and v == size]
    lists = [(path, k) for path, part in parts for k, v in part.items() if isinstance(v, list | tuple) and len(v) == size]
    lists = [(path, k) for path, k in lists if not k.startswith("_")]
    lengths = _lengths(model)
    wanted = {**lengths, name: len(indices)}
    for chosen, cut in itertools.product([*([c] for c in counts), []], [lists, []]):
        trial = copy.deepcopy(config)
        new = _changed(trial, root, chosen, cut, indices)
        try:
            with torch.device("meta"):
                built = _lengths(build(trial))
        except MODEL_ERRORS:
            continue
        if {n: built.get(n) for n in wanted if n.count(".") <= name.count(".")} == {
            n: c for n, c in wanted.items() if n.count(".") <= name.count(".")
        }:
            _changed(config, root, chosen, cut, indices)
            return new
    return {}


def _lengths(model: nn.Module) -> dict[str, int]:
    return {n: len(m._modules) for n, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)}


def _changed(config: Any, root: str, counts: Sequence[Any], lists: Sequence[Any], indices: list[int]) -> dict[str, Any]:
    """Write the new count and the shortened lists into `config`, and return {name: (before, after)}."""
    changes = {}
    for path, part in configs(config, root, set()):
        values = part if isinstance(part, dict) else vars(part)
        for key, old in list(values.items()):
            if (path, key) in counts:
                values[key] = len(indices)
            elif (path, key) in lists:
                values[key] = type(old)(old[i] for i in indices)
            else:
                continue
            changes[f"{path}.{key}"] = (old, values[key])
    return changes
