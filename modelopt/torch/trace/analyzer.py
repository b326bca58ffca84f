"""`analyze_symbols`: the sizes of a model that may change and which of them change together.

Where the model can be run, the symbols are a view of axis inference (`axis_symbols`); where it cannot, or where the user
registered rules of his own for modules or graph nodes, they are read off the graphs (`dependencies`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from modelopt.core.errors import ConfigError, TraceError
from modelopt.torch.trace.dependencies import GraphDependencyProcessor
from modelopt.torch.trace.symbols import Symbol, SymInfo, SymMap
from modelopt.torch.trace.tracer import GraphCollection, recursive_trace

METHODS = ("auto", "axes", "graph")


@dataclass
class Analyzer:
    """The symbols of a model, linked.

    Attributes:
        graphs: the graphs of its modules.
        sym_map: the symbols by module.
        method: "axes" or "graph".
        axes: the result of axis inference, None for "graph".
        families: the free symbol of each family by the family's name; empty for "graph".
        note: why axis inference was not used, if it was not.
    """

    graphs: GraphCollection
    sym_map: SymMap
    method: str
    axes: Any = None
    families: dict[str, Symbol] = field(default_factory=dict)
    note: str = ""

    def named_modules(self) -> Iterator[tuple[str, SymInfo]]:
        """Yield (dotted name, symbols) of every module that has symbols."""
        yield from self.sym_map.named_modules()

    def named_symbols(self, module: nn.Module | str | None = None) -> Iterator[tuple[str, Symbol]]:
        """Yield (name, symbol), of one module or of all."""
        yield from self.sym_map.named_symbols(module)

    def named_in_symbols(self, module: nn.Module | str | None = None) -> Iterator[tuple[str, Symbol]]:
        """Yield the symbols that inputs must match."""
        yield from self.sym_map.named_in_symbols(module)

    def named_out_symbols(self, module: nn.Module | str | None = None) -> Iterator[tuple[str, Symbol]]:
        """Yield the symbols that outputs show."""
        yield from self.sym_map.named_out_symbols(module)

    def named_dangling_symbols(self, module: nn.Module | str | None = None) -> Iterator[tuple[str, Symbol]]:
        """Yield the symbols that are free and seen by other modules: whoever chooses one chooses for a family."""
        yield from self.sym_map.named_dangling_symbols(module)

    def get_symbol(self, module: nn.Module | str, name: str) -> Symbol:
        """Return one symbol. Raises UnknownNameError, with the nearest name."""
        return self.sym_map.get_symbol(module, name)

    def name_of(self, symbol: Symbol) -> str:
        """Return the dotted name of a symbol; "" for one that no module has."""
        return next((name for name, known in self.named_symbols() if known is symbol), "")


def analyze_symbols(
    model: nn.Module,
    gc: GraphCollection | Mapping[str, Any] | None = None,
    sym_map: SymMap | None = None,
    *,
    concrete_args: Mapping[str, Any] | None = None,
    dummy_input: Any = None,
    method: str = "auto",
) -> Analyzer:
    """Find the sizes of a model that may change, and link those that must change together. The model itself is not changed.

    Args:
        model: any module.
        gc: its graphs, if they were traced before (a dict here is taken as `concrete_args`).
        sym_map: symbols to link instead of those of the registered rules.
        concrete_args: arguments of forward that are constants while tracing.
        dummy_input: inputs for a forward pass; None takes those of `gc`, or guesses.
        method: "axes" (axis inference; needs inputs), "graph" (rules on the graphs), or "auto".

    Raises TraceError for "axes" if the model does not run.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [name for name, symbol in analyze_symbols(model).named_dangling_symbols()]
    ['0.out_features']
    """
    if method not in METHODS:
        raise ConfigError(f'There is no method "{method}". Take one of: {", ".join(METHODS)}.')
    if isinstance(gc, Mapping):
        concrete_args = {**gc, **(concrete_args or {})}
        gc = None
    graphs = gc if gc is not None else recursive_trace(model, dict(concrete_args or {}) or None, dummy_input)
    note = ""
    if method == "auto" and (sym_map is not None or _has_own_rules(model)):
        method, note = "graph", "rules were registered for modules or nodes of this model"
    if method in ("auto", "axes"):
        try:
            return _by_axes(graphs, dummy_input)
        except TraceError as error:
            if method == "axes":
                raise
            note = str(error)
    return _by_graphs(graphs, sym_map, note)


def _has_own_rules(model: nn.Module) -> bool:
    own = [p for p in GraphDependencyProcessor._processors if not type(p).__module__.startswith("modelopt.")]
    rules = (SymMap.rule_for(m) for m in model.modules())
    return bool(own) or any(r is not None and not r.__module__.startswith("modelopt.") for r in rules)


def _by_axes(graphs: GraphCollection, dummy_input: Any) -> Analyzer:
    from modelopt.torch.trace.axis_symbols import link_from_axes
    from modelopt.torch.trace.inputs import infer

    model = graphs.root
    axes = infer(model, dummy_input if dummy_input is not None else graphs.inputs)
    sym_map = SymMap(model)
    return Analyzer(graphs, sym_map, "axes", axes, link_from_axes(model, axes, sym_map))


def _by_graphs(graphs: GraphCollection, sym_map: SymMap | None, note: str) -> Analyzer:
    """Process the graph of the root, and of every module that no graph processed before goes into."""
    root = graphs.root
    sym_map = sym_map if sym_map is not None else SymMap(root)
    covered: set[nn.Module] = set()
    for module in graphs:
        if module in covered or module in sym_map:
            continue
        graph = graphs[module]
        GraphDependencyProcessor(graph, sym_map, module).process()
        inside = dict(module.named_modules(remove_duplicate=False))
        called = {inside[str(n.target)] for n in graph.nodes if n.op == "call_module" and str(n.target) in inside}
        opaque = {m for m in called if m not in sym_map}
        covered |= {m for m in module.modules() if not any(m in set(o.modules()) for o in opaque)}
    for info in (info for _, info in sym_map.named_modules()):
        for _, symbol in info.named_symbols():
            if symbol.is_free and symbol.is_incoming:
                symbol.disable("no graph reaches it")
    return Analyzer(graphs, sym_map, "graph", note=note)
