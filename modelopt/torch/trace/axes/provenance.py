"""Makes the integer attributes of a model and of its configs traceable for the time of one forward pass.

Every int (alone, in tuples, lists and dicts, however nested) of every module and every config object becomes a `Tainted` int with
the leaf `Attr(owner, name, index)`; the originals return whatever happens. Only ints above one: nothing smaller can shrink.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from modelopt.torch.trace.axes.expr import Attr, Equation, Recording, Tainted, Where, plain
from modelopt.torch.trace.axes.layers import Standard, identities, standard
from modelopt.torch.trace.axes.places import DEPTH, MODULE_INTERNALS, owners
from modelopt.torch.trace.axes.sizes import Recorder, SizeMode


class Tainter:
    """Replaces ints in containers and remembers what was there."""

    def __init__(self, recording: Recording):
        self.recording = recording
        self.values: dict[Attr, int] = {}
        self._undo: list[tuple[Any, Any, Any]] = []
        self._done: dict[int, tuple[Any, Any]] = {}

    def taint_object(self, owner: str, value: Any) -> None:
        """Taint the attributes of a module or config."""
        attributes = value.__dict__
        for key in list(attributes):
            if isinstance(value, nn.Module) and key in MODULE_INTERNALS:
                continue
            new = self._taint(attributes[key], owner, key, ())
            if new is not attributes[key]:
                self._put(attributes, key, new)
        if isinstance(value, dict):  # a config that is also a dict (diffusers)
            self._taint_dict(value, owner, "", ())

    def _put(self, container: Any, key: Any, new: Any) -> None:
        old = dict.__getitem__(container, key)
        self._undo.append((container, key, old))
        dict.__setitem__(container, key, new)

    def _taint(self, value: Any, owner: str, name: str, path: tuple[Any, ...]) -> Any:
        if type(value) is int:
            if value < 2:
                return value
            leaf = Attr(owner, name, path[0] if len(path) == 1 else path or None)
            self.values[leaf] = value
            return Tainted(value, leaf, self.recording)
        if len(path) >= DEPTH:
            return value
        if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
            if isinstance(value, list) and id(value) in self._done:  # one list under two names stays one list
                return self._done[id(value)][1]
            new = [self._taint(v, owner, name, (*path, k)) for k, v in enumerate(value)]
            if any(a is not b for a, b in zip(new, value, strict=True)):
                result = type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
                self._done[id(value)] = (value, result)
                return result
        elif isinstance(value, dict) and id(value) not in self._done:
            self._done[id(value)] = (value, value)
            self._taint_dict(value, owner, name, path)
        return value

    def _taint_dict(self, value: dict[Any, Any], owner: str, name: str, path: tuple[Any, ...]) -> None:
        for key in list(value):
            if isinstance(key, (str, int)):
                new = self._taint(value[key], owner, name, (*path, key))
                if new is not value[key]:
                    self._put(value, key, new)

    def restore(self) -> None:
        """Put every original back, in the opposite order."""
        for container, key, old in reversed(self._undo):
            dict.__setitem__(container, key, old)
        self._undo.clear()


class Provenance:
    """Context manager: inside it the ints of `model` and the sizes of its tensors are traced.

    Enter it inside the recorder. Afterwards `equations` holds what the model's code asked of its sizes, `values` the original
    value of each attribute, `lost` the sizes that became a float or went through int(), and where.
    """

    def __init__(self, model: nn.Module, recorder: Recorder):
        self.model = model
        self.standard: tuple[Standard, ...] = ()
        self.identities: tuple[Equation, ...] = ()
        self._recording = Recording(pins=True)
        self._mode = SizeMode(recorder, self._recording)
        self._tainter = Tainter(self._recording)
        self._stack = ExitStack()

    @property
    def equations(self) -> tuple[Equation, ...]:
        """The relations that held, in the order in which they were met, each once."""
        return tuple(self._recording.equations)

    @property
    def values(self) -> dict[Attr, int]:
        """The value that each traced attribute has in the model."""
        return self._tainter.values

    @property
    def lost(self) -> dict[Any, Where]:
        """Expressions that the code turned into a float or a fresh int, which no equation can follow."""
        return self._recording.lost

    def __enter__(self) -> Provenance:
        with self._stack as stack:
            stack.callback(self._restore)
            stack.enter_context(self._recording)
            for path, value in list(owners(self.model)):
                self._tainter.taint_object(path, value)
            self.standard = standard(self.model, self.values)
            self.identities = identities(self.model, self.values)
            stack.enter_context(self._mode)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.__exit__(*exc)

    def _restore(self) -> None:
        self._tainter.restore()
        for _, value in owners(self.model):  # what the forward pass itself stored: caches of shapes, lengths
            attributes = value.__dict__
            for key in list(attributes):
                if key not in MODULE_INTERNALS:
                    attributes[key] = plain(attributes[key])
