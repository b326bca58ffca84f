"""Changing modules in place: the one place that assigns `__class__`.

A module keeps its identity when its class changes, so ties, hooks, optimizers and every reference to it survive. The new class
remembers the original one (`_modelopt_original_class`), so the change can be taken back. A module whose `forward` was replaced
on the instance (accelerate keeps the real one in `_old_forward`) is led back to the forward of its new class.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any, TypeVar

from torch import nn

from modelopt.core.errors import ModeError

ORIGINAL = "_modelopt_original_class"
_WRAPPED_SLOTS = ("_old_forward",)

M = TypeVar("M", bound=nn.Module)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that the module had before `convert_class`, or its class if it was never converted."""
    return module.__dict__.get(ORIGINAL) or getattr(type(module), ORIGINAL, None) or type(module)


def is_converted(module: nn.Module) -> bool:
    """Return whether the class of the module was changed by `convert_class`."""
    return original_class(module) is not type(module)


def instance_forward_patched(module: nn.Module) -> bool:
    """Return whether `forward` was replaced on this very instance, so that a new class would not be reached by itself."""
    return "forward" in module.__dict__


def _is_bound_forward(value: Any, module: nn.Module) -> bool:
    return isinstance(value, MethodType) and value.__self__ is module and value.__func__.__name__ == "forward"


def rebind_forward(module: nn.Module) -> bool:
    """Lead a per-instance `forward` to the forward of the module's class. Returns whether the class's forward is reached.

    Two forms are known: the instance attribute is itself a bound class method (it is rebound), or it is a wrapper that calls
    `module._old_forward` (accelerate's hooks), in which case that is rebound. `__wrapped__`, which signatures are read
    from, follows. Without a per-instance forward there is nothing to do.
    """
    if not instance_forward_patched(module):
        return True
    bound = MethodType(type(module).forward, module)
    patched = module.__dict__["forward"]
    if _is_bound_forward(patched, module):
        module.__dict__["forward"] = bound
        return True
    reached = False
    for slot in _WRAPPED_SLOTS:
        if _is_bound_forward(module.__dict__.get(slot), module):
            module.__dict__[slot] = bound
            reached = True
    if reached and _is_bound_forward(getattr(patched, "__wrapped__", None), module):
        patched.__wrapped__ = bound
    return reached


def _assign(module: nn.Module, new_cls: type[nn.Module], what: str) -> None:
    old_cls = type(module)
    try:
        module.__class__ = new_cls
    except TypeError as error:
        raise ModeError(
            f"A {old_cls.__name__} cannot become a {new_cls.__name__}: {error}. The new class must be a plain nn.Module subclass."
        ) from error
    if new_cls.forward is not old_cls.forward and not rebind_forward(module):
        module.__class__ = old_cls
        raise ModeError(
            f"A {old_cls.__name__} cannot be {what}: its forward was replaced on the instance by something that does not call "
            "the forward of its class. Remove that patch first, or apply it afterwards."
        )


def convert_class(module: M, new_cls: type[nn.Module]) -> M:
    """Make `module` an instance of `new_cls`, in place, and return it.

    `new_cls` is usually a subclass of the module's own class, made once per original class by the caller. The original class is
    kept as `_modelopt_original_class` on the new class (on the instance, where one new class serves several original ones).

    Raises ModeError if the class cannot be assigned, or if the module's own `forward` would bypass the new one.

        class LoudLinear(nn.Linear):
            def forward(self, x): return 2 * super().forward(x)
        convert_class(model.fc, LoudLinear)
    """
    if not (isinstance(new_cls, type) and issubclass(new_cls, nn.Module)):
        raise ModeError(f"{new_cls!r} is not a subclass of nn.Module; a module can only become another kind of module.")
    original = original_class(module)
    if type(module) is new_cls:
        return module
    _assign(module, new_cls, f"turned into a {new_cls.__name__}")
    module.__dict__.pop(ORIGINAL, None)
    if new_cls is original:
        return module
    if ORIGINAL not in new_cls.__dict__:
        setattr(new_cls, ORIGINAL, original)
    if new_cls.__dict__[ORIGINAL] is not original:
        module.__dict__[ORIGINAL] = original
    return module


def revert_class(module: M) -> M:
    """Give the module the class back that it had before `convert_class`, and return it. Its attributes stay."""
    return convert_class(module, original_class(module))


def walk(model: nn.Module, duplicates: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Yield (dotted name, module) over `_modules`, the model itself (name "") first, parents before children.

    With `duplicates`, a module that has several names is yielded under each of them, with its subtree; `named_children()`
    would drop the second name. The tree may be changed while walking: children are looked up when their parent was handled.
    """
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        name, module = stack.pop()
        if id(module) in seen and not duplicates:
            continue
        seen.add(id(module))
        yield name, module
        prefix = f"{name}." if name else ""
        stack.extend((prefix + leaf, child) for leaf, child in reversed(module._modules.items()) if child is not None)


def named_paths(model: nn.Module, module: nn.Module) -> list[str]:
    """Return every dotted name of `module` in `model`."""
    return [name for name, m in walk(model, duplicates=True) if m is module]


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> list[str]:
    """Put `new` wherever `old` is a child, under every name, and return those names. The model itself is never replaced."""
    names = []
    for name, parent in list(walk(model)):
        for leaf, child in parent._modules.items():
            if child is old:
                parent._modules[leaf] = new
                names.append(f"{name}.{leaf}" if name else leaf)
    return names
