"""One size of one module, and what decides it (`symbols` has the states and the words)."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from fractions import Fraction
from typing import ClassVar

from modelopt.core.errors import TraceError

Slots = tuple[tuple[str, int], ...]


class CLType(enum.Enum):
    """Cross-layer significance of a symbol."""

    NONE = "none"
    INCOMING = "incoming"
    OUTGOING = "outgoing"


_CLType = CLType


class Symbol:
    """One size of one module.

    Args:
        is_searchable: whether it may be chosen freely as long as it is free.
        is_sortable: whether its entries may be put in any order.
        cl_type: whether the input or the output of the module shows it.
        elastic_dims: the dimensions of the module's output (input, if INCOMING) that it is the size of; None if none.
        slots: the parameter dimensions that have this size: `(("weight", 0), ("bias", 0))`.
        size: how many entries it has; None if unknown.

    >>> a, b = Symbol(is_searchable=True, cl_type=Symbol.CLType.OUTGOING), Symbol(cl_type=Symbol.CLType.INCOMING)
    >>> b.link_to(a)
    >>> a.is_dangling, b.is_dynamic, b.parent is a
    (True, True, True)
    """

    CLType: ClassVar[type[_CLType]] = _CLType

    def __init__(
        self,
        is_searchable: bool = False,
        is_sortable: bool = True,
        cl_type: _CLType = _CLType.NONE,
        elastic_dims: Iterable[int] | None = None,
        slots: Slots = (),
        size: int | None = None,
    ) -> None:
        self._searchable = is_searchable
        self._sortable = is_sortable
        self._constant = False
        self._parts: tuple[Symbol | None, ...] = ()
        self._dependents: list[Symbol] = []
        self.how = ""
        self.cl_type: _CLType = cl_type
        self.elastic_dims = None if elastic_dims is None else frozenset(elastic_dims)
        self.slots = slots
        self.size = size
        self.step = 1
        self.ratio = Fraction(1)
        self.family: str | None = None
        self.reason = ""

    @property
    def parents(self) -> tuple[Symbol, ...]:
        """What it follows: one symbol, or those that are concatenated to it, in order (stretches that are constant left out)."""
        return tuple(p for p in self._parts if p is not None)

    @property
    def parent(self) -> Symbol | None:
        """The one symbol that it follows; None if it follows none, or a concatenation."""
        return self._parts[0] if len(self._parts) == 1 else None

    @property
    def root(self) -> Symbol:
        """The symbol at the end of the chain of single parents: free, constant or a concatenation."""
        symbol = self
        while symbol.parent is not None:
            symbol = symbol.parent
        return symbol

    @property
    def sources(self) -> tuple[Symbol, ...]:
        """The free or constant symbols that decide its size, in order; itself, if nothing else does."""
        if self._constant or not self._parts:
            return (self,)
        return tuple(s for p in self.parents for s in p.sources)

    @property
    def is_concat(self) -> bool:
        """Whether it follows several symbols; `how` says: one behind the other ("concat"), multiplied ("product") or both."""
        return len(self._parts) > 1

    @property
    def is_constant(self) -> bool:
        """Whether its size must not change: by itself, or because all that it follows is constant."""
        return self._constant or (bool(self._parts) and all(p is None or p.is_constant for p in self._parts))

    @property
    def is_dynamic(self) -> bool:
        """Whether its size follows other symbols."""
        return bool(self._parts) and not self.is_constant

    @property
    def is_free(self) -> bool:
        """Whether it is neither constant nor dynamic."""
        return not self._parts and not self._constant

    @property
    def is_searchable(self) -> bool:
        """Whether its size may be chosen."""
        return self._searchable and self.is_free

    @property
    def is_sortable(self) -> bool:
        """Whether its entries may be put in any order."""
        return self._sortable and not self.is_constant and all(p.is_sortable for p in self.parents)

    @property
    def is_incoming(self) -> bool:
        """Whether the input of the module must match it."""
        return self.cl_type is _CLType.INCOMING

    @property
    def is_outgoing(self) -> bool:
        """Whether the output of the module shows it."""
        return self.cl_type is _CLType.OUTGOING

    @property
    def is_cross_layer(self) -> bool:
        """Whether other modules see it: INCOMING or OUTGOING."""
        return self.cl_type is not _CLType.NONE

    @property
    def is_dangling(self) -> bool:
        """Whether it is free and other modules see it: whoever chooses its size chooses for them too."""
        return self.is_free and self.is_cross_layer

    @property
    def choices(self) -> range:
        """The sizes that it may have: multiples of `step` up to its own, or its own alone. Empty if the size is unknown."""
        if self.size is None:
            return range(0)
        if self.is_constant:
            return range(self.size, self.size + 1)
        parent = self.parent
        step = max(1, int(parent.choices.step * self.ratio)) if parent is not None else self.step
        return range(step, self.size + 1, step)

    @property
    def dependents(self) -> tuple[Symbol, ...]:
        """The symbols that follow it directly."""
        return tuple(self._dependents)

    def link_to(self, parent: Symbol) -> None:
        """Follow `parent` from now on; what followed this symbol goes along. A constant on either side makes both constant.

        Raises TraceError if the two have different known sizes, or if this symbol is already decided by something else.
        """
        mine, theirs = self.root, parent.root
        if mine is theirs:
            return
        if None not in (mine.size, theirs.size) and mine.size != theirs.size:
            raise TraceError(f"{self} cannot follow {parent}: {mine.size} entries against {theirs.size}.")
        if mine.is_constant or theirs.is_constant:
            reason = mine.reason if mine.is_constant else theirs.reason
            mine.disable(reason)
            theirs.disable(reason)
            return
        if mine.is_concat and theirs.is_concat:
            mine._match(theirs)
            return
        if mine.is_concat:
            mine, theirs = theirs, mine
        if mine in theirs._ancestors():
            raise TraceError(f"{self} cannot follow {parent}, which is made of it.")
        mine._follow((theirs,))

    def follow_family(self, root: Symbol) -> None:
        """Follow a symbol with another number of entries: `ratio` of its own for each of the root's."""
        if root is self:
            return
        if self.size is not None and root.size:
            self.ratio = Fraction(self.size, root.size)
        self._follow((root,))

    def link_to_parts(self, parts: Iterable[Symbol | None], how: str = "concat") -> None:
        """Follow several symbols, one behind the other; None stands for a stretch that is constant.

        Raises TraceError if this symbol is not free.
        `how`: "concat"; "product" where the sizes multiply (heads x width of a head); "mixed" for a concatenation of products.
        """
        parts = tuple(parts)
        if not self.is_free:
            raise TraceError(f"{self} is decided already; only a free symbol can be made of parts.")
        if parts == (None,):
            self.disable()
            return
        self.how = how
        self._follow(parts)

    def disable(self, reason: str = "") -> None:
        """Make it constant, and with it everything that it follows and that follows it."""
        todo, seen = [self.root], set()
        while todo:
            symbol = todo.pop()
            if id(symbol) in seen or symbol._constant:
                continue
            seen.add(id(symbol))
            symbol._constant = True
            symbol.reason = symbol.reason or reason
            todo += [p.root for p in symbol.parents]
            todo += [d for d in symbol._dependents if not d.is_concat]

    def _follow(self, parts: tuple[Symbol | None, ...]) -> None:
        self._parts = parts
        for part in self.parents:
            part._dependents.append(self)

    def _match(self, other: Symbol) -> None:
        """Two concatenations must agree: part by part if they are cut alike, else everything in them is constant."""
        alike = len(self._parts) == len(other._parts) and all(
            a is not None and b is not None and a.size == b.size for a, b in zip(self._parts, other._parts, strict=False)
        )
        if not alike:
            self.disable("two concatenations are cut differently")
            other.disable("two concatenations are cut differently")
            return
        for mine, theirs in zip(self.parents, other.parents, strict=True):
            mine.link_to(theirs)

    def _ancestors(self) -> set[Symbol]:
        found: set[Symbol] = set()
        todo = [self]
        while todo:
            for part in todo.pop().parents:
                if part not in found:
                    found.add(part)
                    todo.append(part)
        return found

    def __repr__(self) -> str:
        state = "constant" if self.is_constant else "dynamic" if self.is_dynamic else "searchable" if self._searchable else "free"
        family = f", family={self.family}" if self.family else ""
        return f"Symbol({state}, {self.cl_type.value}, size={self.size}{family})"
