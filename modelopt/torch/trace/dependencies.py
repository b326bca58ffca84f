"""Which symbols must change together, read off one torch.fx graph, node by node.

Every node that gives a tensor belongs to a class of nodes with one elastic dimension; the class has one symbol (`Map`). A node
processor says what a kind of node does to it: starts a class, hands one on, joins several, or ends them (their symbols become
constant). A node that no processor knows ends what goes in: safe by default.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx, nn

from modelopt.core.errors import TraceError
from modelopt.torch.trace.symbols import Symbol, SymInfo, SymMap


@dataclass
class Root:
    """What a class of nodes stands for: a symbol (None for a tensor without one), its origin, and whether it may change."""

    node: fx.Node
    target: Symbol | None
    id: str
    is_free: bool
    priority: int
    born: int = 0


class Map:
    """Nodes to classes of nodes that have one elastic dimension in common (union-find).

    >>> graph = fx.Graph()
    >>> a, b = graph.placeholder("a"), graph.placeholder("b")
    >>> classes = Map()
    >>> classes.create_root(a, Symbol(size=4), "a")
    >>> classes.link_nodes(b, a)
    >>> classes.root(b) is a
    True
    """

    def __init__(self) -> None:
        self._up: dict[fx.Node, fx.Node] = {}
        self._roots: dict[fx.Node, Root] = {}

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._up

    def create_root(self, node: fx.Node, target: Symbol | None, id: str = "", is_free: bool = True, priority: int = 0) -> None:
        """Start a class at `node`. Of two classes that are linked, the one with the higher priority (else the older) leads."""
        self._up[node] = node
        is_free = is_free and target is not None and not target.is_constant
        self._roots[node] = Root(node, target, id, is_free, priority, len(self._up))

    def root(self, node: fx.Node) -> fx.Node:
        """Return the node that leads the class of `node`. Raises TraceError for a node that belongs to none."""
        if node not in self._up:
            raise TraceError(f'The node "{node}" belongs to no class yet. Call create_root or link_nodes for it first.')
        while self._up[node] is not node:
            self._up[node] = node = self._up[self._up[node]]
        return node

    def entry(self, node: fx.Node) -> Root:
        """Return what the class of `node` stands for."""
        return self._roots[self.root(node)]

    def link_nodes(self, node: fx.Node, other_node: fx.Node) -> None:
        """Put `node` into the class of `other_node`; if it has one already, the two become one and their symbols are linked."""
        theirs = self.root(other_node)
        if node not in self._up:
            self._up[node] = theirs
            return
        mine = self.root(node)
        if mine is theirs:
            return
        first, second = sorted((mine, theirs), key=lambda n: (-self._roots[n].priority, self._roots[n].born))
        lead, follow = self._roots[first], self._roots.pop(second)
        self._up[second] = first
        if not (lead.is_free and follow.is_free and connect(follow.target, lead.target)):
            self._close(lead, follow, reason="it meets a tensor that must keep its size")

    def close(self, node: fx.Node, reason: str) -> None:
        """Make the class of `node` constant."""
        self._close(self.entry(node), reason=reason)

    @staticmethod
    def _close(*roots: Root, reason: str) -> None:
        for root in roots:
            root.is_free = False
            if root.target is not None:
                root.target.disable(reason)


def connect(symbol: Symbol | None, other: Symbol | None) -> bool:
    """Let `symbol` follow `other` if their sizes agree; return whether the result may still change."""
    if symbol is None or other is None:
        return False
    try:
        symbol.link_to(other) if symbol.is_free else other.link_to(symbol)  # the older one leads
    except TraceError:
        return False
    return not symbol.is_constant


@dataclass(frozen=True)
class Place:
    """Where a node has its elastic dimension: index, rank if known, and whether all dimensions behind it have size 1."""

    dim: int
    rank: int | None = None
    pooled: bool = False

    def same(self, other: Place) -> bool:
        """Return whether both are the same dimension of tensors that are broadcast together."""
        rank = self.rank or other.rank
        if rank is None or (self.rank and other.rank and self.rank != other.rank):
            return self.dim == other.dim and (self.rank == other.rank or self.dim < 0)
        return self.dim % rank == other.dim % rank


class NodeProcessor:
    """What one kind of node does to the classes. Subclass it and register it with `GraphDependencyProcessor`."""

    def matches(self, node: fx.Node, graph: GraphDependencyProcessor) -> bool:
        """Return whether this processor serves the node."""
        raise NotImplementedError

    def process(self, node: fx.Node, graph: GraphDependencyProcessor) -> None:
        """Do it: call `graph.start`, `graph.follow`, `graph.join` or `graph.stop`."""
        raise NotImplementedError


class GraphDependencyProcessor:
    """Walks a graph and links the symbols of `sym_map` that must change together.

    >>> from modelopt.torch.trace import recursive_trace
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> sym_map = SymMap(model)
    >>> GraphDependencyProcessor(recursive_trace(model)[model], sym_map, model).process()
    >>> [name for name, _ in sym_map.named_dangling_symbols()]
    ['0.out_features']
    """

    _processors: ClassVar[list[NodeProcessor]] = []

    def __init__(self, graph: fx.Graph, sym_map: SymMap, module: nn.Module) -> None:
        from modelopt.torch.trace.modules import concat, ops  # noqa: F401  (register the processors of torch's own operations)

        self.graph, self.sym_map, self.module = graph, sym_map, module
        self.modules = dict(module.named_modules(remove_duplicate=False))
        self.map = Map()
        self.places: dict[fx.Node, Place] = {}
        self.plain: set[fx.Node] = set()
        self.first_call: dict[nn.Module, fx.Node] = {}

    @classmethod
    def register_node_processor(cls, processor: type[NodeProcessor]) -> type[NodeProcessor]:
        """Register a processor class (decorator). The one registered last is asked first."""
        cls._processors.append(processor())
        return processor

    @classmethod
    def unregister_node_processor(cls, processor: type[NodeProcessor]) -> None:
        """Take `register_node_processor` back; a class that is not registered is an error."""
        found = [p for p in cls._processors if type(p) is processor]
        if not found:
            raise TraceError(f"{processor.__name__} is not registered.")
        for one in found:
            cls._processors.remove(one)

    def process(self) -> None:
        """Analyze all nodes. Incoming symbols that nothing decides are constant afterwards."""
        reached: set[nn.Module] = set()
        for node in self.graph.nodes:
            processor = next((p for p in reversed(self._processors) if p.matches(node, self)), None)
            if processor is not None:
                processor.process(node, self)
            else:
                self.stop(node, f"it goes into {node.format_node() or node.name}")
            if node.op == "call_module":
                reached.add(self.modules[str(node.target)])
        for module in reached:
            info = self.sym_map.get_sym_info(module)
            for _, symbol in info.named_in_symbols() if info is not None else ():
                if symbol.is_free:
                    symbol.disable("the input of the graph has this size")

    # ------------------------------------------------------------------ what processors ask
    def info(self, node: fx.Node) -> SymInfo | None:
        """Return the symbols of the module that a call_module node calls."""
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        return None if module is None else self.sym_map.get_sym_info(module)

    def name(self, node: fx.Node) -> str:
        """Return the plain name of the function or method that a node calls: "add", "flatten"; "" for other nodes."""
        if node.op == "call_method":
            return str(node.target)
        return getattr(node.target, "__name__", "") if node.op == "call_function" else ""

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes that give the tensors a node reads."""
        return [n for n in node.all_input_nodes if n not in self.plain]

    def argument(self, node: fx.Node, index: int, name: str, default: Any = None) -> Any:
        """Return an argument of a call by position or name."""
        return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)

    def attribute(self, node: fx.Node) -> Tensor | None:
        """Return the tensor of a get_attr node."""
        value: Any = self.module
        for part in str(node.target).split("."):
            value = getattr(value, part, None)
        return value if isinstance(value, Tensor) else None

    def symbol(self, node: fx.Node) -> Symbol | None:
        """Return the symbol of a node's elastic dimension; None if that must keep its size."""
        if node not in self.map:
            return None
        entry = self.map.entry(node)
        return entry.target if entry.is_free and entry.target is not None and not entry.target.is_constant else None

    # ------------------------------------------------------------------ what processors do
    def start(self, node: fx.Node, symbol: Symbol, name: str, place: Place, priority: int = 0) -> None:
        """The node's output has `symbol` at `place`."""
        self.map.create_root(node, symbol, name, priority=priority)
        self.places[node] = place

    def follow(self, node: fx.Node, source: fx.Node, place: Place | None = None) -> None:
        """The node's elastic dimension is that of `source`, possibly at another place."""
        self.map.link_nodes(node, source)
        where = place or self.places.get(source)
        if where is not None:
            self.places[node] = where

    def join(self, node: fx.Node, sources: Iterable[fx.Node]) -> None:
        """All of `sources` and the node have one elastic dimension at one place; where they cannot, all are constant."""
        sources = list(sources)
        first = sources[0]
        agree = all(s in self.places and first in self.places and self.places[s].same(self.places[first]) for s in sources)
        if not agree:
            self.stop(node, f"{self.name(node) or node.name} meets tensors that differ")
            return
        for source in sources[1:]:
            self.map.link_nodes(source, first)
        known = max((self.places[s] for s in sources), key=lambda p: p.rank or 0)
        self.follow(node, first, known)

    def stop(self, node: fx.Node, reason: str) -> None:
        """What goes into the node must keep its size, and nothing elastic comes out."""
        for source in self.inputs(node):
            if source in self.map:
                self.map.close(source, reason)
        self.map.create_root(node, None, is_free=False)

    def not_a_tensor(self, node: fx.Node) -> None:
        """The node gives a number, a shape or the like."""
        self.plain.add(node)
