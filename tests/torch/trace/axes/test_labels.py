"""The store of labels: binding, resolution, composites, unification, products and factors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelopt.torch.trace.axes import algebra
from modelopt.torch.trace.axes.labels import LabelStore, canonical


def sets(store: LabelStore, axis: object) -> list[frozenset[int]] | None:
    """An axis as Python sets of atoms."""
    axis = store.resolve(axis)  # type: ignore[arg-type]
    return None if axis is None else [frozenset(int(a) for a in row if a) for row in store.rows(axis.ids)]


def test_axes_are_interned_and_held_as_runs() -> None:
    store = LabelStore()
    a = store.fresh(6)
    assert a._ids is None and a.runs == ((1, 1, 6),)
    assert algebra.take(store, a, slice(2, 5)) is algebra.take(store, a, slice(2, 5))
    assert algebra.concat(store, [(algebra.take(store, a, slice(0, 3)), 3), (algebra.take(store, a, slice(3, 6)), 3)]) is a
    assert algebra.take(store, algebra.take(store, a, slice(None, None, -1)), slice(None, None, -1)) is a
    assert algebra.concat(store, [(None, 2), (a, 6)]).runs == ((0, 0, 2), (1, 1, 6))


def test_unify_binds_the_greater_atom_and_freezing_reaches_both() -> None:
    store = LabelStore()
    a, b = store.fresh(3), store.fresh(3)
    algebra.unify(store, a, b)
    assert store.resolve(b) is a
    store.freeze(b, "because")
    assert store.resolve(a) is None and store.explain(5).text == "because"


def test_none_freezes() -> None:
    store = LabelStore()
    a = store.fresh(3)
    algebra.unify(store, a, None)
    assert store.resolve(a) is None


def test_cyclic_shift_terminates_and_merges_everything() -> None:
    """x_i = x_(i+1): the index-shifting cycle on which trace-based pruners never end."""
    store = LabelStore()
    a = store.fresh(64)
    algebra.unify(store, a, algebra.take(store, a, np.roll(np.arange(64), 1)))
    assert len(set(sets(store, a))) == 1


def test_rotary_halves() -> None:
    store = LabelStore()
    a = store.fresh(8)
    algebra.unify(
        store, a, algebra.concat(store, [(algebra.take(store, a, slice(4, 8)), 4), (algebra.take(store, a, slice(0, 4)), 4)])
    )
    assert sets(store, a) == [frozenset({i}) for i in (1, 2, 3, 4, 1, 2, 3, 4)]


def test_product_and_factor_are_inverse() -> None:
    store = LabelStore()
    a, b = store.fresh(3), store.fresh(4)
    both = algebra.product(store, [(a, 3), (b, 4)])
    assert sets(store, both)[5] == {2, 5}
    assert algebra.factor(store, both, (3, 4)) == [a, b]
    flat = store.fresh(24)
    h, d = algebra.factor(store, flat, (4, 6))
    assert algebra.product(store, [(h, 4), (d, 6)]) is store.resolve(flat)
    assert algebra.factor(store, flat, (4, 6)) == [h, d]


def test_a_factor_is_refined_by_another_shape() -> None:
    store = LabelStore()
    flat = store.fresh(24)
    h, d = algebra.factor(store, flat, (4, 6))
    group, rest = algebra.factor(store, flat, (2, 12))
    outer, inner = algebra.factor(store, h, (2, 2))
    assert store.resolve(group) is store.resolve(outer)
    assert sets(store, rest) == [x | y for x in sets(store, inner) for y in sets(store, d)]


def test_crossing_shapes_freeze_what_cannot_be_a_grid() -> None:
    store = LabelStore()
    flat = store.fresh(6)
    algebra.factor(store, flat, (2, 3))
    algebra.factor(store, flat, (3, 2))
    assert store.resolve(flat) is None


def test_grouped_queries_bind_a_head_to_its_group_and_member() -> None:
    store = LabelStore()
    heads, kv, member = store.fresh(6), store.fresh(3), store.fresh(2)
    algebra.unify(store, heads, algebra.product(store, [(kv, 3), (member, 2)]))
    assert sets(store, heads) == [x | y for x in sets(store, kv) for y in sets(store, member)]


def test_equal_products_match_factor_by_factor() -> None:
    store = LabelStore()
    a, b, c, d = store.fresh(3), store.fresh(5), store.fresh(3), store.fresh(5)
    algebra.unify(store, algebra.product(store, [(a, 3), (b, 5)]), algebra.product(store, [(c, 3), (d, 5)]))
    assert store.resolve(c) is a and store.resolve(d) is b


def test_occurs_check_freezes_the_rest() -> None:
    store = LabelStore()
    a, b = store.fresh(2), store.fresh(2)
    pair = store.axis(store.intern_rows(canonical(np.stack([a.ids, b.ids], axis=1))))
    algebra.unify(store, a, pair)
    assert store.resolve(a) is a and store.resolve(b) is None


def test_segments_become_families() -> None:
    store = LabelStore()
    a = store.fresh(9)
    for k in range(3):
        store.segment(a, slice(3 * k, 3 * k + 3))
    assert len(set(store.families_of(a.ids).tolist())) == 3
    algebra.unify(store, algebra.take(store, a, slice(0, 3)), algebra.take(store, a, slice(3, 6)))
    assert len(set(store.families_of(store.atoms(store.resolve(a).ids)).tolist())) == 2


def test_unequal_lengths_freeze() -> None:
    store = LabelStore()
    a, b = store.fresh(2), store.fresh(3)
    algebra.unify(store, a, b)
    assert store.resolve(a) is None and store.resolve(b) is None


def test_reshape_of_nothing_keeps_what_is_equal_from_the_right() -> None:
    store = LabelStore()
    a = store.fresh(8)
    assert algebra.reshape(store, [None, None, a], [2, 0, 8], [0, 8]) == [None, a]


labels = st.lists(st.frozensets(st.integers(1, 12), max_size=3), min_size=1, max_size=8)


def axis_of(store: LabelStore, rows: list[frozenset[int]]) -> object:
    table = np.zeros((len(rows), 3), dtype=np.int64)
    for i, row in enumerate(rows):
        table[i, : len(row)] = sorted(row)
    return store.axis(store.intern_rows(canonical(table)))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(labels, labels), min_size=1, max_size=4))
def test_whatever_is_unified_is_equal_afterwards(pairs: list[tuple[list[frozenset[int]], list[frozenset[int]]]]) -> None:
    """Any sequence of unifications ends, leaves no cycle, and both sides survive together for every removal."""
    store = LabelStore()
    store.fresh(12)
    done = []
    for x, y in pairs:
        n = min(len(x), len(y))
        a, b = axis_of(store, x[:n]), axis_of(store, y[:n])
        algebra.unify(store, a, b)  # type: ignore[arg-type]
        done.append((a, b))
    for a, b in done:
        assert store.resolve(a) is store.resolve(b)


@settings(max_examples=100, deadline=None)
@given(labels.filter(lambda x: len(x) % 2 == 0), st.lists(st.integers(0, 3), max_size=4))
def test_a_factored_axis_is_the_product_of_its_factors(rows: list[frozenset[int]], order: list[int]) -> None:
    store = LabelStore()
    store.fresh(12)
    axis = axis_of(store, rows)
    for k in [1, *order]:
        shape = [(2, len(rows) // 2), (len(rows) // 2, 2), (2, len(rows) // 2), (len(rows) // 2, 2)][k]
        if 1 not in shape:
            parts = algebra.factor(store, axis, shape)  # type: ignore[arg-type]
            assert algebra.product(store, list(zip(parts, shape, strict=True))) is store.resolve(axis)  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [2, 4, 9])
def test_canonical_rows(width: int) -> None:
    rows = np.random.default_rng(0).integers(0, 5, (50, width))
    for row, out in zip(rows, canonical(rows), strict=True):
        assert sorted(set(row.tolist()) - {0}) == [a for a in out.tolist() if a]
