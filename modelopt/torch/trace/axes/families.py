"""What axis inference found: families of slices that go together, where they sit, and which slices survive a removal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelopt.core.errors import UnknownNameError, did_you_mean
from modelopt.torch.trace.axes.kinds import kinds_of, link_experts
from modelopt.torch.trace.axes.labels import Axis, Ids, LabelStore, canonical
from modelopt.torch.trace.axes.record import ModuleCall, OpCall, Recorder, TensorRef, natural

UNUSED = "nothing else depends on it: it was not computed with, or only looked up"


class Slot:
    """One dimension of one parameter in which a family lives. `positions[i]` are the indices that go with atom i."""

    __slots__ = ("_axes", "_axis", "_family", "dim", "parameter")

    def __init__(self, parameter: str, dim: int, axis: Axis, axes: Axes, family: Family | None = None) -> None:
        self.parameter, self.dim, self._axis, self._axes, self._family = parameter, dim, axis, axes, family

    @property
    def positions(self) -> tuple[Ids, ...]:
        """The indices of this dimension that each atom of the family carries."""
        assert self._family is not None
        return self._axes.positions(self._axis, self._family)

    @property
    def copies(self) -> bool:
        """Whether an atom stands at several positions that nothing else in their labels tells apart."""
        assert self._family is not None
        return self._axes.places(self._axis, self._family)[1]

    @property
    def multiple(self) -> int:
        """How many indices of this dimension one atom carries (the most, where atoms differ)."""
        return max((len(p) for p in self.positions), default=0)

    def __repr__(self) -> str:
        return f"Slot({self.parameter!r}, {self.dim})"


@dataclass(frozen=True, eq=False)
class Family:
    """Slices of many parameters that are alike: any of them may be removed, each with all of its slots."""

    name: str
    kind: str
    atoms: tuple[int, ...]
    slots: tuple[Slot, ...]
    least: int = 1  # as many must survive: a router chooses so many experts
    soft: str | None = None  # the policy without which it is kept

    @property
    def size(self) -> int:
        """Number of atoms."""
        return len(self.atoms)

    @cached_property
    def multiple(self) -> int:
        """How many indices of its widest dimension one atom carries."""
        return max((s.multiple for s in self.slots), default=1)

    @cached_property
    def regular(self) -> bool:
        """Whether it is known which position of one atom answers to which of another, so that atoms can be exchanged.

        Copies of an atom (a channel used twice) answer to one another in order where they lie alike for all atoms.
        """
        copied = [np.array(s.positions) for s in self.slots if s.copies and len(set(map(len, s.positions))) == 1]
        if len(copied) != sum(s.copies for s in self.slots):
            return False
        alike = all(bool((np.diff(p, axis=1) == np.diff(p[0])).all()) for p in copied)
        return alike and all(bool((np.argsort(p[:, 0]) == np.argsort(copied[0][:, 0])).all()) for p in copied)

    def __repr__(self) -> str:
        return f"Family({self.name!r}, {self.kind}, size={self.size}, slots={len(self.slots)})"


@dataclass(frozen=True)
class Frozen:
    """A dimension of a parameter that is kept, and why; `soft` names the policy that would lift it."""

    parameter: str
    dim: int
    reason: str
    op: str
    where: str
    module: str = ""
    soft: str | None = None


@dataclass(eq=False)
class Axes:
    """The result of `infer_axes`."""

    store: LabelStore
    parameters: dict[str, tuple[Axis | None, ...]]
    groups: dict[str, tuple[int, Axis | None]]
    unknown_ops: dict[str, int]
    calls: tuple[ModuleCall, ...]
    ops: tuple[OpCall, ...] | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    original: dict[str, tuple[Axis | None, ...]] = field(default_factory=dict, repr=False)
    aliases: dict[str, str] = field(default_factory=dict, repr=False)
    output: Any = field(default=None, repr=False)
    provenance: Any = field(default=None, repr=False)
    kinds: dict[int, str] = field(default_factory=dict, repr=False)
    least: tuple[tuple[Axis, int], ...] = field(default=(), repr=False)

    @property
    def num_atoms(self) -> int:
        """One more than the greatest atom: the length of an array that is indexed by atoms."""
        return self.store.count

    @property
    def equations(self) -> tuple[Any, ...]:
        """What the model's code asked of its sizes."""
        return () if self.provenance is None else self.provenance.equations

    @cached_property
    def families(self) -> tuple[Family, ...]:
        """Every prunable family, in natural order of its first slot."""
        return tuple(_families(self))

    def family(self, name: str) -> Family:
        """The family of this name. Raises UnknownNameError, with the nearest name."""
        for family in self.families:
            if family.name == name:
                return family
        names = [f.name for f in self.families]
        raise UnknownNameError(f'There is no family "{name}".{did_you_mean(name, names)} There are {len(names)}.')

    @cached_property
    def frozen(self) -> tuple[Frozen, ...]:
        """Every dimension of a parameter (of size > 1) that is kept throughout, with the reason."""
        out = []
        for name, axes in self.original.items():
            for dim, axis in enumerate(axes):
                if axis is not None and self.parameters[name][dim] is None:
                    reason = self.store.explain(axis.start)
                    out.append(Frozen(name, dim, reason.text, reason.op, reason.where, reason.module, reason.soft))
        return tuple(out)

    def atoms(self, label: int) -> tuple[int, ...]:
        """The atoms of a label."""
        return tuple(self.store.atoms(self.store.resolve_ids(np.array([label], dtype=np.int64))).tolist())

    def resolve(self, axis: Axis | None) -> Axis | None:
        """An axis that was read during the trace, as it is now."""
        return self.store.resolve(axis)

    def incidence(self, axis: Axis | None) -> tuple[Ids, Ids]:
        """(positions, atoms): position positions[i] of this axis goes when atoms[i] goes; sorted by position."""
        axis = self.store.resolve(axis)
        if axis is None:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        cache = self.__dict__.setdefault("_incidence", {})
        if axis not in cache:
            rows = self.store.rows(axis.ids)
            where, column = np.nonzero(rows)
            cache[axis] = where, rows[where, column]
        return cache[axis]

    def axis_atoms(self, axis: Axis | None) -> Ids:
        """The distinct atoms of an axis, sorted."""
        axis = self.store.resolve(axis)
        return np.zeros(0, dtype=np.int64) if axis is None else self.store.atoms(axis.ids)

    def live(self, axis: Axis, drop: Iterable[int]) -> NDArray[np.bool_]:
        """Which positions of an axis survive the removal of these atoms."""
        mask = np.ones(len(axis), dtype=bool)
        kept = self.survivors(drop).of(axis)
        if kept is not None:
            mask[:] = False
            mask[kept] = True
        return mask

    def count(self, axis: Axis, drop: Iterable[int]) -> int:
        """How many positions of an axis survive the removal of these atoms."""
        return self.survivors(drop).count(axis, len(axis))

    def survivors(self, drop: Iterable[int]) -> Survivors:
        """What survives the removal of these atoms; the last answer is kept."""
        drop = frozenset(drop)
        last = self.__dict__.get("_survivors")
        if last is None or (last[0] is not drop and last[0] != drop):
            last = self.__dict__["_survivors"] = (drop, Survivors(self.store, drop))
        return last[1]

    def kept(self, drop: Iterable[int]) -> dict[str, tuple[Ids | None, ...]]:
        """The indices of each dimension of each parameter that survive the removal of these atoms; None means all."""
        survivors = self.survivors(drop)
        return {name: tuple([survivors.of(a) for a in axes]) for name, axes in self.parameters.items()}

    def solve(self, drop: Iterable[int]) -> Any:
        """The attribute values that a model without these atoms needs, and what cannot be satisfied."""
        from modelopt.torch.trace.axes.solve import solve

        return solve(self, drop)

    def relax(self, drop: Iterable[int], priority: Mapping[int, float] | None = None) -> tuple[frozenset[int], tuple[str, ...]]:
        """The part of `drop` with which the model's own integer arithmetic holds, and why the rest stays."""
        from modelopt.torch.trace.axes.relax import relax

        return relax(self, drop, priority)

    @cached_property
    def tied(self) -> tuple[Any, ...]:
        """Families whose counts one line of the model's code binds to each other."""
        from modelopt.torch.trace.axes.relax import tied

        return tied(self)

    def apply(self, model: Any, drop: Iterable[int]) -> Any:
        """Remove these atoms from `model`, in place: parameters, attributes, configs. Nothing changes before all is proven."""
        from modelopt.torch.trace.axes.apply import apply

        return apply(self, model, drop)

    def positions(self, axis: Axis, family: Family) -> tuple[Ids, ...]:
        """For each atom of a family its positions in an axis, those of like labels (but for the atom) in like order."""
        return self.places(axis, family)[0]

    def places(self, axis: Axis, family: Family) -> tuple[tuple[Ids, ...], bool]:
        """The positions, and whether some of one atom have the same label throughout."""
        key = (axis, family.atoms)
        cache = self.__dict__.setdefault("_positions", {})
        if key not in cache:
            rows = self.store.rows(axis.ids)
            mine = np.array(family.atoms, dtype=np.int64)
            where, column = np.nonzero(np.isin(rows, mine))
            atoms = rows[where, column]
            rest = rows[where]
            rest[np.arange(len(where)), column] = 0
            rest = canonical(rest)
            order = np.lexsort((where, *rest.T[::-1], atoms))
            where, rest = where[order], rest[order]
            bounds = np.searchsorted(atoms[order], mine)
            positions = tuple(where[a:b] for a, b in zip(bounds, [*bounds[1:], len(where)], strict=True))
            same = (atoms[order][1:] == atoms[order][:-1]) & (rest[1:] == rest[:-1]).all(axis=1)
            cache[key] = positions, bool(same.any())
        return cache[key]


class Survivors:
    """Which labels survive the removal of some atoms; answers are kept per axis."""

    def __init__(self, store: LabelStore, drop: Iterable[int]) -> None:
        self.store = store
        self.dead: NDArray[np.bool_] = np.zeros(store.count, dtype=bool)
        gone = np.fromiter(drop, dtype=np.int64)
        self.dead[gone] = True
        self.any = bool(gone.size)
        self._known: dict[Axis, Ids] = {}

    def of(self, axis: Axis | None) -> Ids | None:
        """The surviving positions of an axis, or None where the axis is never pruned."""
        axis = self.store.resolve(axis)
        if axis is None:
            return None
        if axis not in self._known:
            alive = ~self.dead[axis.ids] if not axis.composite else ~self.dead[self.store.rows(axis.ids)].any(axis=1)
            self._known[axis] = np.flatnonzero(alive)
        return self._known[axis]

    def count(self, axis: Axis | None, size: int) -> int:
        """How many of `size` slices survive."""
        kept = self.of(axis)
        return size if kept is None else len(kept)


def make_axes(recorder: Recorder, output: Any = None) -> Axes:
    """The result of a finished recording; outputs must have been frozen."""
    store = recorder.store
    original = {n: recorder.axes(t) for n, t in recorder.parameters.items()}
    recorder.roles["experts"] = link_experts(store, [(a, m, s) for a, m, s, _ in recorder.chosen])
    _freeze_unused(store, original)
    resolved = {n: tuple([store.resolve(a) for a in axes]) for n, axes in original.items()}
    names = {alias: resolved[name] for alias, name in recorder.aliases.items()}

    def seen(refs: tuple[TensorRef, ...]) -> tuple[TensorRef, ...]:
        return tuple([TensorRef(r.id, r.shape, r.dtype, tuple([store.resolve(a) for a in r.axes])) for r in refs])

    ops = recorder.ops
    return Axes(
        store=store,
        parameters=resolved | names,
        groups={n: (g, store.resolve(a)) for n, (g, a) in sorted(recorder.groups.items(), key=lambda p: natural(p[0]))},
        unknown_ops=dict(sorted(recorder.unknown.items())),
        calls=tuple(ModuleCall(c.name, c.cls, seen(c.inputs), seen(c.outputs)) for c in recorder.calls),
        ops=None if ops is None else tuple(OpCall(o.op, seen(o.inputs), seen(o.outputs), o.module, o.where) for o in ops),
        shapes={n: tuple(t.shape) for n, t in recorder.parameters.items()},
        original=original,
        aliases=recorder.aliases,
        output=output,
        kinds=kinds_of(store, recorder.roles),
        least=tuple((a, n) for a, n in ((store.resolve(c[0]), c[3]) for c in recorder.chosen) if a is not None and n > 1),
    )


def _freeze_unused(store: LabelStore, original: Mapping[str, tuple[Axis | None, ...]]) -> None:
    """An atom that stands in one dimension of one parameter only was never computed with: it is kept."""
    slots = np.zeros(store.count, dtype=np.int64)
    cache: dict[Axis, Ids] = {}
    for axes in original.values():
        for axis in axes:
            axis = store.resolve(axis)
            if axis is None:
                continue
            if axis not in cache:
                cache[axis] = store.atoms(axis.ids)
            slots[cache[axis]] += 1
    alone = np.flatnonzero(slots == 1)
    if alone.size:
        store.site = lambda: ("", "", "")
        store.freeze_ids(alone, UNUSED)


def _families(axes: Axes) -> list[Family]:
    store = axes.store
    members: dict[int, Ids] = {}
    slots: dict[int, list[Slot]] = defaultdict(list)
    per_axis: dict[Axis, list[int]] = {}
    seen = np.zeros(store.count, dtype=bool)
    for name in axes.original:
        for dim, axis in enumerate(axes.parameters[name]):
            if axis is None:
                continue
            if axis not in per_axis:
                atoms = store.atoms(axis.ids)
                seen[atoms] = True
                per_axis[axis] = np.unique(store.families_of(atoms)).tolist()
            for family in per_axis[axis]:
                slots[family].append(Slot(name, dim, axis, axes))
    atoms = np.flatnonzero(seen)
    owner = store.families_of(atoms) if atoms.size else atoms
    for family in np.unique(owner).tolist():
        members[family] = atoms[owner == family]
    out = []
    taken: set[str] = set()
    for family in sorted(members, key=lambda f: (natural(slots[f][0].parameter), slots[f][0].dim, int(members[f][0]))):
        name = _name(axes, slots[family][0], members[family], taken)
        atoms_of = members[family]
        kind = axes.kinds.get(family, "channels")
        made = Family(
            name,
            kind,
            tuple(atoms_of.tolist()),
            tuple(slots[family]),
            least=max((n for a, n in axes.least if np.isin(store.atoms(a.ids), atoms_of).any()), default=1),
            soft=kind if kind == "experts" else None,
        )
        for slot in made.slots:
            slot._family = made
        out.append(made)
    return out


def _name(axes: Axes, slot: Slot, atoms: Ids, taken: set[str]) -> str:
    """The first slot: parameter and dimension, with the range where it is a part."""
    rows = axes.store.rows(slot._axis.ids)
    where = np.flatnonzero(np.isin(rows, atoms).any(axis=1))
    name = f"{slot.parameter}.{slot.dim}"
    if len(where) != len(slot._axis):
        name += f"[{int(where[0])}:{int(where[-1]) + 1}]"
    base, k = name, 2
    while name in taken:
        name, k = f"{base}#{k}", k + 1
    taken.add(name)
    return name
