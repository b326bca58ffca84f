"""Solves a model's own size arithmetic for the attribute values that a pruned model needs, and gives back what it cannot shrink.

Unknowns are the int attributes; every `Size` is known once it is said which atoms are dropped. Order: equations with a bare
attribute, then equations with one unknown, then a small deterministic search. What stays false names a line of code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelopt.torch.trace.axes.expr import Attr, Equation, Expr, Size, evaluate, is_leaf, leaves

_BRUTE = 1 << 16
_SEARCH = 3000

Values = dict[Any, int]


@dataclass(frozen=True)
class Repair:
    """What pruning does to the attributes: `values` of those that change, and the equations that no values can satisfy."""

    values: dict[Attr, int]
    unsatisfied: tuple[Equation, ...]
    known: frozenset[Attr] = frozenset()


class System:
    """The equations of one analysis: torch's own layers first, then what the code did, then that nothing becomes empty."""

    def __init__(self, axes: Any):
        provenance = axes.provenance
        self.axes = axes
        self._rows: dict[int, NDArray[np.int64] | None] = {}
        self.originals: dict[Attr, int] = dict(provenance.values)
        self.equations = [e for e in dict.fromkeys(self._gather(axes, provenance)) if self._sane(e)]
        self.sizes: tuple[Size, ...] = tuple(dict.fromkeys(s for e in self.equations for s in e.leaves() if isinstance(s, Size)))
        known = set(self.equations)
        more = [Equation(s, ">", 0, "an empty part") for s in self.sizes if type(s) is Size]
        self.equations += [e for e in more if e not in known]
        self.of_attr: dict[Attr, list[Equation]] = {}
        for equation in self.equations:
            for leaf in equation.leaves():
                if isinstance(leaf, Attr):
                    self.of_attr.setdefault(leaf, []).append(equation)

    def _gather(self, axes: Any, provenance: Any) -> Iterable[Equation]:
        for row in provenance.standard:
            shape = axes.parameters.get(row.parameter)
            if shape is None:
                continue
            axis = shape[row.dim]
            total = self.originals[row.attr]
            factor = self.originals[row.times] if isinstance(row.times, Attr) else row.times
            length: Expr = total // factor if axis is None else Size(axis)
            right = length if row.times == 1 else ("*", row.times, length)
            yield Equation(row.attr, "==", right, f"{row.attr} of a layer of torch")
        yield from provenance.equations
        yield from provenance.identities
        for name, shape in axes.parameters.items():
            for dim, axis in enumerate(shape):
                if axis is not None:
                    yield Equation(Size(axis), ">", 0, f"dim {dim} of {name} would be empty")

    def _sane(self, equation: Equation) -> bool:
        """True if the equation holds in the model as it is; only then does it say anything about the pruned one."""
        values: Values = dict(self.originals)
        for leaf in equation.leaves():
            if isinstance(leaf, Size):
                values[leaf] = leaf.count(np.ones(len(leaf.axis), dtype=np.bool_))
            elif leaf not in values:
                return False
        return equation.holds(values)

    def dead(self, drop: Iterable[int]) -> NDArray[np.bool_]:
        """The dropped atoms as a mask by atom."""
        mask = np.zeros(self.axes.store.count, dtype=np.bool_)
        mask[np.fromiter(drop, dtype=np.int64)] = True
        return mask

    def counts(self, dead: NDArray[np.bool_], sizes: Iterable[Size] | None = None) -> Values:
        """The value of each Size once the atoms marked in `dead` are gone."""
        live: dict[int, NDArray[np.bool_]] = {}
        out: Values = {}
        for size in self.sizes if sizes is None else sizes:
            key = id(size.axis)
            if key not in live:
                rows = self._rows_of(size.axis)
                gone = np.zeros((len(size.axis), 1), np.bool_) if rows is None else dead[rows].reshape(len(rows), -1)
                live[key] = np.logical_not(gone.any(axis=1))
            out[size] = size.count(live[key])
        return out

    def _rows_of(self, axis: Any) -> NDArray[np.int64] | None:
        """The atoms of each position of an axis (one column where one is enough); None for an axis that is never pruned."""
        if id(axis) not in self._rows:
            resolved = self.axes.resolve(axis)
            self._rows[id(axis)] = (
                None if resolved is None else resolved.ids if not resolved.composite else self.axes.store.rows(resolved.ids)
            )
        return self._rows[id(axis)]

    def atoms(self, size: Size) -> list[int]:
        """The atoms that decide a size, in order."""
        return [int(a) for a in self.axes.axis_atoms(size.axis)]


def system_of(axes: Any) -> System:
    """The System of an analysis, built once."""
    system = axes.__dict__.get("_system")
    if system is None:
        system = axes.__dict__["_system"] = System(axes)
    return system


def solve(axes: Any, drop: Iterable[int]) -> Repair:
    """Return the attribute values of the model without the atoms in `drop`, and the equations that cannot hold then."""
    system = system_of(axes)
    values, known = solve_equations(system.equations, system.counts(system.dead(drop)), system.originals)
    bad = tuple(e for e in system.equations if not e.holds(values))
    changed = {a: values[a] for a in system.originals if values[a] != system.originals[a]}
    return Repair(changed, bad, frozenset(known))


def solve_equations(equations: Sequence[Equation], sizes: Values, originals: Mapping[Attr, int]) -> tuple[Values, set[Attr]]:
    """Return a value for every leaf, and which attributes the equations determined; the others keep their original value."""
    values: Values = {**originals, **sizes}
    known: set[Attr] = set()
    todo = [e for e in equations if e.relation == "=="]
    todo = _bare(todo, values, known)
    _single(todo, values, known)
    _search([e for e in todo if not e.holds(values)], todo, values, known)
    return values, known


def _unknown(expr: Expr, known: set[Attr]) -> list[Attr]:
    return [leaf for leaf in dict.fromkeys(leaves(expr)) if isinstance(leaf, Attr) and leaf not in known]


def _bare(equations: list[Equation], values: Values, known: set[Attr]) -> list[Equation]:
    """Settle `attribute == something known`, repeatedly; returns the equations that settled nothing."""
    progress, rest = True, equations
    while progress:
        progress, left = False, []
        for equation in rest:
            sides = (equation.left, equation.right), (equation.right, equation.left)
            for attr, other in sides:
                if isinstance(attr, Attr) and attr not in known and not _unknown(other, known):
                    value = _evaluate(other, values)
                    if value is not None:
                        values[attr] = value
                        known.add(attr)
                        progress = True
                        break
            else:
                left.append(equation)
        rest = left
    return rest


def _evaluate(expr: Expr, values: Values) -> int | None:
    try:
        return evaluate(expr, values)
    except ArithmeticError:
        return None


def _single(equations: list[Equation], values: Values, known: set[Attr]) -> None:
    """Settle equations with one unknown: at once where it has one solution, by agreement where it has several."""
    while True:
        domains: dict[Attr, list[int]] = {}
        settled = False
        for equation in equations:
            unknown = _unknown(("+", equation.left, equation.right), known)
            if len(unknown) != 1:
                continue
            attr = unknown[0]
            found = solutions(equation, attr, values)
            both = found if attr not in domains else [v for v in domains[attr] if v in set(found)]
            if len(both) == 1:
                values[attr] = both[0]
                known.add(attr)
                domains.pop(attr, None)
                settled = True
            elif both:
                domains[attr] = both
        if settled:
            continue
        choice = next(((a, d) for a, d in domains.items() if values[a] not in d), None)
        if choice is None:
            return
        attr, domain = choice
        values[attr] = max((v for v in domain if v <= values[attr]), default=min(domain))
        known.add(attr)


def solutions(equation: Equation, attr: Attr, values: Values) -> list[int]:
    """Return the values of `attr` with which the equation holds, all else being as in `values`, up to its present value."""
    for side, other in ((equation.left, equation.right), (equation.right, equation.left)):
        count = sum(leaf == attr for leaf in leaves(side))
        if count == 1 and attr not in set(leaves(other)):
            goal = _evaluate(other, values)
            return [] if goal is None else _invert(side, attr, goal, values)
    old = values[attr]
    found = [v for v in range(1, min(old, _BRUTE) + 1) if equation.holds({**values, attr: v})]
    return found


def _invert(expr: Expr, attr: Attr, goal: int, values: Values) -> list[int]:
    """Solve `expr == goal` for the one occurrence of `attr` in it."""
    if is_leaf(expr):
        return [goal]
    op, left, right = expr
    inside_left = any(leaf == attr for leaf in leaves(left))
    inner, outer = (left, right) if inside_left else (right, left)
    constant = _evaluate(outer, values)
    if constant is None:
        return []
    exact: dict[str, Callable[[], list[int]]] = {
        "+": lambda: [goal - constant],
        "-": lambda: [goal + constant] if inside_left else [constant - goal],
        "*": lambda: [goal // constant] if constant and goal % constant == 0 else [],
    }
    if op in exact:
        return [v for g in exact[op]() for v in _invert(inner, attr, g, values)]
    if op == "//" and inside_left and constant > 0 and is_leaf(inner):
        return list(range(max(goal * constant, 1), goal * constant + min(constant, _BRUTE)))
    top = min(values[attr], _BRUTE)
    equation = Equation(expr, "==", goal)
    return [v for v in range(1, top + 1) if equation.holds({**values, attr: v})]


def _search(bad: list[Equation], equations: list[Equation], values: Values, known: set[Attr]) -> None:
    """Change one unknown, then two at a time, so that broken equations with several unknowns hold; the first solution wins."""
    for equation in bad:
        if equation.holds(values):
            continue
        unknown = _unknown(("+", equation.left, equation.right), known)
        budget = [_SEARCH]
        if any(_try(equation, [], a, equations, values, known, budget) for a in unknown):
            continue
        for first in unknown:
            for value in _candidates(values[first]):
                trial = [(first, value)]
                if any(_try(equation, trial, a, equations, values, known, budget) for a in unknown if a != first):
                    break
            else:
                continue
            break


def _candidates(old: int) -> list[int]:
    """Values that a pruned size may have, likely ones first: divisors of the old one, then all below it."""
    top = min(old, 1024)
    return sorted(range(1, top + 1), key=lambda v: (old % v != 0, -v))


def _try(
    equation: Equation, fixed: list[tuple[Attr, int]], attr: Attr, equations: list[Equation], values: Values, known: set[Attr],
    budget: list[int],
) -> bool:  # fmt: skip
    """Solve for `attr` with some others set; keep the values if no equation of theirs that held is broken."""
    if budget[0] <= 0:
        return False
    trial: Values = {**values, **dict(fixed)}
    touched = {attr, *(a for a, _ in fixed)}
    near = [e for e in equations if touched & set(e.leaves())]
    for value in solutions(equation, attr, trial)[:8]:
        budget[0] -= 1
        trial[attr] = value
        if all(e.holds(trial) for e in near):
            values.update({a: trial[a] for a in touched})
            known.update(touched)
            return True
    return False
