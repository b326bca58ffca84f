"""Where integer attributes live: modules, configs, containers in them; finding, reading and writing one by its leaf."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from modelopt.core.errors import TraceError
from modelopt.torch.trace.axes.expr import Attr

MODULE_INTERNALS = frozenset(nn.Module().__dict__) | {"training"}
_NOT_CONFIGS = (
    "torch",
    "builtins",
    "numpy",
    "collections",
    "functools",
    "logging",
    "threading",
    "enum",
    "typing",
    "pathlib",
    "weakref",
)
DEPTH = 5


def is_config(value: Any) -> bool:
    """True for a plain object of attributes: a config, its parts, a dataclass of sizes; not for code, tensors or tools."""
    if isinstance(value, (nn.Module, torch.Tensor, type, types.ModuleType)) or callable(value):
        return False
    if not isinstance(getattr(value, "__dict__", None), dict):
        return False
    if isinstance(value, types.SimpleNamespace):
        return True
    return type(value).__module__.split(".")[0] not in _NOT_CONFIGS


def owners(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (path, object) of each module and config once, under the first path that reaches it, modules first.

    A path is what `resolve_owner` follows: attribute names, dict keys and list positions joined by dots.
    """
    seen: set[int] = set()
    modules = [(name, m) for name, m in model.named_modules() if not isinstance(m, torch.jit.ScriptModule)]
    yield from modules
    for name, module in modules:
        for key, value in module.__dict__.items():
            if key not in MODULE_INTERNALS:
                yield from configs(value, f"{name}.{key}" if name else key, seen)


def configs(value: Any, path: str, seen: set[int], depth: int = DEPTH) -> Iterator[tuple[str, Any]]:
    """Yield (path, object) of a config and of what it or a dict contains; `seen` holds the ids of those yielded before."""
    if depth == 0 or id(value) in seen:
        return
    if is_config(value):
        seen.add(id(value))
        yield path, value
        for key, inner in value.__dict__.items():
            yield from configs(inner, f"{path}.{key}", seen, depth - 1)
    if isinstance(value, dict):
        seen.add(id(value))
        for key, inner in value.items():
            if isinstance(key, str) and "." not in key:
                yield from configs(inner, f"{path}.{key}", seen, depth - 1)


def resolve_owner(model: Any, path: str) -> Any:
    """Return the object that `path` (as `owners` gives it) leads to. Raises AttributeError or KeyError where it leads nowhere."""
    value: Any = model
    for step in path.split(".") if path else ():
        if isinstance(value, nn.Module) and step in value._modules:
            value = value._modules[step]
        elif isinstance(value, dict) and step in value:
            value = value[step]
        else:
            value = getattr(value, step)
    return value


# ---- reading and writing an attribute by its leaf
def path_of(attr: Attr) -> tuple[Any, ...]:
    """The steps from the top value of an attribute to the int."""
    return attr.index if isinstance(attr.index, tuple) else () if attr.index is None else (attr.index,)


def _holder(model: Any, attr: Attr) -> tuple[Any, Any]:
    """(container, key) of the attribute's top value: the __dict__ of its owner, or the owner itself if it is a dict."""
    try:
        owner = resolve_owner(model, attr.owner)
        if attr.name:
            if not is_config(owner):  # an optional attribute of a config may be missing: None
                owner.__dict__[attr.name]
            return owner.__dict__, attr.name
        dict.__getitem__(owner, path_of(attr)[0])
        return owner, None
    except (AttributeError, KeyError, TypeError) as error:
        raise TraceError(f"The model has no attribute {attr}, which is to be set. Is it the model that was pruned?") from error


def read(model: Any, attr: Attr) -> Any:
    """The value of an attribute. Raises TraceError where there is none."""
    container, key = _holder(model, attr)
    value = container if key is None else container.get(key)
    for step in path_of(attr):
        value = value[step]
    return value


def write(model: Any, attr: Attr, value: int) -> None:
    """Set an int attribute; lists and dicts are changed in place, tuples replaced."""
    container, key = _holder(model, attr)
    if key is None:
        _replaced(container, path_of(attr), value)
    else:
        dict.__setitem__(container, key, _replaced(container.get(key), path_of(attr), value))


def _replaced(value: Any, path: tuple[Any, ...], new: int) -> Any:
    if not path:
        return new
    inner = _replaced(value[path[0]], path[1:], new)
    if isinstance(value, dict):
        dict.__setitem__(value, path[0], inner)
    elif isinstance(value, list):
        value[path[0]] = inner
    else:
        items = list(value)
        items[path[0]] = inner
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def read_numbers(model: nn.Module, kind: type = int) -> dict[Attr, Any]:
    """Return every int (or float) attribute of the modules and configs of a model, as it is (tainted or not)."""
    out: dict[Attr, Any] = {}

    def visit(value: Any, owner: str, name: str, path: tuple[Any, ...]) -> None:
        if isinstance(value, kind) and not isinstance(value, bool):
            out[Attr(owner, name, path[0] if len(path) == 1 else path or None)] = value
        elif len(path) < DEPTH:
            items = enumerate(value) if isinstance(value, (tuple, list)) else value.items() if isinstance(value, dict) else ()
            for key, inner in items:
                if isinstance(key, (str, int)):
                    visit(inner, owner, name, (*path, key))

    for path, value in owners(model):
        for key, inner in value.__dict__.items():
            if not (isinstance(value, nn.Module) and key in MODULE_INTERNALS):
                visit(inner, path, key, ())
        if isinstance(value, dict):
            visit(value, path, "", ())
    return out
