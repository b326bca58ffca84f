"""Symbols as a view of axis inference: one free symbol for each family of dimensions, all others read off the labels.

a dimension of one family                follows that family's symbol (possibly `ratio` entries for each of its own)
of several families side by side         a concatenation        (the input of a convolution after torch.cat)
of several families in every entry       a product              (heads x width of a head)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from modelopt.torch.trace.axes import Axes, Axis, Family, ModuleCall, Slot
from modelopt.torch.trace.symbols import Symbol, SymInfo, SymMap


@dataclass(frozen=True, eq=False)
class _Cell:
    """The atoms of a family that share all of their slots. A family has several where it passes through a concatenation."""

    name: str
    family: Family
    which: NDArray[np.int64]
    slots: tuple[Slot, ...]


def _cells(family: Family) -> list[_Cell]:
    inside = np.array([[len(p) > 0 for p in slot.positions] for slot in family.slots])
    if inside.all():
        return [_Cell(family.name, family, np.arange(family.size), family.slots)]
    patterns, cell_of = np.unique(inside.T, axis=0, return_inverse=True)
    first = sorted(range(len(patterns)), key=lambda k: int(np.flatnonzero(cell_of.ravel() == k)[0]))
    made = []
    for number, k in enumerate(first):
        slots = tuple(s for s, present in zip(family.slots, patterns[k], strict=True) if present)
        name = family.name if number == 0 else f"{family.name}/{number + 1}"
        made.append(_Cell(name, family, np.flatnonzero(cell_of.ravel() == k), slots))
    return made


class _View:
    def __init__(self, model: nn.Module, axes: Axes, sym_map: SymMap) -> None:
        self.model, self.axes, self.sym_map = model, axes, sym_map
        self.modules = dict(model.named_modules())
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        known = {id(t): n for n, t in tensors if n in axes.parameters}
        self.names = {n: known[id(t)] for n, t in tensors if id(t) in known}
        self.cells = [cell for family in axes.families for cell in _cells(family)]
        self.by_slot: dict[tuple[str, int], list[_Cell]] = defaultdict(list)
        for cell in self.cells:
            for slot in cell.slots:
                self.by_slot[slot.parameter, slot.dim].append(cell)
        self.why = {(f.parameter, f.dim): f"{f.reason} ({f.where})" if f.where else f.reason for f in axes.frozen}
        self.calls: dict[str, ModuleCall] = {}
        for call in axes.calls:
            self.calls.setdefault(call.name, call)

    def axis_of(self, name: str, symbol: Symbol) -> tuple[tuple[str, int] | None, Axis | None]:
        """Return the slot that holds a symbol of module `name` (None: it is seen only on the input) and its axis."""
        module = self.modules[name]
        grouped = getattr(module, "groups", 1) not in (1, getattr(module, "in_channels", 1))
        if grouped and symbol.is_incoming and name in self.calls:
            given = self.calls[name].inputs
            return None, self.axes.resolve(given[0].axes[1]) if given else None
        prefix = f"{name}." if name else ""
        for parameter, dim in symbol.slots:
            full = self.names.get(prefix + parameter)
            if full is not None:
                axes = self.axes.parameters[full]
                dim %= len(axes)
                return (full, dim), axes[dim]
        return None, None

    def cells_in(self, slot: tuple[str, int] | None, axis: Axis | None) -> list[_Cell]:
        """Return what lives in an axis, in the order of first positions."""
        if axis is None:
            return []
        if slot is not None:
            found = self.by_slot.get(slot, [])
        else:
            inside = set(self.axes.store.atoms(axis.ids).tolist())
            found = [c for c in self.cells if inside.intersection(c.family.atoms[i] for i in c.which)]
        return sorted(found, key=lambda c: min(self.cover(axis, c), default=0)) if len(found) > 1 else found

    def positions(self, axis: Axis, cell: _Cell) -> list[NDArray[np.int64]]:
        """Return for each atom of a cell its positions in an axis."""
        every = self.axes.positions(axis, cell.family)
        return [every[i] for i in cell.which]

    def cover(self, axis: Axis, cell: _Cell) -> set[int]:
        """Return the positions of an axis that a cell decides about."""
        places = self.positions(axis, cell)
        return set(np.concatenate(places).tolist()) if places else set()


def link_from_axes(model: nn.Module, axes: Axes, sym_map: SymMap) -> dict[str, Symbol]:
    """Link the symbols of `sym_map` by the families of `axes`; return the symbol of each family by the family's name.

    Modules without a rule get a symbol for every dimension of their own parameters that belongs to a family. A family that no
    symbol stands for alone gets one of its own, named after its kind, at the module of its first parameter.
    """
    view = _View(model, axes, sym_map)
    _add_plain_symbols(view)
    placed: list[tuple[Symbol, tuple[str, int] | None, Axis | None, list[_Cell]]] = []
    for name, symbol in _in_order(view):
        slot, axis = view.axis_of(name, symbol)
        placed.append((symbol, slot, axis, view.cells_in(slot, axis)))
    roots: dict[str, Symbol] = {}
    for pick in (lambda s: s.is_outgoing, lambda s: s.is_incoming, lambda s: True):
        for symbol, _, axis, cells in placed:
            if axis is None or len(cells) != 1 or cells[0].name in roots or not (symbol.is_free and pick(symbol)):
                continue
            if len(view.cover(axis, cells[0])) == (symbol.size or len(axis)):
                _lead(symbol, cells[0], axis, view)
                roots[cells[0].name] = symbol
    for cell in view.cells:
        if cell.name not in roots:
            roots[cell.name] = _own_symbol(view, cell)
    for symbol, slot, axis, cells in placed:
        _follow(view, symbol, slot, axis, cells, roots)
    return roots


def _in_order(view: _View) -> Iterator[tuple[str, Symbol]]:
    """Yield (module name, symbol) in the order in which modules first finished; those that never ran last."""
    order = {name: index for index, name in enumerate(view.calls)}
    names = [n for n, _ in view.sym_map.named_modules()]
    for name in sorted(names, key=lambda n: order.get(n, len(order))):
        yield from ((name, symbol) for _, symbol in view.sym_map[name].named_symbols())


def _add_plain_symbols(view: _View) -> None:
    for name, module in view.modules.items():
        if module in view.sym_map:
            continue
        prefix = f"{name}." if name else ""
        symbols = {}
        for own, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            full = view.names.get(prefix + own)
            for dim in range(tensor.dim()) if full is not None else ():
                if (full, dim) in view.by_slot:
                    symbols[f"{own}.{dim}"] = Symbol(slots=((own, dim),), size=tensor.shape[dim], is_searchable=True)
        if symbols:
            view.sym_map.add_sym_info(module, SymInfo(False, **symbols))


def _lead(symbol: Symbol, cell: _Cell, axis: Axis, view: _View) -> None:
    symbol.family = cell.name
    symbol.step = max((len(p) for p in view.positions(axis, cell)), default=1)
    symbol._searchable = True
    if len({slot.parameter.rpartition(".")[0] for slot in cell.slots}) > 1 and not symbol.is_cross_layer:
        symbol.cl_type = Symbol.CLType.OUTGOING


def _own_symbol(view: _View, cell: _Cell) -> Symbol:
    """Return a symbol for a family that shows only in products: heads, or the width of one."""
    symbol = Symbol(is_searchable=True, cl_type=Symbol.CLType.OUTGOING, elastic_dims={-1}, size=len(cell.which))
    symbol.family = cell.name
    owner = view.modules[cell.slots[0].parameter.rpartition(".")[0]]
    info = view.sym_map.get_sym_info(owner) or SymInfo()
    key, number = cell.family.kind, 2
    while key in info.symbols:
        key, number = f"{cell.family.kind}_{number}", number + 1
    info.symbols[key] = symbol
    view.sym_map.add_sym_info(owner, info)
    return symbol


def _follow(
    view: _View,
    symbol: Symbol,
    slot: tuple[str, int] | None,
    axis: Axis | None,
    cells: list[_Cell],
    roots: dict[str, Symbol],
) -> None:
    if symbol.family is not None or not symbol.is_free:
        return
    if axis is None or not cells:
        symbol.disable("it is no dimension of a parameter" if slot is None else view.why.get(slot, "nothing prunable is in it"))
        return
    size = symbol.size or len(axis)
    parents = [roots[c.name] for c in cells]
    covers = [view.cover(axis, c) for c in cells]
    if len(cells) == 1 and len(covers[0]) == size:
        symbol.follow_family(parents[0])
        return
    apart = sum(map(len, covers)) == len(set().union(*covers))
    how = "concat" if apart else "product" if all(len(c) == size for c in covers) else "mixed"
    parts: list[Symbol | None] = list(parents)
    if apart and sum(map(len, covers)) < size:
        parts = _with_constants(parents, covers, size)
    symbol.link_to_parts(parts, how)


def _with_constants(parents: list[Symbol], covers: list[set[int]], size: int) -> list[Symbol | None]:
    """Put None where a stretch of the axis belongs to no family."""
    parts: list[Symbol | None] = []
    position = 0
    for parent, cover in zip(parents, covers, strict=True):
        if min(cover) > position:
            parts.append(None)
        parts.append(parent)
        position = max(cover) + 1
    return [*parts, None] if position < size or len(parts) == 1 else parts
