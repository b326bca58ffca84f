"""What operations do to axes: equality (unify), merging of dimensions (product), splitting (factor), and reshape out of both.

All of it works on whole arrays of labels. What cannot be expressed is frozen with a reason, never guessed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modelopt.torch.trace.axes.labels import EMPTY, Axis, Ids, LabelStore, canonical, mix

UNEQUAL = "two labels that cannot be made equal meet here"
UNLABELLED = "meets a dimension that is never pruned"


# ---------------------------------------------------------------------- equality
def unify(store: LabelStore, a: Axis | None, b: Axis | None) -> None:
    """Make two axes of one length equal, index by index."""
    if a is b:
        return
    a, b = store.resolve(a), store.resolve(b)
    if a is b:
        return
    if a is None or b is None:
        store.freeze(b if a is None else a, UNLABELLED)
        return
    if len(a) != len(b):
        store.freeze(a, f"lengths {len(a)} and {len(b)} meet here")
        store.freeze(b, f"lengths {len(a)} and {len(b)} meet here")
        return
    x, y = a.ids, b.ids
    parts = None if a.composite or b.composite else _meeting(store, x, y)
    unify_ids(store, x, y)
    if parts is not None:
        merged = store.resolve_ids(x)
        alive = merged > 0
        store.split_families(merged[alive], parts[alive])


def _meeting(store: LabelStore, x: Ids, y: Ids) -> Ids | None:
    """For each index a number of the pair of families that meet there; None where it is one pair throughout."""
    left, right = store.family[x].astype(np.int64), store.family[y].astype(np.int64)
    pairs = np.minimum(left, right) << 32 | np.maximum(left, right)
    return None if bool((pairs == pairs[0]).all()) else pairs


def unify_ids(store: LabelStore, x: Ids, y: Ids) -> None:
    """Make two arrays of labels equal, element by element."""
    while True:
        x, y = store.resolve_ids(x), store.resolve_ids(y)
        apart = x != y
        if not apart.any():
            return
        x, y = x[apart], y[apart]
        _step(store, x, y)


def _step(store: LabelStore, x: Ids, y: Ids) -> None:
    """Bind at least one atom that makes x and y (different everywhere) more equal."""
    empty = (x == EMPTY) | (y == EMPTY)
    if empty.any():
        store.freeze_ids(np.concatenate([x[empty], y[empty]]), UNLABELLED)
        return
    single = (x > 0) & (y > 0)
    if single.any():
        store.merge(x[single], y[single])
        return
    many = (x < 0) & (y < 0)
    if many.any():
        rx, ry = store.rows(x[many]), store.rows(y[many])
        if not _match_structure(store, rx, ry):
            _match_rest(store, rx, ry)
        return
    atoms, labels = np.maximum(x, y), np.minimum(x, y)
    rows = store.rows(labels)
    inside = (rows == atoms[:, None]).any(axis=1)
    if inside.any():  # a = a & rest: the rest must survive whenever a does
        rest = np.where(rows[inside] == atoms[inside, None], 0, rows[inside])
        store.freeze_ids(rest.ravel(), UNEQUAL)
        return
    _bind_safely(store, atoms, labels, rows)


def _bind_safely(store: LabelStore, atoms: Ids, labels: Ids, rows: Ids) -> None:
    """Bind atoms to composites, only such that no cycle can arise: an atom that some other target holds waits its turn."""
    free = ~np.isin(atoms, rows)
    if not free.any():
        free[0] = True
        free[1:] = False
    store.bind_to(atoms[free], labels[free])


def _signatures(rows: Ids) -> tuple[Ids, Ids]:
    """The atoms of these rows, and for each a hash of the set of rows in which it stands, sorted by hash."""
    position, column = np.nonzero(rows)
    atoms, inverse = np.unique(rows[position, column], return_inverse=True)
    total = np.zeros(len(atoms), dtype=np.uint64)
    np.add.at(total, inverse, mix(position))
    order = np.lexsort((atoms, total))
    return atoms[order], total[order].view(np.int64)


def _match_structure(store: LabelStore, rx: Ids, ry: Ids) -> bool:
    """Merge the atoms of both sides that stand at exactly the same positions (the factors of equal products)."""
    (ax, sx), (ay, sy) = _signatures(rx), _signatures(ry)
    keep_x, keep_y = ~np.isin(ax, ay), ~np.isin(ay, ax)
    ax, sx, ay, sy = ax[keep_x], sx[keep_x], ay[keep_y], sy[keep_y]
    ux, cx = np.unique(sx, return_counts=True)
    uy, cy = np.unique(sy, return_counts=True)
    once = np.intersect1d(ux[cx == 1], uy[cy == 1], assume_unique=True)
    if not once.size:
        return False
    ax, ay = ax[np.isin(sx, once)], ay[np.isin(sy, once)]
    sx, sy = sx[np.isin(sx, once)], sy[np.isin(sy, once)]
    store.merge(ax[np.argsort(sx)], ay[np.argsort(sy)])
    return True


def _match_rest(store: LabelStore, rx: Ids, ry: Ids) -> None:
    """Composites without equal structure: what only one side has, if it is a single atom, is bound to the rest of the other."""
    shared_x = (rx[:, :, None] == ry[:, None, :]).any(axis=2)
    shared_y = (ry[:, :, None] == rx[:, None, :]).any(axis=2)
    only_x, only_y = canonical(np.where(shared_x, 0, rx)), canonical(np.where(shared_y, 0, ry))
    nx, ny = (only_x != 0).sum(axis=1), (only_y != 0).sum(axis=1)
    pair = (nx == 1) & (ny == 1)
    if pair.any():
        store.merge(only_x[pair, -1], only_y[pair, -1])
        return
    left, right = (nx == 1) & (ny > 1), (ny == 1) & (nx > 1)
    if left.any() or right.any():
        side = left if left.any() else right
        one, more = (only_x, only_y) if left.any() else (only_y, only_x)
        _bind_safely(store, one[side, -1], store.intern_rows(more[side]), more[side])
        return
    store.freeze_ids(np.concatenate([only_x.ravel(), only_y.ravel()]), UNEQUAL)


# ---------------------------------------------------------------------- products
def product(store: LabelStore, parts: Sequence[tuple[Axis | None, int]]) -> Axis | None:
    """The axis of dimensions (axis, size) merged into one, the last running fastest."""
    parts = [(store.resolve(a), n) for a, n in parts if n != 1]
    if all(a is None for a, _ in parts):
        return None
    if len(parts) == 1:
        return parts[0][0]
    key = ("product", *parts)
    known = store.memo.get(key)
    if known is None:
        sizes = [n for _, n in parts]
        rows = None
        for k, (axis, _) in enumerate(parts):
            if axis is None:
                continue
            mine = store.rows(axis.ids)
            mine = np.broadcast_to(
                mine.reshape(*(len(mine) if i == k else 1 for i in range(len(sizes))), -1), (*sizes, mine.shape[1])
            ).reshape(-1, mine.shape[1])
            rows = mine if rows is None else np.concatenate([rows, mine], axis=1)
        assert rows is not None
        known = store.memo[key] = store.axis(store.intern_rows(canonical(rows)))
    return known


def factor(store: LabelStore, axis: Axis | None, shape: Sequence[int]) -> list[Axis | None]:
    """The axes of one dimension split into `shape` (no ones in it): labels are refined into products where needed."""
    axis = store.resolve(axis)
    if axis is None:
        return [None] * len(shape)
    key = ("factor", axis, tuple(shape))
    known = store.memo.get(key)
    if known is not None:
        return [store.resolve(a) for a in known]
    ids = axis.ids
    if ids.min() > 0 and (axis.step or len(np.unique(ids)) == len(ids)):
        out: list[Axis | None] = [store.fresh(n) for n in shape]
        grid = product(store, list(zip(out, shape, strict=True)))
        assert grid is not None
        store.bind_to(ids, grid.ids)
    else:
        out = _refine(store, ids, tuple(shape))
    store.memo[key] = tuple(out)
    return [store.resolve(a) for a in out]


def _refine(store: LabelStore, ids: Ids, shape: tuple[int, ...]) -> list[Axis | None]:
    """Factor labels that are already composite.

    Each atom must fill a box of the grid (the same indices of every dimension for each index of the others). An atom that is
    restricted in one dimension belongs to that factor; one restricted in several is bound to the product of new atoms, one per
    dimension and distinct set of indices. Atoms that fill no box are frozen.
    """
    while True:
        ids = store.resolve_ids(ids)
        rows = store.rows(ids)
        position, column = np.nonzero(rows)
        atoms, which, count = np.unique(rows[position, column], return_inverse=True, return_counts=True)
        index = np.unravel_index(position, shape)
        spans = [_span(which, index[k], shape[k], len(atoms)) for k in range(len(shape))]
        box = np.prod([n for n, _, _ in spans], axis=0) == count
        if box.all():
            break
        store.freeze_ids(atoms[~box], "a dimension is split across the parts of which it is made")
    partial = np.array([n < s for (n, _, _), s in zip(spans, shape, strict=True)])
    owners = partial.sum(axis=0)
    new = np.zeros((len(atoms), len(shape)), dtype=np.int64)
    out: list[Axis | None] = []
    for k, (_, signature, pairs) in enumerate(spans):
        split = (owners >= 2) & partial[k]
        own = (owners == 1) & partial[k] if k else ((owners == 1) & partial[k]) | (owners == 0)
        if split.any():
            _, first, inverse = np.unique(signature[split], return_index=True, return_inverse=True)
            order = np.argsort(first, kind="stable")
            rank = np.empty(len(order), dtype=np.int64)
            rank[order] = np.arange(len(order))
            new[split, k] = store.fresh(len(order)).ids[rank[inverse]]
        label = np.where(own, atoms, new[:, k])
        out.append(_collect(store, label[pairs // shape[k]], pairs % shape[k], shape[k]))
    split = owners >= 2
    if split.any():
        store.bind_to(atoms[split], store.intern_rows(canonical(new[split])))
    grid = product(store, [(store.resolve(a), n) for a, n in zip(out, shape, strict=True)])
    whole = np.zeros(len(ids), dtype=np.int64) if grid is None else grid.ids
    unify_ids(store, ids, whole)
    return [store.resolve(a) for a in out]


def _span(which: Ids, index: Ids, size: int, count: int) -> tuple[Ids, Ids, Ids]:
    """For each atom: in how many indices of this dimension it stands, a hash of that set, and all (atom, index) pairs."""
    pairs = np.unique(which * size + index)
    owner = pairs // size
    total = np.zeros(count, dtype=np.uint64)
    np.add.at(total, owner, mix(pairs % size))
    return np.bincount(owner, minlength=count), total.view(np.int64), pairs


def _collect(store: LabelStore, atoms: Ids, index: Ids, size: int) -> Axis | None:
    """The axis of `size` labels whose atoms are given as (atom, index) pairs; atom 0 is nothing."""
    some = atoms != 0
    pairs = np.unique(np.stack([index[some], atoms[some]]), axis=1)
    count = np.bincount(pairs[0], minlength=size)
    width = max(int(count.max()) if count.size else 0, 1)
    rows = np.zeros((size, width), dtype=np.int64)
    offset = np.arange(pairs.shape[1]) - np.repeat(np.cumsum(count) - count, count)
    rows[pairs[0], offset] = pairs[1]
    return store.axis(store.intern_rows(canonical(rows)))


# ---------------------------------------------------------------------- reshape
def reshape(store: LabelStore, axes: Sequence[Axis | None], old: Sequence[int], new: Sequence[int]) -> list[Axis | None]:
    """The axes of a tensor of shape `old` seen as shape `new` (same number of elements, row-major)."""
    if tuple(old) == tuple(new):
        return list(axes)
    out: list[Axis | None] = [None] * len(new)
    if 0 in old:
        return _reshape_nothing(store, axes, old, new)
    ins = [(a, n) for a, n in zip(axes, old, strict=True) if n != 1]
    outs = [(k, n) for k, n in enumerate(new) if n != 1]
    i = j = 0
    while i < len(ins):
        i0, j0 = i, j
        left, right = ins[i][1], outs[j][1]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left *= ins[i][1]
                i += 1
            else:
                right *= outs[j][1]
                j += 1
        group = ins[i0:i]
        if all(a is None for a, _ in group):
            continue
        flat = product(store, group)
        sizes = [n for _, n in outs[j0:j]]
        parts = [flat] if len(sizes) == 1 else factor(store, flat, sizes)
        for (k, _), part in zip(outs[j0:j], parts, strict=True):
            out[k] = part
    return out


def _reshape_nothing(store: LabelStore, axes: Sequence[Axis | None], old: Sequence[int], new: Sequence[int]) -> list[Axis | None]:
    """A tensor without elements: dimensions equal from the right keep their axes, the others are frozen."""
    out: list[Axis | None] = [None] * len(new)
    k = 0
    while k < min(len(old), len(new)) and old[-1 - k] == new[-1 - k]:
        out[-1 - k] = axes[-1 - k]
        k += 1
    for axis in axes[: len(axes) - k]:
        store.freeze(axis, "a tensor without elements is reshaped")
    return out


def concat(store: LabelStore, parts: Sequence[tuple[Axis | None, int]]) -> Axis | None:
    """The axis of dimensions (axis, size) joined end to end."""
    resolved = [(store.resolve(a), n) for a, n in parts]
    if all(a is None for a, _ in resolved):
        return None
    key = ("concat", *resolved)
    known = store.memo.get(key)
    if known is None:
        ids = [np.zeros(n, dtype=np.int64) if a is None else a.ids for a, n in resolved]
        known = store.memo[key] = store.axis(np.concatenate(ids))
    return known


def take(store: LabelStore, axis: Axis | None, index: slice | Ids) -> Axis | None:
    """Some labels of an axis, in the order of `index`."""
    axis = store.resolve(axis)
    return None if axis is None else store.axis(axis.ids[index])


def tile(store: LabelStore, axis: Axis | None, size: int, times: int) -> Axis | None:
    """An axis repeated `times` times end to end; how often is a dimension of its own."""
    if times == 1:
        return axis
    if size == 1:
        return store.fresh(times)
    return product(store, [(store.fresh(times), times), (axis, size)])
