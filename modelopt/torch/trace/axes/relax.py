"""Gives back atoms until a model's own integer arithmetic holds again, and says which families are bound to one another.

`C // num_heads == head_dim` (Swin) cannot hold for every C: the smallest part of the smallest family that makes it hold returns.
Deterministic: equations in the order of the code, families in their order, atoms by priority and then by number.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelopt.torch.trace.axes.expr import Attr, Equation, Size, Where
from modelopt.torch.trace.axes.solve import System, solve, solve_equations, system_of

_ROUNDS = 400
_TRIALS = 300
_HOPS = 2
_NEAR = 60


def relax(axes: Any, drop: Iterable[int], priority: Mapping[int, float] | None = None) -> tuple[frozenset[int], tuple[str, ...]]:
    """Return (a subset of `drop` with which every equation has a solution, why the rest stays: families, line of code).

    Atoms of high `priority` are given back first.
    """
    system = system_of(axes)
    left = frozenset(drop)
    reasons: list[str] = []
    for _ in range(_ROUNDS):
        bad = solve(axes, left).unsatisfied
        if not bad:
            break
        touched: set[Attr | Size] = set()
        for equation in bad:  # those that share nothing with what was repaired in this round are repaired in it too
            near = _near(system, equation)
            reach = {leaf for e in near for leaf in e.leaves()}
            if touched & reach:
                continue
            touched |= reach
            if equation is not bad[0] and equation not in _broken(system, near, system.dead(left)):
                continue  # what was given back meanwhile repaired it
            back = _give_back(system, equation, near, left, priority or {}) or (left if equation is bad[0] else frozenset())
            if back:
                reasons.append(_reason(axes, equation, back))
                left -= back
    return left, tuple(reasons)


def _reason(axes: Any, equation: Equation, back: frozenset[int]) -> str:
    names = [f"{name} (+{count})" for name, count in _by_family(axes, back).items()]
    return f"kept {', '.join(names)}: {equation}"


def family_names(axes: Any) -> dict[int, str]:
    """Atom -> name of its family; built once."""
    names = axes.__dict__.get("_family_names")
    if names is None:
        names = axes.__dict__["_family_names"] = {a: f.name for f in axes.families for a in f.atoms}
    return names


def _by_family(axes: Any, atoms: Iterable[int]) -> dict[str, int]:
    names = family_names(axes)
    out: dict[str, int] = {}
    for atom in sorted(atoms):
        name = names.get(atom, f"atom {atom}")
        out[name] = out.get(name, 0) + 1
    return out


def _atoms(system: System, sizes: Iterable[Size]) -> set[int]:
    out: set[int] = set()
    for size in sizes:
        out.update(system.atoms(size))
    return out


def _near(system: System, equation: Equation) -> list[Equation]:
    """The equation, all that share an attribute with it, and all that share one with those."""
    out = {equation: None}
    for _ in range(_HOPS):
        attrs = dict.fromkeys(a for e in out for a in e.leaves() if isinstance(a, Attr))
        more = {e: None for a in attrs for e in system.of_attr.get(a, [])}
        if len(out) + len(more) > _NEAR and len(out) > 1:
            break
        out.update(more)
    return list(out)


def _give_back(
    system: System, equation: Equation, near: list[Equation], drop: frozenset[int], priority: Mapping[int, float]
) -> frozenset[int]:  # fmt: skip
    """The atoms to give back for one equation that cannot hold; none where it sees no dropped atom."""
    groups = _dropped_families(system, [equation], drop) or _dropped_families(system, near, drop)
    if not groups:
        return frozenset()
    ordered = [sorted(g, key=lambda a: (-priority.get(a, 0.0), a)) for g in groups]
    found = _smallest(system, equation, near, ordered, drop)
    if found is not None:
        return found
    wider = _dropped_families(system, near, drop)
    if len(wider) > len(groups):
        ordered_wider = [sorted(g, key=lambda a: (-priority.get(a, 0.0), a)) for g in wider]
        found = _smallest(system, equation, near, ordered_wider, drop)
    return found if found is not None else frozenset(ordered[0])


def _dropped_families(system: System, equations: Iterable[Equation], drop: frozenset[int]) -> list[list[int]]:
    """The dropped atoms that the equations can see, by family, those with fewest first."""
    names = family_names(system.axes)
    groups: dict[str, list[int]] = {}
    sizes = dict.fromkeys(s for e in equations for s in e.leaves() if isinstance(s, Size))
    for atom in sorted(_atoms(system, sizes) & drop):
        groups.setdefault(names.get(atom, str(atom)), []).append(atom)
    return sorted(groups.values(), key=lambda g: (len(g), g))


def _smallest(
    system: System, equation: Equation, near: list[Equation], groups: list[list[int]], drop: frozenset[int]
) -> frozenset[int] | None:  # fmt: skip
    """The least share of at most two families with which the equation holds and least is broken near it, if there is one."""
    dead = system.dead(drop)
    before = _broken(system, near, dead)
    best: tuple[int, list[int]] | None = None
    for back in itertools.islice(_offers(groups), _TRIALS):
        dead[back] = False
        broken = _broken(system, near, dead)
        dead[back] = True
        if equation not in broken and len(broken) < (len(before) if best is None else best[0]):
            best = len(broken), back
            if not broken:
                break
    return None if best is None else frozenset(best[1])


def _broken(system: System, near: list[Equation], dead: NDArray[np.bool_]) -> list[Equation]:
    """Those of a few equations that cannot hold together without the dead atoms."""
    sizes = dict.fromkeys(s for e in near for s in e.leaves() if isinstance(s, Size))
    attrs = {a: system.originals[a] for e in near for a in e.leaves() if isinstance(a, Attr)}
    values, _ = solve_equations(near, system.counts(dead, sizes), attrs)
    return [e for e in near if not e.holds(values)]


def _offers(groups: list[list[int]]) -> Iterable[list[int]]:
    """Sets of atoms to give back, the smallest share of their families first."""
    single = sorted((n / len(g), k, n) for k, g in enumerate(groups[:4]) for n in _steps(len(g)))
    half = len(single) and _TRIALS // 2
    for _, k, n in single[:half]:
        yield groups[k][:n]
    if len(groups) > 1:
        few = groups[:3]
        pairs = [
            (n / len(few[i]) + m / len(few[j]), i, n, j, m)
            for i, j in itertools.combinations(range(len(few)), 2)
            for n in _steps(len(few[i]), 16)
            for m in _steps(len(few[j]), 16)
        ]
        for _, i, n, j, m in sorted(pairs):
            yield few[i][:n] + few[j][:m]


def _steps(n: int, most: int = 96) -> list[int]:
    """Up to `most` numbers from 1 to n, evenly spread, n among them."""
    step = -(-n // most)
    return sorted({*range(step, n + 1, step), n})


@dataclass(frozen=True)
class Tie:
    """Families that one line of code needs in step: `count(families[i]) / ratios[i]` must be the same for all i."""

    families: tuple[str, ...]
    ratios: tuple[int, ...]
    where: Where


def tied(axes: Any) -> tuple[Tie, ...]:
    """Return the families whose counts one equation or one shared attribute binds to each other, by pairs.

    >>> [t.families for t in tied(axes)]  # doctest: +SKIP
    [('layers.0.q.weight.0', 'layers.1.q.weight.0')]
    """
    system = system_of(axes)
    ties: dict[tuple[str, str], Tie] = {}
    holders: dict[Attr, tuple[Size, Equation]] = {}
    for equation in system.equations:
        if equation.relation != "==":
            continue
        sides = (equation.left, equation.right)
        for one, other in (sides, sides[::-1]):
            if isinstance(one, Attr) and isinstance(other, Size):
                first = holders.setdefault(one, (other, equation))
                _tie(axes, first[0], other, equation, ties)
                break
        else:
            if all(isinstance(s, Size) for s in sides):
                _tie(axes, sides[0], sides[1], equation, ties)
    return tuple(ties.values())


def _tie(axes: Any, a: Size, b: Size, equation: Equation, ties: dict[tuple[str, str], Tie]) -> None:
    one, two = _family_of(axes, a), _family_of(axes, b)
    if one is not None and two is not None and one[0] != two[0]:
        pair = (one[0], two[0])
        ties.setdefault(pair, Tie(pair, (one[1], two[1]), equation.where))


def _family_of(axes: Any, size: Size) -> tuple[str, int] | None:
    """(name, atoms) of the one family that decides a size, position by position; None where several do."""
    if type(size) is not Size or size.start or size.stop != len(size.axis):
        return None
    atoms = system_of(axes).atoms(size)
    owners = _by_family(axes, atoms)
    return (next(iter(owners)), len(atoms)) if len(owners) == 1 else None
