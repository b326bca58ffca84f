"""Concatenation along the elastic dimension: the result follows all parts, one behind the other."""

from __future__ import annotations

from torch import fx

from modelopt.torch.trace.dependencies import GraphDependencyProcessor, NodeProcessor, Place
from modelopt.torch.trace.symbols import Symbol


def concat_symbol(parts: list[Symbol | None], sizes: list[int | None], dim: int) -> Symbol:
    """Return a symbol that follows `parts` in order; None is a part that is constant.

    >>> concat_symbol([Symbol(size=4), None], [4, 2], 1).size
    6
    """
    size = sum(s for s in sizes if s is not None) if None not in sizes else None
    symbol = Symbol(cl_type=Symbol.CLType.OUTGOING, elastic_dims={dim}, size=size)
    if any(p is not None for p in parts):
        symbol.link_to_parts(parts) if len(parts) > 1 else symbol.link_to(parts[0])  # type: ignore[arg-type]
    else:
        symbol.disable("all parts are constant")
    return symbol


@GraphDependencyProcessor.register_node_processor
class Concat(NodeProcessor):
    """torch.cat: along the elastic dimension it makes a new class, along another one all parts are joined."""

    def matches(self, node: fx.Node, graph: GraphDependencyProcessor) -> bool:
        return graph.name(node) in ("cat", "concat", "concatenate") and bool(graph.inputs(node))

    def process(self, node: fx.Node, graph: GraphDependencyProcessor) -> None:
        given = graph.argument(node, 0, "tensors", ())
        parts = [n for n in given if isinstance(n, fx.Node)] if isinstance(given, tuple | list) else []
        dim = graph.argument(node, 1, "dim", 0)
        places = [graph.places[p] for p in parts if p in graph.places]
        if not places or not isinstance(dim, int) or not all(p.same(places[0]) for p in places):
            graph.stop(node, "it is concatenated with tensors that differ")
            return
        place = max(places, key=lambda p: p.rank or 0)
        if place.rank is not None and dim % place.rank != place.dim % place.rank:
            graph.join(node, parts) if len(places) == len(parts) else graph.stop(node, "it is stacked on a constant")
            return
        if place.rank is None and dim != place.dim:
            graph.stop(node, "it is concatenated along a dimension that cannot be told from its own")
            return
        symbols = [graph.symbol(p) for p in parts]
        sizes = [self._size(p, s, graph) for p, s in zip(parts, symbols, strict=True)]
        made = concat_symbol([s.root if s is not None else None for s in symbols], sizes, place.dim)
        graph.start(node, made, "concat", Place(place.dim, place.rank, place.pooled))

    @staticmethod
    def _size(node: fx.Node, symbol: Symbol | None, graph: GraphDependencyProcessor) -> int | None:
        if symbol is not None:
            return symbol.size
        target = graph.map.entry(node).target if node in graph.map else None
        return None if target is None else target.size
