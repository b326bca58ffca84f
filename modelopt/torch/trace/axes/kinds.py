"""What a family is for a reader: hidden, ffn, heads, kv_heads, head_dim, groups, experts, rank, embedding, channels.

Read off how its axes were used during the run (`Call.role`), never off names:
    heads      runs of neighbouring positions of a projection's output belong to one atom (kv_heads: the outer of two such)
    head_dim   stands beside heads in the same labels        groups     the groups of a convolution or normalization
    hidden     the stream to which blocks add their results  ffn        produced, activated and consumed by projections
    rank       produced and consumed with nothing between    experts    rows of a router and the stacked weights they choose
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from modelopt.torch.trace.axes import algebra
from modelopt.torch.trace.axes.labels import Axis, LabelStore, mix

LONGEST = 1 << 16  # a longer dimension is a flattened weight, not a row of heads
UNLINKED = "chosen by value, and no router beside it has as many rows"


def kinds_of(store: LabelStore, roles: Mapping[str, Iterable[Axis]]) -> dict[int, str]:
    """Family -> kind, for every family that took part in a projection, convolution, lookup or sum."""
    count: dict[str, dict[int, int]] = {role: _families(store, axes) for role, axes in roles.items()}
    empty: dict[int, int] = {}
    made, used = count.get("produced", empty), count.get("consumed", empty)
    space, groups, experts = count.get("space", empty), count.get("groups", empty), count.get("experts", empty)
    stream, active, tables = count.get("residual", empty), count.get("activated", empty), count.get("embedded", empty)
    runs, partners = _runs(store, roles.get("produced", ()))
    kinds: dict[int, str] = {}
    for family in sorted({*made, *used, *tables, *groups, *experts}):
        outer = [f for f in partners.get(family, ()) if f in runs]
        if family in experts:
            kind = "experts"
        elif family in groups:
            kind = "groups"
        elif family in runs and family not in space and (family not in active or partners.get(family)):
            kind = "kv_heads" if any(runs[f] < runs[family] for f in outer) else "heads"
        elif outer and family not in space:
            kind = "head_dim"
        elif family in space:
            kind = "channels"
        elif family in stream or (family in tables and family in used and family in made):
            kind = "hidden"
        elif family in made and family in used:
            kind = "ffn" if family in active else "rank"
        elif family in tables:
            kind = "embedding"
        else:
            kind = "channels"
        kinds[family] = kind
    return kinds


def _families(store: LabelStore, axes: Iterable[Axis]) -> dict[int, int]:
    """Family -> in how many of these axes it stands."""
    times: dict[int, int] = defaultdict(int)
    known: dict[Axis, list[int]] = {}
    for axis in axes:
        now = store.resolve(axis)
        if now is None:
            continue
        if now not in known:
            known[now] = sorted(set(store.families_of(store.atoms(now.ids)).tolist()))
        for family in known[now]:
            times[family] += 1
    return times


def _runs(store: LabelStore, axes: Iterable[Axis]) -> tuple[dict[int, int], dict[int, set[int]]]:
    """Family -> length of the runs of neighbours that one atom holds (where > 1); family -> families in the same labels."""
    runs: dict[int, int] = {}
    partners: dict[int, set[int]] = defaultdict(set)
    for axis in dict.fromkeys(store.resolve(a) for a in axes):
        if axis is None or len(axis) > LONGEST:
            continue
        rows = store.rows(axis.ids)
        flat = rows.ravel()
        owner = np.zeros(flat.shape, dtype=np.int64)
        owner[flat != 0] = store.families_of(flat[flat != 0])
        family = owner.reshape(rows.shape)
        _, first = np.unique(mix(family).sum(axis=1, dtype=np.uint64), return_index=True)
        for row in family[first].tolist():
            present = sorted({f for f in row if f})
            for f in present:
                partners[f].update(g for g in present if g != f)
        for f in np.unique(family[family != 0]).tolist():
            mine = np.where(family == f, rows, 0).max(axis=1)
            change = np.flatnonzero(np.diff(mine) != 0)
            bounds = np.concatenate([[-1], change, [len(mine) - 1]])
            lengths = np.diff(bounds)[mine[bounds[1:]] != 0]
            shortest = int(lengths.min()) if lengths.size else 1
            if shortest > 1 and len(set(mine[mine != 0].tolist())) > 1:
                runs[f] = max(runs.get(f, 0), shortest)
    return runs, partners


def link_experts(store: LabelStore, chosen: Iterable[tuple[Axis, str, bool]]) -> list[Axis]:
    """Unify the rows of each router with the stacked weights that its choice indexes; returns the axes of experts.

    `chosen` holds (axis, module, stacked) of every dimension that was chosen by value under the lifted reason. A router and
    stacks of equal length under the nearest common parent belong together; what finds no partner is frozen.
    """
    left = [(a, m, s) for a, m, s in dict.fromkeys(chosen) if store.resolve(a) is not None]
    parents = {p for _, m, _ in left for p in _ancestors(m)}
    linked: list[Axis] = []
    for parent in sorted(parents, key=lambda p: (-len(p.split(".")) if p else 1, p)):
        for size in sorted({len(a) for a, _, _ in left}):
            near = [x for x in left if len(x[0]) == size and parent in _ancestors(x[1])]
            if not (any(s for _, _, s in near) and any(not s for _, _, s in near)):
                continue
            for axis, _, _ in near[1:]:
                algebra.unify(store, near[0][0], axis)
            linked.append(near[0][0])
            left = [x for x in left if x not in near]
    for axis, _, _ in left:
        store.freeze(axis, UNLINKED, soft="experts")
    return linked


def _ancestors(module: str) -> list[str]:
    """The module and all that contain it, but for the root."""
    parts = module.split(".")
    return [".".join(parts[:k]) for k in range(len(parts), 0, -1)]
