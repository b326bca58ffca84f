"""Labels of tensor dimensions: which slices of which tensors must be removed together.

An *atom* is a positive integer, one per index of a dimension. A *label* is a set of atoms (a conjunction: the slice survives
iff all its atoms survive), interned to an integer: 0 is the empty set (always survives), a positive number is that single atom, a
negative number -1-k is row k of the table of composites. An *axis* is the interned sequence of the labels of one dimension; None
stands for a dimension that is never pruned. Atoms are bound to labels, never unbound; everything else is derived from `bind`.
No torch in here, and no loop over channels: arrays of labels are resolved at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
EMPTY = 0


@dataclass(frozen=True)
class Reason:
    """Why a dimension is kept: what was met, the op, the module and the user's line; `soft` names the policy that lifts it."""

    text: str
    op: str = ""
    module: str = ""
    where: str = ""
    soft: str | None = None


class Axis:
    """The labels of one dimension, in order: one strided run (start, step, count), or an array where they are irregular.

    Made and interned by `LabelStore`; two equal axes of one store are the same object. Expanded to numpy only when asked.
    """

    __slots__ = ("_ids", "_resolved", "_version", "composite", "count", "start", "step")

    def __init__(self, start: int, step: int, count: int, ids: Ids | None = None) -> None:
        self.start, self.step, self.count, self._ids = start, step, count, ids
        self.composite = bool(ids.min() < 0) if ids is not None else min(start, start + step * (count - 1)) < 0
        self._version = -1
        self._resolved: Axis | None = self

    @property
    def ids(self) -> Ids:
        """Label ids, int64, read only."""
        if self._ids is None:
            if self.step:
                ids = np.arange(self.start, self.start + self.step * self.count, self.step, dtype=np.int64)
            else:
                ids = np.full(self.count, self.start, dtype=np.int64)
            ids.flags.writeable = False
            self._ids = ids
        return self._ids

    @property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """The labels as (start, step, count) runs."""
        ids = self.ids
        out, i = [], 0
        while i < len(ids):
            if i + 1 == len(ids):
                out.append((int(ids[i]), 0, 1))
                break
            step = int(ids[i + 1] - ids[i])
            breaks = np.flatnonzero(np.diff(ids[i:]) != step)
            n = int(breaks[0]) + 1 if breaks.size else len(ids) - i
            out.append((int(ids[i]), step, n))
            i += n
        return tuple(out)

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return f"Axis({self.start}, step {self.step}, {self.count})" if self._ids is None else f"Axis({self.runs})"


def mix(x: NDArray[Any]) -> NDArray[np.uint64]:
    """A fixed 64-bit hash of each integer (splitmix64), so that sets can be compared by the sum of their hashes."""
    z = x.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def canonical(rows: Ids) -> Ids:
    """Sort each row, drop repeated atoms, pad with zeros on the left, trim columns that hold nothing."""
    if rows.shape[1] == 1:
        return rows
    rows = _sorted(rows)
    twice = (rows[:, 1:] == rows[:, :-1]) & (rows[:, 1:] != 0)
    if twice.any():
        rows[:, :-1][twice] = 0
        rows = _sorted(rows)
    used = rows.any(axis=0)
    first = int(np.argmax(used)) if used.any() else rows.shape[1] - 1
    return rows[:, first:]


def _sorted(rows: Ids) -> Ids:
    """Rows sorted; a few columns are sorted by exchanges of whole columns, which is many times faster than row by row."""
    width = rows.shape[1]
    if width > 6:
        return np.sort(rows, axis=1)
    columns = list(rows.T)
    for end in range(width - 1, 0, -1):
        for k in range(end):
            columns[k], columns[k + 1] = np.minimum(columns[k], columns[k + 1]), np.maximum(columns[k], columns[k + 1])
    return np.stack(columns, axis=1)


class HashIndex:
    """64-bit hashes to row numbers: sorted blocks, each at least twice as long as the next, so that few are searched."""

    def __init__(self) -> None:
        self._blocks: list[tuple[NDArray[np.uint64], Ids]] = []

    def find(self, keys: NDArray[np.uint64]) -> Ids:
        """The row of each hash, -1 where there is none. Sorted hashes are found much faster."""
        out = np.full(len(keys), -1, dtype=np.int64)
        for known, rows in self._blocks:
            at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
            hit = known[at] == keys
            out[hit] = rows[at[hit]]
        return out

    def add(self, keys: NDArray[np.uint64], rows: Ids) -> None:
        """Add sorted hashes that are not in here."""
        self._blocks.append((keys, rows))
        while len(self._blocks) > 1 and len(self._blocks[-2][0]) < 2 * len(self._blocks[-1][0]):
            (a, x), (b, y) = self._blocks.pop(), self._blocks.pop()
            keys, rows = np.concatenate([b, a]), np.concatenate([y, x])
            order = np.argsort(keys, kind="stable")  # two sorted runs: linear time
            self._blocks.append((keys[order], rows[order]))


class LabelStore:
    """Atoms, their bindings, the interned composites and the interned axes of one analysis."""

    def __init__(self) -> None:
        self.count = 1  # atom 0 is EMPTY
        self.version = 0
        self.bind: Ids = np.zeros(1024, dtype=np.int64)
        self.family = np.zeros(1024, dtype=np.int32)
        self.why = np.zeros(1024, dtype=np.int32)
        self.num_families = 0
        self.reasons: list[Reason] = [Reason("")]
        self.site: Callable[[], tuple[str, str, str]] = lambda: ("", "", "")
        self._reason_ids: dict[Reason, int] = {}
        self._axes: dict[Any, Axis] = {}
        self._table: Ids = np.zeros((256, 2), dtype=np.int64)
        self._used = 0
        self._index = HashIndex()
        self._done: Ids = np.zeros(256, dtype=np.int64)  # resolved id of each composite ...
        self._done_version: Ids = np.full(256, -1, dtype=np.int64)  # ... as of this version
        self.memo: dict[Any, Any] = {}

    # ------------------------------------------------------------------ atoms and families
    def fresh(self, count: int) -> Axis:
        """An axis of `count` new atoms, a family of their own."""
        start, end = self.count, self.count + count
        if end > len(self.bind):
            size = max(end, 2 * len(self.bind))
            self.bind = np.concatenate([self.bind, np.zeros(size - len(self.bind), dtype=np.int64)])
            self.family = np.concatenate([self.family, np.zeros(size - len(self.family), dtype=np.int32)])
            self.why = np.concatenate([self.why, np.zeros(size - len(self.why), dtype=np.int32)])
        self.bind[start:end] = np.arange(start, end)
        self.family[start:end] = self.new_family()
        self.count = end
        return self._intern((start, 1, count), None)

    def new_family(self) -> int:
        self.num_families += 1
        return self.num_families

    def families_of(self, atoms: Ids) -> NDArray[np.int32]:
        """The family of each (unbound) atom."""
        return self.family[atoms]

    # ------------------------------------------------------------------ axes
    def axis(self, ids: Ids) -> Axis | None:
        """The interned axis of these labels; None where all are EMPTY."""
        n = len(ids)
        if not n or not ids.any():
            return None
        start, step = int(ids[0]), int(ids[1] - ids[0]) if n > 1 else 0
        if n == 1 or (int(ids[-1]) == start + step * (n - 1) and bool((np.diff(ids) == step).all())):
            return self._intern((start, step, n), None)
        ids = np.ascontiguousarray(ids, dtype=np.int64)
        return self._intern((n, hashlib.blake2b(ids.data, digest_size=16).digest()), ids)

    def _intern(self, key: Any, ids: Ids | None) -> Axis:
        found = self._axes.get(key)
        if found is None:
            if ids is None:
                found = Axis(*key)
            else:
                ids = ids.copy()
                ids.flags.writeable = False
                found = Axis(int(ids[0]), 0, len(ids), ids)
            self._axes[key] = found
        return found

    def resolve(self, axis: Axis | None) -> Axis | None:
        """The axis with every bound atom replaced by what it is bound to."""
        if axis is None or axis._version == self.version:
            return None if axis is None else axis._resolved
        start = axis._resolved
        if start is not None:
            if start is not axis:
                start = self.resolve(start)
            else:
                ids = axis.ids
                out = self.resolve_ids(ids)
                start = axis if out is ids else self.axis(out)
                if start is not None:
                    start._resolved, start._version = start, self.version
        axis._resolved, axis._version = start, self.version
        return start

    def resolve_ids(self, ids: Ids) -> Ids:
        """Resolve an array of labels; the same object where nothing changes."""
        out = ids
        while True:
            if out.size and out.min() < 0:
                new = np.where(out > 0, self.bind[np.maximum(out, 0)], out)
                below = new < 0
                new[below] = self._resolve_composites(new[below])
            else:
                new = self.bind[out]
            if np.array_equal(new, out):
                return out
            out = new

    def _resolve_composites(self, ids: Ids) -> Ids:
        k = -1 - ids
        stale = k[self._done_version[k] != self.version]
        if stale.size:
            rows = self._table[stale]
            flat = self.resolve_ids(rows.ravel()).reshape(rows.shape)
            if np.array_equal(flat, rows):
                self._done[stale] = -1 - stale
            else:
                self._done[stale] = self.intern_rows(canonical(np.concatenate([self.rows(c) for c in flat.T], axis=1)))
            self._done_version[stale] = self.version
        return self._done[k]

    # ------------------------------------------------------------------ composites
    def rows(self, ids: Ids) -> Ids:
        """The atoms of each label, one row per label, zeros on the left."""
        if not ids.size or ids.min() >= 0:
            return ids[:, None]
        out = np.zeros((len(ids), self._table.shape[1]), dtype=np.int64)
        below = ids < 0
        out[below] = self._table[-1 - ids[below]]
        out[~below, -1] = ids[~below]
        used = out.any(axis=0)
        return out[:, int(np.argmax(used)) :]

    def intern_rows(self, rows: Ids) -> Ids:
        """Label ids of canonical rows of (unbound) atoms; new composites are numbered in order of appearance."""
        out = rows[:, -1].copy()
        if rows.shape[1] == 1:
            return out
        many = np.flatnonzero(rows[:, -2] != 0)
        if not many.size:
            return out
        rows = rows[many]
        hashes = np.where(rows != 0, mix(rows), np.uint64(0)).sum(axis=1, dtype=np.uint64)
        keys, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        found = self._index.find(keys)
        new = np.flatnonzero(found < 0)
        if new.size:
            seen = first[new]
            order = np.argsort(seen)
            found[new[order]] = np.arange(self._used, self._used + len(new))
            self._append(rows[seen[order]])
            self._index.add(keys[new], found[new])
        out[many] = (-1 - found)[inverse]
        return out

    def _append(self, rows: Ids) -> None:
        width, need = self._table.shape[1], self._used + len(rows)
        if rows.shape[1] > width or need > len(self._table):
            size = max(need, 2 * len(self._table)) if need > len(self._table) else len(self._table)
            wide = max(width, rows.shape[1])
            table = np.zeros((size, wide), dtype=np.int64)
            table[: self._used, wide - width :] = self._table[: self._used]
            self._table = table
            self._done = np.resize(self._done, size)
            self._done_version = np.concatenate(
                [self._done_version[: self._used], np.full(size - self._used, -1, dtype=np.int64)]
            )
        self._table[self._used : need, self._table.shape[1] - rows.shape[1] :] = rows
        self._used = need

    def atoms(self, ids: Ids) -> Ids:
        """The distinct atoms of these (resolved) labels, sorted."""
        if ids.size and ids[0] > 0 and (len(ids) == 1 or bool((np.diff(ids) > 0).all())):
            return ids
        found = np.unique(self.rows(ids)) if ids.size else ids
        return found[found != 0]

    # ------------------------------------------------------------------ binding
    def freeze(self, axis: Axis | None, text: str, soft: str | None = None) -> None:
        """Keep every slice of this axis for ever."""
        axis = self.resolve(axis)
        if axis is not None:
            self.freeze_ids(axis.ids, text, soft)

    def freeze_ids(self, ids: Ids, text: str, soft: str | None = None) -> None:
        atoms = self.atoms(self.resolve_ids(ids))
        if atoms.size:
            self.bind[atoms] = EMPTY
            self.why[atoms] = self.reason(text, soft)
            self.version += 1

    def reason(self, text: str, soft: str | None = None) -> int:
        reason = Reason(text, *self.site(), soft=soft)
        number = self._reason_ids.get(reason)
        if number is None:
            number = self._reason_ids[reason] = len(self.reasons)
            self.reasons.append(reason)
        return number

    def explain(self, label: int) -> Reason:
        """Why the slice of this label is kept (a label that resolves to EMPTY)."""
        while label:
            if label < 0:
                row = self._table[-1 - label]
                label = int(next(a for a in row if a))
            elif self.bind[label] == EMPTY:
                return self.reasons[int(self.why[label])]
            else:
                label = int(self.bind[label])
        return self.reasons[0]

    def merge(self, a: Ids, b: Ids) -> None:
        """Bind atoms pairwise, the greater number to the smaller, whose family they join."""
        self.bind[np.maximum(a, b)] = np.minimum(a, b)
        self.version += 1

    def bind_to(self, atoms: Ids, labels: Ids) -> None:
        """Bind atoms to labels that do not contain them (the caller has checked)."""
        self.bind[atoms] = labels
        self.version += 1

    def segment(self, axis: Axis | None, chosen: slice | Sequence[int]) -> None:
        """A part of this axis is used on its own: its atoms become a family of their own, so that each part is pruned alike."""
        axis = self.resolve(axis)
        if axis is None:
            return
        inside = np.zeros(axis.count, dtype=bool)
        inside[chosen] = True
        if inside.all() or not inside.any():
            return
        rest = self.atoms(axis.ids[~inside])
        part = np.setdiff1d(self.atoms(axis.ids[inside]), rest, assume_unique=True)
        if not part.size or not rest.size:
            return
        families = self.family[part]
        for family in np.intersect1d(families, self.family[rest]).tolist():
            self.family[part[families == family]] = self.new_family()

    def split_families(self, atoms: Ids, keys: Ids) -> None:
        """Atoms of one family that met different families (`keys`) fall apart into one family for each."""
        order = np.argsort(atoms, kind="stable")
        atoms, first = np.unique(atoms[order], return_index=True)
        keys = keys[order][first]
        families = self.family[atoms]
        for family in np.unique(families).tolist():
            mine = families == family
            met = np.unique(keys[mine])
            for key in met[1:].tolist():
                self.family[atoms[mine & (keys == key)]] = self.new_family()
