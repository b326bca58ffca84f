"""Integers that remember where they came from, so that a size written in a model's own code becomes an equation.

Notation: an expression is an int, a leaf, or a nested tuple `(op, left, right)` with op one of + - * // % **. Leaves are
`Attr(owner, name, index)`, an int attribute of a module or config of the model, and `Size(axis, start, stop)`, the number of
survivors of a stretch of a labelled dimension. An `Equation(left, relation, right)` must hold again after pruning.
"""

from __future__ import annotations

import dis
import linecache
import operator
import os
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray


class Attr(NamedTuple):
    """An int attribute: `owner` is the dotted path of a module or config ("" is the model), `index` a place in a container."""

    owner: str
    name: str
    index: Hashable = None  # type: ignore[assignment]

    def __str__(self) -> str:
        where = f"{self.owner}.{self.name}" if self.owner else self.name
        path = self.index if isinstance(self.index, tuple) else () if self.index is None else (self.index,)
        return where + "".join(f"[{step!r}]" for step in path)


class Size:
    """How many entries `start <= i < stop` of `axis` survive; two of one stretch of one axis are equal."""

    __slots__ = ("axis", "key", "start", "stop")

    def __init__(self, axis: Any, start: int = 0, stop: int | None = None):
        self.axis, self.start, self.stop = axis, start, len(axis) if stop is None else stop
        self.key: tuple[int, ...] = (id(axis), self.start, self.stop)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Size) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"Size({self.start}:{self.stop})"

    def count(self, live: NDArray[np.bool_]) -> int:
        """The value of this leaf, given which positions of the axis survive."""
        return int(live[self.start : self.stop].sum())


class Misplaced(Size):
    """How many survivors a slice with a step would pick wrongly: those of `start::step` before, against `start::step` after."""

    __slots__ = ("step",)

    def __init__(self, axis: Any, start: int, step: int):
        super().__init__(axis, start, len(axis))
        self.step = step
        self.key = (id(axis), start, len(axis), step)

    def count(self, live: NDArray[np.bool_]) -> int:
        """The number of positions in which the two differ."""
        wanted = np.zeros_like(live)
        wanted[self.start :: self.step] = True
        got = np.zeros_like(live)
        got[np.flatnonzero(live)[self.start :: self.step]] = True
        return int(((wanted & live) != got).sum())


Expr = Any  # int | Attr | Size | tuple[str, Expr, Expr]
OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
}
RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_DEPTH = 40  # longer chains (a counter in a loop) are taken as plain numbers


def is_leaf(expr: Expr) -> bool:
    """True for an Attr or a Size."""
    return isinstance(expr, (Attr, Size))


def leaves(expr: Expr) -> Iterator[Attr | Size]:
    """Yield the leaves of `expr` from left to right, repeats included."""
    if is_leaf(expr):
        yield expr
    elif type(expr) is tuple:
        yield from leaves(expr[1])
        yield from leaves(expr[2])


def evaluate(expr: Expr, values: Mapping[Any, int]) -> int:
    """Return the value of `expr`; `values` holds every leaf. Raises ArithmeticError where the new values divide by zero."""
    if type(expr) is tuple:
        return OPERATORS[expr[0]](evaluate(expr[1], values), evaluate(expr[2], values))
    return values[expr] if is_leaf(expr) else expr


def show(expr: Expr) -> str:
    """Return `expr` as text for an error message, a Size as the length it has now."""
    if type(expr) is tuple:
        left, right = (f"({show(e)})" if type(e) is tuple else show(e) for e in expr[1:])
        return f"{left} {expr[0]} {right}"
    return f"size {expr.stop - expr.start}" if isinstance(expr, Size) else str(expr)


@dataclass(frozen=True)
class Where:
    """A line of the model's own code."""

    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        if not self.file:
            return "(unknown line)"
        text = linecache.getline(self.file, self.line).strip()
        return f"{'/'.join(self.file.split(os.sep)[-2:])}:{self.line}: {text}"


@dataclass(frozen=True)
class Equation:
    """`left relation right` held while the model ran; `what` names the operation and `where` the line that used the size."""

    left: Expr
    relation: str
    right: Expr
    what: str = field(default="", compare=False)
    where: Where = field(default=Where(), compare=False)

    def holds(self, values: Mapping[Any, int]) -> bool:
        """True if the relation is true with the given values of the leaves."""
        try:
            return RELATIONS[self.relation](evaluate(self.left, values), evaluate(self.right, values))
        except ArithmeticError:
            return False

    def leaves(self) -> tuple[Attr | Size, ...]:
        """The leaves of both sides, each once, in order of appearance."""
        return tuple(dict.fromkeys([*leaves(self.left), *leaves(self.right)]))

    def __str__(self) -> str:
        return f"{self.where} ({self.what}: {show(self.left)} {self.relation} {show(self.right)})"


_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep


def _foreign(filename: str) -> bool:
    return filename.startswith((_HERE, _TORCH)) or filename.startswith("<frozen")


def where(skip: int = 1) -> Where:
    """Return the nearest calling line outside torch and this package."""
    frame: FrameType | None = sys._getframe(skip)
    while frame is not None:
        if not _foreign(frame.f_code.co_filename):
            return Where(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return Where()


class Recording:
    """The equations and notes of one run of a model; the one that is entered last is the one that listens.

    With `pins`, a size that is used as a number (a softmax scale, a divisor) gives an equation: it must not change.
    """

    active: list[Recording] = []

    def __init__(self, pins: bool = False) -> None:
        self.pins = pins
        self.equations: dict[Equation, None] = {}
        self.lost: dict[Expr, Where] = {}

    def __enter__(self) -> Recording:
        Recording.active.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        Recording.active.remove(self)

    def add(self, left: Expr, relation: str, right: Expr, what: str) -> None:
        """Record a relation that held, once, unless both sides are the same or nothing in it can change."""
        if left == right or not (any(True for _ in leaves(left)) or any(True for _ in leaves(right))):
            return
        equation = Equation(left, relation, right)
        if equation not in self.equations:
            self.equations[Equation(left, relation, right, what, where(2))] = None


class Tainted(int):
    """An int with an expression; every other property is that of the plain number, into which it also pickles and copies."""

    expr: Expr
    home: Recording
    depth: int

    def __new__(cls, value: int, expr: Expr, home: Recording, depth: int = 0) -> Tainted:
        self = int.__new__(cls, value)
        self.expr, self.home, self.depth = expr, home, depth
        return self

    def __hash__(self) -> int:
        return int.__hash__(self)

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return int, (number(self),)

    def __copy__(self) -> int:
        return self if alive(self) else number(self)

    def __deepcopy__(self, memo: object) -> int:
        return self if alive(self) else number(self)

    def __neg__(self) -> int:
        return 0 - self

    def __floor__(self) -> int:
        return self

    def __ceil__(self) -> int:
        return self

    def __int__(self) -> int:
        if alive(self):
            self.home.lost.setdefault(self.expr, where(1))
        return int.__int__(self)

    def __float__(self) -> float:
        as_number(self)
        return int.__float__(self)

    def __truediv__(self, other: Any) -> Any:
        as_number(self)
        return int.__truediv__(self, other)

    def __rtruediv__(self, other: Any) -> Any:
        as_number(self)
        return int.__rtruediv__(self, other)


def alive(value: object) -> bool:
    """True for a Tainted of the run in progress: one that a cache kept from an earlier run is a plain number."""
    return type(value) is Tainted and bool(Recording.active) and value.home is Recording.active[-1]


def expr_of(value: int) -> Expr:
    """Return the expression of an int, for a plain one the number itself."""
    return value.expr if alive(value) else number(value)  # type: ignore[attr-defined]


def as_number(value: Any) -> None:
    """Note that a size became a float: from there on it is not followed, so in a forward pass it must stay what it is."""
    if alive(value):
        value.home.lost.setdefault(value.expr, where(2))
        if value.home.pins:
            value.home.add(value.expr, "==", number(value), "used as a number")


def number(value: int) -> int:
    """The plain number of an int, without noting that it was asked for."""
    return int.__int__(value)


def plain(value: Any) -> Any:
    """Return `value` with every Tainted in it (inside tuples, lists and dicts too) made a plain int; itself if it has none."""
    if type(value) is Tainted:
        return number(value)
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.nn.Module):
        new = [plain(v) for v in value]
        if all(a is b for a, b in zip(new, value, strict=True)):
            return value
        return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
    if type(value) is dict:
        new_dict = {k: plain(v) for k, v in value.items()}
        return value if all(new_dict[k] is value[k] for k in value) else new_dict
    return value


def _arithmetic(symbol: str, name: str, swapped: bool) -> Callable[[Any, Any], Any]:
    plain_op = getattr(int, name)

    def method(self: Tainted, other: Any, *modulus: Any) -> Any:
        result = plain_op(self, other, *modulus)
        if modulus or type(result) is not int:  # NotImplemented for floats, tensors and lists, a float for a negative power
            if isinstance(other, float) or isinstance(result, float):
                as_number(self)
            return result
        depth = 1 + max(self.depth, other.depth if type(other) is Tainted else 0)
        if depth > _DEPTH or not (alive(self) or alive(other)):
            return result
        left, right = expr_of(self), expr_of(other)
        return Tainted(result, (symbol, right, left) if swapped else (symbol, left, right), Recording.active[-1], depth)

    method.__name__ = name
    return method


for _symbol, _name in {"+": "add", "-": "sub", "*": "mul", "//": "floordiv", "%": "mod", "**": "pow"}.items():
    setattr(Tainted, f"__{_name}__", _arithmetic(_symbol, f"__{_name}__", swapped=False))
    setattr(Tainted, f"__r{_name}__", _arithmetic(_symbol, f"__r{_name}__", swapped=True))

_CODES: dict[CodeType, bytes] = {}
_COMPARISONS = frozenset(dis.opmap[n] for n in ("COMPARE_OP", "CONTAINS_OP"))
_OPPOSITE = {"==": "!=", "!=": "==", "<": ">=", "<=": ">", ">": "<=", ">=": "<"}


def _written(frame: FrameType) -> bool:
    """True if the frame is at a comparison in the source: a look-up in a dict or a cache also compares, but means nothing."""
    code = frame.f_code
    if code not in _CODES:
        _CODES[code] = code.co_code
    return _CODES[code][frame.f_lasti] in _COMPARISONS


def _comparison(symbol: str, name: str) -> Callable[[Any, Any], Any]:
    plain_op = getattr(int, name)

    def method(self: Tainted, other: Any) -> Any:
        result = plain_op(self, other)
        if result is NotImplemented or not (alive(self) or alive(other)):
            return result
        relation = symbol if result else _OPPOSITE[symbol]
        both = type(other) is Tainted
        frame = sys._getframe(1)
        # Being unlike a constant is no condition; torch's own layers compare with constants for speed, not for meaning.
        if (relation != "!=" or both) and (both or not _foreign(frame.f_code.co_filename)) and _written(frame):
            Recording.active[-1].add(expr_of(self), relation, expr_of(other), "comparison")
        return result

    method.__name__ = name
    return method


for _symbol, _name in {"==": "__eq__", "!=": "__ne__", "<": "__lt__", "<=": "__le__", ">": "__gt__", ">=": "__ge__"}.items():
    setattr(Tainted, _name, _comparison(_symbol, _name))
