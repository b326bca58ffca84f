"""Graphs recorded from one real forward pass, for models whose Python torch.fx cannot follow.

    module level    call_module for the children that ran, call_function and call_method for the torch functions between them
    ATen level      every operator that reached the dispatcher inside one module, children included

A tensor is known by its identity while it lives, so nothing is kept alive for the module level. What a module reads that is
neither its argument, nor its parameter, nor made by it, becomes a placeholder named `captured`.
"""

from __future__ import annotations

import inspect
import operator
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from modelopt.core.errors import TraceError
from modelopt.torch.trace.inputs import Inputs, run

_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
_SWAPPED = {"__rsub__": operator.sub, "__rtruediv__": operator.truediv, "__rpow__": operator.pow, "__rmatmul__": operator.matmul}
_SAME = {"__radd__": operator.add, "__rmul__": operator.mul, "__ror__": operator.or_, "__rand__": operator.and_}


class Opaque:
    """A value in a graph that is neither a tensor nor plain data; only its type is kept."""

    def __init__(self, value: object) -> None:
        self.type = type(value).__name__

    def __repr__(self) -> str:
        return f"<{self.type}>"


def side_output(made_by: Any) -> Any:
    """Stand for a tensor that a child module made and handed on by another way than its return value, such as a cache."""
    raise TraceError("A recorded graph with a side output can be read but not executed.")


@dataclass(frozen=True)
class Call:
    """One call of a module: its dotted name, and the identities of the tensors it was given and returned, in order.

    `sources` follows each input back through selections of rows, so that experts that read parts of one tensor share a source.
    """

    name: str
    module: nn.Module
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    sources: tuple[int, ...]


@dataclass
class Recording:
    """Graphs by module, in the order in which the modules finished; the calls; the error that ended the pass early, if any."""

    graphs: dict[nn.Module, fx.Graph] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    error: TraceError | None = None


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Yield the tensors in nested tuples, lists and mappings with the way to each."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, (*path, key))


class _Frame:
    """One call of one module while it runs."""

    def __init__(
        self, recorder: Recorder, module: nn.Module, name: str, call: fx.Node | None = None, given: tuple[int, ...] = ()
    ) -> None:
        self.recorder, self.module, self.name, self.call, self.given = recorder, module, name, call, given
        self.graph = fx.Graph()
        self.values: dict[int, tuple[weakref.ref[Tensor], fx.Node, tuple[Any, ...]]] = {}
        self.children: list[_Frame] = []
        self.captured = 0

    def bind(self, tensor: Tensor, node: fx.Node, path: tuple[Any, ...] = ()) -> None:
        self.values[id(tensor)] = (weakref.ref(tensor), node, path)

    def made(self, tensor: Tensor) -> bool:
        found = self.values.get(id(tensor))
        return (found is not None and found[0]() is tensor) or any(c.made(tensor) for c in self.children)

    def node_of(self, tensor: Tensor) -> fx.Node:
        found = self.values.get(id(tensor))
        if found is not None and found[0]() is tensor:
            _, node, path = found
            if path:
                for key in path:
                    node = self.graph.call_function(operator.getitem, (node, key))
                self.bind(tensor, describe(node, tensor))
            return node
        node = self._foreign(tensor)
        self.bind(tensor, describe(node, tensor))
        return node

    def _foreign(self, tensor: Tensor) -> fx.Node:
        name = self.recorder.tensor_names.get(id(tensor))
        if name is not None:
            prefix = f"{self.name}." if self.name else ""
            return self.graph.create_node("get_attr", name.removeprefix(prefix))
        for child in reversed(self.children):
            if child.call is not None and child.made(tensor):
                return self.graph.call_function(side_output, (child.call,))
        self.captured += 1
        first = next(iter(self.graph.nodes), None)
        with self.graph.inserting_before(first):
            return self.graph.placeholder(f"captured_{self.captured}")

    def arguments(self, value: Any) -> Any:
        """Return a call's argument with nodes in the place of tensors."""
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, _PLAIN) or value is Ellipsis:
            return value
        if isinstance(value, slice):
            return slice(*(self.arguments(v) for v in (value.start, value.stop, value.step)))
        if isinstance(value, tuple | list):
            made = [self.arguments(v) for v in value]
            return made if isinstance(value, list) else tuple(made)
        if isinstance(value, Mapping):
            return {str(k): self.arguments(v) for k, v in value.items()}
        return Opaque(value)


def describe(node: fx.Node, value: Any) -> fx.Node:
    """Note the shape and dtype of what a node gives: `meta["shape"]`, `meta["dtype"]` (of the first tensor in it)."""
    first = value if isinstance(value, Tensor) else next((t for _, t in leaves(value)), None)
    if first is not None:
        node.meta["shape"], node.meta["dtype"] = tuple(first.shape), first.dtype
    return node


class Recorder(TorchFunctionMode):
    """Builds a graph for every module that is called while it is active (see `record`)."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.recording = Recording()
        self.module_names = {id(m): n for n, m in root.named_modules()}
        named = [*root.named_parameters(), *root.named_buffers()]
        self.tensor_names = {id(t): n for n, t in named}
        self.stack: list[_Frame] = []
        self._tokens: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._sources: dict[int, int] = {}
        self._count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        mutates = name in ("__setitem__", "__setattr__")
        if self.stack and (mutates or isinstance(result, Tensor | tuple | list)):
            value = args[0] if mutates else result
            if isinstance(value, Tensor) or any(True for _ in leaves(value)):
                self._note(func, name, args, kwargs, value)
        return result

    def _note(self, func: Any, name: str, args: Any, kwargs: Any, value: Any) -> None:
        frame = self.stack[-1]
        kind, target, swap = self._kind(func, name)
        given = frame.arguments(tuple(args))
        if swap:
            given = given[::-1]
        if target is getattr:
            given = (*given, func.__self__.__name__)
        node = frame.graph.create_node(kind, target, given, frame.arguments(kwargs))
        describe(node, value)
        if isinstance(value, Tensor):
            frame.bind(value, node)
            self._select(name, args, value)
        else:
            for path, tensor in leaves(value):
                frame.bind(tensor, node, path)

    def _select(self, name: str, args: Any, value: Tensor) -> None:
        """Remember what `value` took its rows from: x[index], x.index_select(0, index), x.gather(...)."""
        if not args or not isinstance(args[0], Tensor):
            return
        if name == "__getitem__":
            rows = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
            selects = isinstance(rows, Tensor)
        else:
            selects = name in ("index_select", "repeat_interleave")
        if selects and value.dim() == args[0].dim():
            source = self.token(args[0])
            self._sources[self.token(value)] = self._sources.get(source, source)

    def _kind(self, func: Any, name: str) -> tuple[str, Any, bool]:
        if name == "__get__":
            return "call_function", getattr, False
        if getattr(Tensor, name, None) is func:
            if name in _SWAPPED:
                return "call_function", _SWAPPED[name], True
            plain = _SAME.get(name) or getattr(operator, name, None)
            if name.startswith("__") and plain is not None:
                return "call_function", plain, False
            return "call_method", name, False
        return "call_function", func, False

    def token(self, tensor: Tensor) -> int:
        """Return a number for this tensor; another tensor never gets it, even in the same memory."""
        found = self._tokens.get(id(tensor))
        if found is not None and found[0]() is tensor:
            return found[1]
        self._count += 1
        self._tokens[id(tensor)] = (weakref.ref(tensor), self._count)
        return self._count

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Open a frame for a call of `module` and give the parent a call_module node."""
        name = self.module_names.get(id(module), type(module).__name__)
        call = None
        parent = self.stack[-1] if self.stack else None
        if parent is not None:
            prefix = f"{parent.name}." if parent.name else ""
            given = parent.arguments(tuple(args)), parent.arguments(kwargs)
            call = parent.graph.create_node("call_module", name.removeprefix(prefix), *given)
            call.meta["module"], call.meta["cls"] = name, type(module).__name__
        frame = _Frame(self, module, name, call, tuple(self.token(t) for _, t in leaves((args, kwargs))))
        for label, value in _named_arguments(module, args, kwargs):
            for path, tensor in leaves(value):
                node = frame.graph.placeholder("_".join(map(str, (label, *path))))
                frame.bind(tensor, describe(node, tensor))
        if parent is not None:
            parent.children.append(frame)
        self.stack.append(frame)

    def exit(self, module: nn.Module, output: Any) -> None:
        """Close the frame: its graph gets an output, and the parent learns which tensors came out."""
        while self.stack:
            frame = self.stack.pop()
            if frame.module is module:
                break
        else:
            return
        frame.graph.output(frame.arguments(output))
        self.recording.graphs.setdefault(module, frame.graph)
        made = tuple(self.token(t) for _, t in leaves(output))
        sources = tuple(self._sources.get(t, t) for t in frame.given)
        self.recording.calls.append(Call(frame.name, module, frame.given, made, sources))
        if self.stack and frame.call is not None:
            describe(frame.call, output)
            for path, tensor in leaves(output):
                self.stack[-1].bind(tensor, frame.call, path)


def _named_arguments(module: nn.Module, args: Any, kwargs: Any) -> Iterator[tuple[str, Any]]:
    names: list[str] = []
    rest = "args"
    for name, parameter in inspect.signature(module.forward).parameters.items():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(name)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            rest = name
    for index, value in enumerate(args):
        yield (names[index] if index < len(names) else f"{rest}_{index - len(names)}"), value
    yield from kwargs.items()


def hook_calls(root: nn.Module, enter: Callable[..., None], exit: Callable[..., None], stack: ExitStack) -> None:
    """Call `enter(module, args, kwargs)` and `exit(module, output)` around every module call until `stack` closes."""
    for module in root.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        before = module.register_forward_pre_hook(lambda m, a, k: enter(m, a, k), with_kwargs=True)
        after = module.register_forward_hook(lambda m, a, k, out: exit(m, out), with_kwargs=True)
        stack.callback(before.remove)
        stack.callback(after.remove)


def record(model: nn.Module, inputs: Inputs) -> Recording:
    """Run `model` once and return the module-level graph of every module that ran.

    If the model fails, the recording holds the modules that had finished and `error`, a TraceError with the model's own error.

    >>> model = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
    >>> [n.op for n in record(model, ((torch.ones(1, 4),), {})).graphs[model].nodes]
    ['placeholder', 'call_module', 'call_module', 'output']
    """
    recorder = Recorder(model)
    with ExitStack() as stack:
        hook_calls(model, recorder.enter, recorder.exit, stack)
        try:
            run(model, inputs, lambda: recorder)
        except TraceError as error:
            recorder.recording.error = error
    return recorder.recording


class _AtenMode(TorchDispatchMode):
    """Writes every ATen operator that runs while `frame` is set into its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.frame: _Frame | None = None
        self.scopes: list[str] = []
        self.kept: list[Any] = []  # operators inside operators are seen only if their tensors live on

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.frame is not None:
            self.kept.append((args, kwargs, result))
            frame = self.frame
            node = frame.graph.call_function(func, frame.arguments(tuple(args)), frame.arguments(kwargs or {}))
            node.meta["scope"] = self.scopes[-1] if self.scopes else ""
            describe(node, result)
            if isinstance(result, Tensor):
                frame.bind(result, node)
            else:
                for path, tensor in leaves(result):
                    frame.bind(tensor, node, path)
        return result


def record_aten(model: nn.Module, inputs: Inputs, module: nn.Module) -> fx.Graph:
    """Run `model` once and return the ATen operators of the first call of `module`; `node.meta["scope"]` names the submodule.

    Raises TraceError if the model fails, or never calls `module`.
    """
    mode, recorder = _AtenMode(), Recorder(model)
    done: list[fx.Graph] = []

    def enter(called: nn.Module, args: Any, kwargs: Any) -> None:
        mode.scopes.append(recorder.module_names.get(id(called), ""))
        if called is module and not done and mode.frame is None:
            mode.frame = frame = _Frame(recorder, module, recorder.module_names.get(id(module), ""))
            for label, value in _named_arguments(module, args, kwargs):
                for path, tensor in leaves(value):
                    frame.bind(tensor, describe(frame.graph.placeholder("_".join(map(str, (label, *path)))), tensor))

    def exit(called: nn.Module, output: Any) -> None:
        mode.scopes.pop()
        if called is module and mode.frame is not None and not done:
            mode.frame.graph.output(mode.frame.arguments(output))
            done.append(mode.frame.graph)
            mode.frame = None
            mode.kept.clear()

    with ExitStack() as stack:
        hook_calls(model, enter, exit, stack)
        run(model, inputs, lambda: mode)
    if not done:
        raise TraceError(f"{type(module).__name__} did not run on these inputs, so it has no operators. Pass other inputs.")
    return done[0]
