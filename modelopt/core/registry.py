"""The only registry: names to objects that are imported when they are first asked for.

    MODES = Registry("mode", quantize="modelopt.torch.quantization.mode:QuantizeMode")
    MODES.get("quantize")

`TypeRegistry` maps classes instead of names and answers with the nearest class of the method resolution order.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from modelopt.core.errors import ConfigError, UnknownNameError, did_you_mean

T = TypeVar("T")


def load_object(path: str) -> Any:
    """Import `"package.module:attribute"` and return the attribute."""
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise ConfigError(f'"{path}" is no import path. Write it as "package.module:attribute".')
    return getattr(importlib.import_module(module), attribute)


class Registry(Generic[T]):
    """Names of one kind of thing. A value given as `"package.module:attribute"` is imported at first use."""

    def __init__(self, kind: str, /, **lazy: str) -> None:
        self.kind = kind
        self._items: dict[str, Any] = {}
        self._lazy: dict[str, str] = dict(lazy)

    def register(self, name: str, target: Any = None) -> Any:
        """Add `target` (an object, or an import path) under `name`; without a target, return a decorator.

        Raises ConfigError if the name is taken.
        """
        if name in self:
            raise ConfigError(f'The {self.kind} "{name}" is registered already. Choose another name, or unregister it.')
        if target is None:

            def decorate(obj: Any) -> Any:
                self.register(name, obj)
                return obj

            return decorate
        if isinstance(target, str):
            self._lazy[name] = target
        else:
            self._items[name] = target
        return target

    def unregister(self, name: str) -> None:
        """Remove `name`; an unknown name is an error."""
        if name not in self:
            raise self.unknown(name)
        self._items.pop(name, None)
        self._lazy.pop(name, None)

    def get(self, name: str) -> T:
        """Return the object called `name`. Raises UnknownNameError, with the nearest name."""
        if name not in self._items:
            if not isinstance(name, str) or name not in self._lazy:
                raise self.unknown(name)
            self._items[name] = load_object(self._lazy[name])
        return self._items[name]

    def unknown(self, name: object) -> UnknownNameError:
        """Build the error for a name that is not here."""
        known = self.names()
        hint = did_you_mean(str(name), known)
        shown = ", ".join(known[:40]) + (", ..." if len(known) > 40 else "")
        return UnknownNameError(f'There is no {self.kind} "{name}".{hint} Known: {shown or "none"}.')

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted({*self._items, *self._lazy})

    def __contains__(self, name: object) -> bool:
        return name in self._items or name in self._lazy

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())


class TypeRegistry(Generic[T]):
    """Classes to values. Keys may be classes or `"package.module:Class"`, so that no framework is imported to name it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._by_name: dict[str, T] = {}

    @staticmethod
    def _key(cls: type | str) -> str:
        if isinstance(cls, str):
            if ":" not in cls:
                raise ConfigError(f'"{cls}" names no class. Write it as "package.module:Class".')
            return cls
        return f"{cls.__module__}:{cls.__qualname__}"

    def register(self, cls: type | str | list[type | str], value: T | None = None) -> Any:
        """Map one class (or each of a list) to `value`; without a value, return a decorator."""
        if value is None:

            def decorate(obj: T) -> T:
                self.register(cls, obj)
                return obj

            return decorate
        for one in cls if isinstance(cls, list) else [cls]:
            key = self._key(one)
            if key in self._by_name:
                raise ConfigError(f"The {self.kind} for class {key} is registered already. Unregister it first.")
            self._by_name[key] = value
        return value

    def unregister(self, cls: type | str) -> None:
        """Remove a class; an unknown class is an error."""
        key = self._key(cls)
        if key not in self._by_name:
            hint = did_you_mean(key, self._by_name)
            raise UnknownNameError(f"There is no {self.kind} for class {key}.{hint}")
        del self._by_name[key]

    def match(self, obj: Any, accept: Callable[[type, type], bool] | None = None) -> T | None:
        """Return the value of the nearest class in the MRO of `obj` (an object or a class), or None.

        `accept(own_class, registered_class)` may veto a match, for instance where a subclass overrides `forward`.
        """
        own = obj if isinstance(obj, type) else type(obj)
        for base in own.__mro__:
            key = self._key(base)
            if key in self._by_name and (accept is None or accept(own, base)):
                return self._by_name[key]
        return None

    def types(self) -> list[str]:
        """Return the registered classes as `"module:qualname"`, sorted."""
        return sorted(self._by_name)
