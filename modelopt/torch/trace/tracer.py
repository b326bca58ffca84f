"""Graphs of a model and of every module in it: by torch.fx where Python lets it, else recorded from a real forward pass.

`RobustTracer` is a torch.fx tracer that turns a module it cannot follow into a leaf and goes on. `GraphCollection` holds the
graph of each module that ran; `recursive_trace` makes one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import fx, nn

from modelopt.core.errors import TraceError, UnknownNameError, did_you_mean
from modelopt.core.registry import TypeRegistry
from modelopt.torch.trace.inputs import MODEL_ERRORS, PLUGINS, Inputs, resolve_inputs, unchanged
from modelopt.torch.trace.record_graph import Recording, record, record_aten
from modelopt.torch.utils import unwrap_model


def _reason(error: BaseException) -> str:
    return f"torch.fx: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


class RobustTracer(fx.Tracer):
    """A torch.fx tracer with leaf fallback: the innermost module whose forward torch.fx cannot follow becomes a leaf.

    After `trace`, `failed` maps those modules to the reason, and `visited` lists every module that was called, in order.
    """

    _leaves: TypeRegistry[bool] = TypeRegistry("leaf module")

    def __init__(self) -> None:
        super().__init__()
        self.failed: dict[nn.Module, str] = {}
        self.visited: dict[nn.Module, None] = {}

    @classmethod
    def register_leaf(cls, module_type: type[nn.Module]) -> type[nn.Module]:
        """Never trace into modules of this type or of its subclasses (a decorator too). Raises ConfigError if it is known."""
        cls._leaves.register(module_type, True)
        return module_type

    @classmethod
    def unregister_leaf(cls, module_type: type[nn.Module]) -> None:
        """Take `register_leaf` back. Raises UnknownNameError for a type that was never registered."""
        cls._leaves.unregister(module_type)

    @classmethod
    def is_registered_leaf(cls, module: nn.Module | type[nn.Module]) -> bool:
        """Return whether a module (or type) is a leaf by registration, its own or that of a base class."""
        return bool(cls._leaves.match(module))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether `m` stays one node: by registration, because it is torch's own, or because it failed before."""
        if m is self.root:
            return False
        return m in self.failed or self.is_registered_leaf(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace into a module; where that fails, take its nodes back and leave one node for the whole module."""
        self.visited.setdefault(m)
        if m in self.failed:
            return super().call_module(m, forward, args, kwargs)
        last = next(iter(reversed(self.graph.nodes)), None)
        stack = self.module_stack.copy()
        try:
            return super().call_module(m, forward, args, kwargs)
        except MODEL_ERRORS as error:
            self.failed[m] = _reason(error)
        self.module_stack = stack
        for node in reversed(self.graph.nodes):
            if node is last:
                break
            if node.op != "get_attr":  # torch.fx remembers those for the whole trace
                self.graph.erase_node(node)
        return super().call_module(m, forward, args, kwargs)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Return the graph of `root`, the modules in `self.failed` as leaves. Raises what torch.fx raises for the root itself.

        >>> graph = RobustTracer().trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
        >>> [node.op for node in graph.nodes]
        ['placeholder', 'call_module', 'call_module', 'output']
        """
        with unchanged(root):
            graph = super().trace(root, concrete_args)
        for node in reversed(graph.nodes):
            if node.op == "get_attr" and not node.users:
                graph.erase_node(node)
        return graph


def _fx_graph(module: nn.Module, concrete_args: dict[str, Any] | None = None) -> tuple[fx.Graph | None, str | None, RobustTracer]:
    tracer = RobustTracer()
    for plugin in PLUGINS.load_for([module]):
        hopeless: Callable[[nn.Module], str | None] | None = getattr(plugin, "fx_hopeless", None)
        why = hopeless(module) if hopeless is not None else None
        if why is not None:
            return None, why, tracer
    try:
        return tracer.trace(module, concrete_args), None, tracer
    except MODEL_ERRORS as error:
        return None, _reason(error), tracer


class GraphCollection:
    """The graphs of a model's modules. Modules are keys by identity; dotted names work too.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    >>> graphs = GraphCollection().recursive_trace(model)
    >>> graphs[model] is graphs[""], graphs.source(model)
    (True, 'fx')
    """

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        self._names: dict[str, nn.Module] = {}
        self._graphs: dict[nn.Module, tuple[fx.Graph, str]] = {}
        self._messages: dict[nn.Module, str] = {}
        self._visited: dict[nn.Module, None] = {}
        self._concrete: dict[str, Any] = {}
        self._given: Any = None
        self._inputs: Inputs | None = None
        self._recording: Recording | None = None

    def recursive_trace(
        self, model: nn.Module, concrete_args: dict[str, Any] | None = None, dummy_input: Any = None
    ) -> GraphCollection:
        """Trace `model` and everything in it; return self.

        Args:
            model: any module; wrappers of `torch.compile` and data parallelism are looked through.
            concrete_args: arguments of forward that are constants while tracing, by name.
            dummy_input: a tensor, a tuple, a dict or `(args, kwargs)` for the forward pass; None guesses it if it is needed.
        """
        self.__init__()  # type: ignore[misc]
        self.model = unwrap_model(model)
        self._names = dict(self.model.named_modules(remove_duplicate=False))
        self._concrete, self._given = dict(concrete_args or {}), dummy_input
        graph, why, tracer = _fx_graph(self.model, concrete_args)
        if graph is not None:
            self._graphs[self.model] = (graph, "fx")
            self._messages.update(tracer.failed)
            self._visited = {self.model: None, **tracer.visited}
            if tracer.failed:
                self._record()
        else:
            self._messages[self.model] = str(why)
            self._record()
            if self.model not in self._graphs:
                self._trace_parts(self.model)
        return self

    def _trace_parts(self, module: nn.Module) -> None:
        """Where neither way gave the graph of the whole, try torch.fx on the parts, down to those that it can follow."""
        for child in module.children():
            if child in self._visited:
                continue
            if type(child).forward is nn.Module.forward:  # ModuleList and the like
                self._trace_parts(child)
                continue
            graph, why, tracer = _fx_graph(child)
            if graph is not None:
                self._graphs.setdefault(child, (graph, "fx"))
                self._visited.update({child: None, **tracer.visited})
            else:
                self._messages.setdefault(child, str(why))
                self._visited.setdefault(child)
                self._trace_parts(child)

    @property
    def inputs(self) -> Inputs:
        """`(args, kwargs)` that the model is run with. Raises TraceError if they were not given and cannot be guessed."""
        if self._inputs is None:
            args, kwargs = resolve_inputs(self.root, self._given)
            self._inputs = args, {**self._concrete, **kwargs}
        return self._inputs

    @property
    def recording(self) -> Recording:
        """What one forward pass showed: module-level graphs and calls. Made when first needed.

        Raises TraceError if there are no inputs; a model that fails leaves `recording.error`.
        """
        if self._recording is None:
            self._recording = record(self.root, self.inputs)
            for module, graph in self._recording.graphs.items():
                self._graphs.setdefault(module, (graph, "recorded"))
                self._visited.setdefault(module)
        return self._recording

    def _record(self) -> None:
        root = self.root
        try:
            error = self.recording.error
        except TraceError as failure:
            error = failure
        if error is not None and root not in self._graphs:
            self._messages[root] = f"{self._messages.get(root, 'no graph')}; a recorded forward pass: {error}"

    @property
    def root(self) -> nn.Module:
        """The traced model, without wrappers."""
        if self.model is None:
            raise TraceError("Nothing was traced yet. Call recursive_trace(model) first.")
        return self.model

    def _resolve(self, module: nn.Module | str) -> nn.Module:
        root = self.root
        if isinstance(module, str):
            if module not in self._names:
                hint = did_you_mean(module, self._names)
                raise UnknownNameError(f'There is no submodule "{module}" in {type(root).__name__}.{hint}')
            return self._names[module]
        return unwrap_model(module)

    def _find(self, module: nn.Module) -> fx.Graph | None:
        if module in self._graphs:
            return self._graphs[module][0]
        if module not in self._visited:
            if self._recording is None and not any(module is m for m in self._names.values()):
                return None
            self._record()
            return self._graphs[module][0] if module in self._graphs else None
        graph, why, _ = _fx_graph(module)
        if graph is not None:
            self._graphs[module] = (graph, "fx")
            return graph
        self._messages.setdefault(module, str(why))
        self._record()
        return self._graphs[module][0] if module in self._graphs else None

    def __getitem__(self, module: nn.Module | str) -> fx.Graph:
        """Return the graph of a module that ran. Raises TraceError with the reason where there is none."""
        module = self._resolve(module)
        graph = self._find(module)
        if graph is not None:
            return graph
        names = [n for n, m in self._names.items() if m is module]
        if not names:
            raise TraceError(f"This {type(module).__name__} is not part of the traced {type(self.root).__name__}.")
        why = self._messages.get(module) or self._no_recording() or "it did not run on the inputs of the trace"
        raise TraceError(f'There is no graph of "{names[0]}" ({type(module).__name__}): {why}')

    def _no_recording(self) -> str:
        root = self.root
        try:
            error = self.recording.error
        except TraceError as failure:
            error = failure
        return str(error) if error is not None and root is not None else ""

    def __contains__(self, module: nn.Module) -> bool:
        return self._find(self._resolve(module)) is not None

    def __iter__(self) -> Iterator[nn.Module]:
        """Yield every module that has a graph, the root first, then in the order of `model.modules()`."""
        for module in self.root.modules():
            if (module in self._visited or module in self._graphs) and self._find(module) is not None:
                yield module

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def is_failed(self, module: nn.Module | str) -> bool:
        """Return whether a module was tried and has no graph at all, neither by torch.fx nor recorded."""
        module = self._resolve(module)
        return module in self._visited | self._messages and self._find(module) is None

    def is_unvisited(self, module: nn.Module | str) -> bool:
        """Return whether a module never ran in the trace (a container, a branch not taken, a module of another model)."""
        module = self._resolve(module)
        return module not in self._visited and module not in self._messages and self._find(module) is None

    def failure_msg(self, module: nn.Module | str) -> str | None:
        """Return why torch.fx (and the recorded pass, if it was needed) could not follow a module; None if nothing failed."""
        return self._messages.get(self._resolve(module))

    def source(self, module: nn.Module | str) -> str:
        """Return how the graph of a module was made: "fx" or "recorded"."""
        module = self._resolve(module)
        self[module]
        return self._graphs[module][1]

    def module(self, name: str = "") -> nn.Module:
        """Return the submodule of a dotted name ("" is the model). Raises UnknownNameError, with the nearest name."""
        return self._resolve(name)

    def name_of(self, module: nn.Module) -> str:
        """Return the (first) dotted name of a module of the model; the root is the empty name."""
        for name, known in self._names.items():
            if known is module:
                return name
        raise UnknownNameError(f"This {type(module).__name__} is not part of the traced {type(self.root).__name__}.")

    def aten(self, module: nn.Module | str = "") -> fx.Graph:
        """Return the operators that one call of `module` sends to the dispatcher, children included; runs the model once.

        Raises TraceError if the model fails, or does not call the module.
        """
        return record_aten(self.root, self.inputs, self._resolve(module))


def recursive_trace(model: nn.Module, concrete_args: dict[str, Any] | None = None, dummy_input: Any = None) -> GraphCollection:
    """Return the graphs of `model` and of every module in it that ran.

    Args:
        model: any module, on any device, "meta" included.
        concrete_args: arguments of forward that are constants while tracing, by name.
        dummy_input: inputs for a forward pass (tensor, tuple, dict or `(args, kwargs)`), needed where torch.fx cannot follow the
            model and no inputs can be guessed.

    >>> graphs = recursive_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    >>> [type(module).__name__ for module in graphs]
    ['Sequential', 'Linear', 'ReLU']
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"A model is an nn.Module; this is a {type(model).__name__}.")
    return GraphCollection().recursive_trace(model, concrete_args, dummy_input)
