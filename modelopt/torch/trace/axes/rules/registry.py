"""The table of rules: what one ATen op (or one leaf module) does to the axes of its operands.

A rule gets a `Call` and returns the axes of the output (one per dimension; for several outputs it calls `call.set` itself and
returns None). An op without a rule freezes every labelled operand and is reported: a missing rule costs pruning, not
correctness.

    @register_rule("aten::my_op")
    def my_op(call):
        call.freeze(call.axes(call.args[0])[-1], "my_op mixes its last dimension")
        return call.axes(call.args[0])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from modelopt.core.registry import Registry, TypeRegistry
from modelopt.torch.trace.axes import algebra
from modelopt.torch.trace.axes.labels import Axis, LabelStore

if TYPE_CHECKING:
    from modelopt.torch.trace.axes.record import Recorder

Axes = Sequence[Axis | None]
Rule = Callable[["Call"], Axes | None]

RULES: Registry[Rule] = Registry("axis rule")
MODULE_RULES: TypeRegistry[Callable[..., None]] = TypeRegistry("module axis rule")


def register_rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ops such as "aten::mm" (all overloads, in-place too) or "aten::max.dim" (one overload)."""

    def decorate(rule: Rule) -> Rule:
        for name in names:
            RULES.register(name, rule)
        return rule

    return decorate


def register_module_rule(cls: type | str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Treat modules of this class as leaves: `rule(recorder, module, args, kwargs, output)` labels the output itself."""
    return MODULE_RULES.register(cls)


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested lists, tuples and dicts, in order."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensors(item)


class Call:
    """One executed op, as a rule sees it."""

    __slots__ = ("args", "func", "kwargs", "name", "out", "recorder", "store")

    def __init__(self, recorder: Recorder, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        self.recorder, self.store = recorder, recorder.store
        self.func, self.name, self.args, self.kwargs, self.out = func, name, args, kwargs, out

    store: LabelStore

    def axes(self, tensor: torch.Tensor) -> tuple[Axis | None, ...]:
        """The axes of a tensor."""
        return self.recorder.axes(tensor)

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or by name."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name, default)

    def set(self, tensor: torch.Tensor, axes: Axes) -> None:
        """Give a tensor its axes."""
        self.recorder.set(tensor, axes)

    def inputs(self) -> list[torch.Tensor]:
        """All operands that are tensors."""
        return [*tensors(self.args), *tensors(self.kwargs)]

    def outputs(self) -> list[torch.Tensor]:
        """All results that are tensors."""
        return list(tensors(self.out))

    def static(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor depends on parameters and constants only."""
        return self.recorder.static(tensor)

    def unify(self, a: Axis | None, b: Axis | None) -> None:
        """These dimensions are the same one."""
        if a is not b:
            algebra.unify(self.store, a, b)

    def freeze(self, axis: Axis | None, text: str, soft: str | None = None) -> None:
        """Keep this dimension; a `soft` reason is skipped when the analysis was asked to lift it."""
        if axis is not None and soft not in self.recorder.lift:
            self.store.freeze(axis, text, soft)

    def choose(self, axis: Axis | None, text: str, *, stacked: bool = False, least: int = 1) -> None:
        """Slices of this dimension are chosen by value: rows of a router, or (`stacked`) the weights of experts.

        Kept, unless "experts" is lifted: then routers and stacks are joined at the end; at least `least` must survive.
        """
        if axis is not None and "experts" in self.recorder.lift:
            self.recorder.chosen.append((axis, self.recorder.module, stacked, least))
        else:
            self.freeze(axis, text, soft="experts")

    def role(self, role: str, axis: Axis | None) -> None:
        """Note how a dimension is used, from which `kinds` reads what a family is."""
        if axis is not None:
            self.recorder.roles[role].append(axis)

    def freeze_all(self, axes: Iterable[Axis | None], text: str) -> None:
        """Keep these dimensions."""
        for axis in axes:
            self.freeze(axis, text)

    def factor(self, axis: Axis | None, shape: Sequence[int]) -> list[Axis | None]:
        """Split a dimension; sizes of one are allowed."""
        parts = iter(algebra.factor(self.store, axis, [n for n in shape if n != 1]) if max(shape) > 1 else [])
        return [next(parts) if n != 1 else None for n in shape]

    def product(self, *parts: tuple[Axis | None, int]) -> Axis | None:
        """Merge dimensions, the last fastest."""
        return algebra.product(self.store, parts)


def broadcast(call: Call, operands: Iterable[torch.Tensor], out: torch.Tensor) -> list[Axis | None]:
    """The axes of the elementwise combination of operands: aligned dimensions are made equal."""
    rank, shape = out.dim(), out.shape
    known = [(call.axes(t), t.shape, rank - t.dim()) for t in operands if t.dim()]
    if len(known) == 1 and not known[0][2] and known[0][1] == shape:
        return list(known[0][0])
    result: list[Axis | None] = [None] * rank
    for k in range(rank):
        if shape[k] == 1:
            continue
        first = True
        for axes, size, shift in known:
            if k < shift or size[k - shift] != shape[k]:
                continue
            if first:
                result[k], first = axes[k - shift], False
            else:
                call.unify(result[k], axes[k - shift])
    return result


def dims_of(value: Any, rank: int) -> list[int]:
    """A dim argument (None, int or list) as a list of non-negative ints; None and [] mean all."""
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return list(range(rank))
    return [d % max(rank, 1) for d in ([value] if isinstance(value, int) else value)]


def reduced(axes: Axes, dims: Sequence[int], keep: bool) -> list[Axis | None]:
    """The axes after a reduction over `dims`."""
    return [None if k in dims else a for k, a in enumerate(axes) if keep or k not in dims]
