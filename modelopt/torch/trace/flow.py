"""Follows channels through one real forward pass: which parameter made each element of a tensor, and which reads it.

Beside every tensor runs a tensor of channel numbers (-1: none). Operations that only move elements are simply run on the numbers,
so no rule for reshaping, slicing or gathering is needed; the others are told apart by what they do to a scaled channel.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from modelopt.torch.trace.inputs import resolve_inputs, run
from modelopt.torch.trace.record_graph import leaves
from modelopt.torch.utils import unwrap_model

Slot = tuple[str, int]

MOVES = frozenset(
    (
        "view", "_unsafe_view", "reshape", "_reshape_alias", "t", "transpose", "permute", "expand", "clone", "contiguous",
        "alias", "detach", "slice", "select", "squeeze", "unsqueeze", "unbind", "split", "split_with_sizes", "chunk", "cat",
        "stack", "repeat", "index", "index_select", "gather", "flip", "roll", "narrow", "movedim", "lift_fresh", "view_as",
        "as_strided", "unfold", "constant_pad_nd", "_to_copy", "flatten", "unflatten",
    )
)  # fmt: skip


@dataclass(frozen=True)
class View:
    """A parameter seen through transposes, or one slice of it: its name and which of its dimensions each dimension is."""

    name: str
    dims: tuple[int, ...]


class Flow(TorchDispatchMode):
    """Run a model under it, then ask `parts()`: classes of channels that parameters make and read, and nothing else touches."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.views: dict[int, View] = {}
        self.numbers: dict[int, Tensor] = {}
        self.kept: list[Any] = []
        self.up: list[int] = []
        self.dead: set[int] = set()
        self.makes: dict[Slot, Tensor] = {}
        self.reads: dict[Slot, Tensor] = {}
        for name, parameter in model.named_parameters():
            self.views[id(parameter)] = View(name, tuple(range(parameter.dim())))

    # ------------------------------------------------------------------ classes of channels
    def find(self, number: int) -> int:
        """Return the leader of a channel's class."""
        while self.up[number] != number:
            self.up[number] = number = self.up[self.up[number]]
        return number

    def fresh(self, count: int) -> Tensor:
        """Return new channel numbers."""
        start = len(self.up)
        self.up += range(start, start + count)
        return torch.arange(start, start + count)

    def same(self, a: Tensor, b: Tensor) -> None:
        """Channels at equal places are scaled alike; where only one side has a number, it is dead."""
        if torch.equal(a, b):
            return
        base = len(self.up) + 1
        for code in ((a + 1).reshape(-1) * base + (b + 1).reshape(-1)).unique().tolist():
            one, two = code // base - 1, code % base - 1
            if one < 0 or two < 0:
                self.dead |= {self.find(n) for n in (one, two) if n >= 0}
            elif (first := self.find(one)) != (second := self.find(two)):
                low, high = min(first, second), max(first, second)
                self.up[high] = low
                if high in self.dead:
                    self.dead.add(low)

    def kill(self, numbers: Tensor | None) -> None:
        """These channels meet something that does not keep their scale."""
        if numbers is not None:
            self.dead.update(self.find(n) for n in numbers.unique().tolist() if n >= 0)

    def alive(self, numbers: Tensor | None) -> bool:
        """Whether any of these channels can still be scaled."""
        if numbers is None:
            return False
        return any(n >= 0 and self.find(n) not in self.dead for n in numbers.unique().tolist())

    def of(self, tensor: Any) -> Tensor | None:
        """Return the channel numbers of a tensor, None if it has none."""
        return self.numbers.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def set(self, tensor: Tensor, numbers: Tensor | None) -> None:
        """Give a tensor its channel numbers."""
        self.numbers.pop(id(tensor), None)
        if numbers is None or not bool((numbers >= 0).any()):
            return
        if numbers.stride() != tensor.stride() and 0 not in tensor.stride():  # so that views work alike on both
            numbers = torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.int64).copy_(numbers)
        self.numbers[id(tensor)] = numbers

    # ------------------------------------------------------------------ parameters
    def make(self, slot: Slot | None, out: Tensor, dim: int) -> None:
        """`out` has a fresh channel for each index of `dim`, made by a parameter's dimension."""
        size = out.shape[dim]
        numbers = self.fresh(size)
        self._use(self.makes, slot, numbers)
        shape = [size if d == dim % out.dim() else 1 for d in range(out.dim())]
        self.set(out, numbers.reshape(shape).expand(out.shape))

    def also_makes(self, slot: Slot, numbers: Tensor) -> None:
        """A bias is scaled with the channels that it is added to."""
        self._use(self.makes, slot, numbers)

    def read(self, slot: Slot, x: Tensor, dim: int) -> None:
        """The channels of `x` along `dim` are summed up with the weights in a parameter's dimension."""
        numbers = self._along(x, dim)
        if numbers is None:
            self.kill(self.of(x))
            numbers = torch.full((x.shape[dim],), -1)
        self._use(self.reads, slot, numbers)

    def _use(self, table: dict[Slot, Tensor], slot: Slot | None, numbers: Tensor) -> None:
        if slot is None:
            self.kill(numbers)
            return
        if slot in table:
            self.same(table[slot], numbers)
        table[slot] = numbers
        other = self.reads if table is self.makes else self.makes
        if slot in other:
            self.kill(numbers)
            self.kill(other[slot])

    def _along(self, x: Tensor, dim: int) -> Tensor | None:
        """Return the numbers along one dimension if they are the same everywhere else."""
        numbers = self.of(x)
        if numbers is None:
            return None
        rows = numbers.movedim(dim, -1).reshape(-1, numbers.shape[dim])
        return rows[0] if bool((rows == rows[0]).all()) else None

    # ------------------------------------------------------------------ operators
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.kept.append((args, kwargs, out))  # numbers and views are known by identity, so everything lives on
        name = func.overloadpacket.__name__
        given = [t for _, t in leaves((args, kwargs))]
        if name.endswith("_like") or name.startswith("new_"):  # only the shape is looked at
            return out
        if name in MOVES:
            self._move(name, func, args, kwargs, out, given)
        elif any(self.of(t) is not None or id(t) in self.views for t in given):
            self._compute(name, args, kwargs, out, given)
        return out

    def _move(self, name: str, func: Any, args: Any, kwargs: Any, out: Any, given: list[Tensor]) -> None:
        view = self.views.get(id(args[0])) if args else None
        if view is not None and isinstance(out, Tensor):
            self._view(name, args, out, view)
            return
        if not any(self.of(t) is not None for t in given):
            return

        def numbers(value: Any) -> Any:
            if isinstance(value, Tensor):
                known = self.of(value)
                if known is not None:
                    return known
                return value if not value.is_floating_point() else torch.full(value.shape, -1)
            return type(value)(map(numbers, value)) if isinstance(value, list | tuple) else value

        if name == "_to_copy":
            self.set(out, self.of(args[0]))
            return
        if name == "constant_pad_nd":
            args = (*args[:2], -1)
        moved = func(*numbers(args), **{k: v for k, v in kwargs.items() if k not in ("dtype", "device", "memory_format")})
        for (_, t), (_, n) in zip(leaves(out), leaves(moved), strict=True):
            self.set(t, n)

    def _view(self, name: str, args: Any, out: Tensor, view: View) -> None:
        dims = list(view.dims)
        if name == "t":
            dims = dims[::-1]
        elif name == "transpose":
            a, b = args[1] % len(dims), args[2] % len(dims)
            dims[a], dims[b] = dims[b], dims[a]
        elif name == "permute":
            dims = [dims[d] for d in args[1]]
        elif name == "select":
            if args[1] % len(dims) == 0 and dims[0] == 0:
                self.views[id(out)] = View(f"{view.name}[{args[2]}]", tuple(dims[1:]))
            return
        elif name not in ("detach", "alias", "clone", "_to_copy", "expand") or out.dim() != len(dims):
            return
        self.views[id(out)] = View(view.name, tuple(dims))

    def _compute(self, name: str, args: Any, kwargs: Any, out: Any, given: list[Tensor]) -> None:
        from modelopt.torch.trace.flow_ops import HANDLERS

        handler = HANDLERS.get(name)
        outs = [t for _, t in leaves(out)]
        if handler is None or not outs or not handler(self, name, args, kwargs, outs[0]):
            for tensor in given:
                self.kill(self.of(tensor))

    # ------------------------------------------------------------------ the answer
    def parts(self) -> list[tuple[dict[Slot, Tensor], dict[Slot, Tensor]]]:
        """Return (made by, read by) of every group of classes: each maps a parameter dimension to class numbers, -1 for none."""
        dead = {self.find(n) for n in self.dead}
        leaders = torch.tensor([self.find(n) for n in range(len(self.up))] + [-1])

        def classes(table: dict[Slot, Tensor]) -> dict[Slot, Tensor]:
            return {slot: leaders[numbers] for slot, numbers in table.items()}

        made, read = classes(self.makes), classes(self.reads)
        have = [{n for t in table.values() for n in t.tolist()} for table in (made, read)]
        good = (have[0] & have[1]) - dead - {-1}
        group: dict[int, int] = {}

        def top(n: int) -> int:
            while group[n] != n:
                n = group[n]
            return n

        users: dict[Slot, list[int]] = defaultdict(list)
        for table in (made, read):
            for slot, numbers in table.items():
                users[slot] += [n for n in dict.fromkeys(numbers.tolist()) if n in good]
        for members in users.values():
            for n in members:
                group.setdefault(n, n)
            for n in members[1:]:
                group[top(n)] = top(members[0])
        found: dict[int, tuple[dict[Slot, Tensor], dict[Slot, Tensor]]] = {}
        for position, table in enumerate((made, read)):
            for slot, numbers in table.items():
                if users[slot]:
                    kept = torch.tensor([n if n in good else -1 for n in numbers.tolist()])
                    found.setdefault(top(users[slot][0]), ({}, {}))[position][slot] = kept
        return list(found.values())


def follow(model: nn.Module, dummy_input: Any = None) -> Flow:
    """Run `model` once and return what was seen. What the model returns must keep its scale."""
    model = unwrap_model(model)
    flow = Flow(model)
    result = run(model, resolve_inputs(model, dummy_input), lambda: flow)
    for _, tensor in leaves(result):
        flow.kill(flow.of(tensor))
    return flow
