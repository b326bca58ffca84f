"""Runs a model and labels every tensor that it computes: a TorchDispatchMode that applies one rule per executed ATen op.

It works on real Python execution: control flow, kwargs and caches are irrelevant. Modules are followed by temporary global
hooks. Labels live on the tensors themselves (one attribute), so they live exactly as long as the tensors do.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from modelopt.torch.trace.axes import algebra
from modelopt.torch.trace.axes.labels import Axis, LabelStore
from modelopt.torch.trace.axes.rules import rule_for
from modelopt.torch.trace.axes.rules.registry import MODULE_RULES, Call, Rule, tensors

_KEY = "_modelopt_axes"
_RUNS = itertools.count()
_HERE = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..", ".."))  # the package
_TORCH = os.path.dirname(os.path.abspath(torch.__file__))


@dataclass(frozen=True)
class TensorRef:
    """A tensor that passed by: `id` is the same wherever the same tensor passes."""

    id: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    axes: tuple[Axis | None, ...]


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module, with the tensors among its arguments and results."""

    name: str
    cls: str
    inputs: tuple[TensorRef, ...]
    outputs: tuple[TensorRef, ...]


@dataclass(frozen=True)
class OpCall:
    """One executed ATen op."""

    op: str
    inputs: tuple[TensorRef, ...]
    outputs: tuple[TensorRef, ...]
    module: str
    where: str


class _Info:
    """What is known of one tensor: its axes, whether it depends on parameters only, its number."""

    __slots__ = ("axes", "number", "run", "static")

    def __init__(self, run: int, axes: tuple[Axis | None, ...], static: bool, number: int) -> None:
        self.run, self.axes, self.static, self.number = run, axes, static, number


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key under which layer 2 comes before layer 10."""
    return [(0, int(p)) if p.isdigit() else (1, p) for p in re.split(r"(\d+)", name) if p]


def parameters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every distinct parameter and buffer under its first name in natural order, whatever the order of registration."""
    first: dict[int, str] = {}
    out: dict[str, torch.Tensor] = {}
    for name, tensor in _named(model):
        if first.setdefault(id(tensor), name) == name:
            out[name] = tensor
    return out


def aliases_of(model: nn.Module) -> dict[str, str]:
    """{every further name of a parameter or buffer: the name in `parameters_of`}."""
    first: dict[int, str] = {}
    return {n: first[id(t)] for n, t in _named(model) if first.setdefault(id(t), n) != n}


def _named(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    pairs = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return sorted(pairs, key=lambda pair: natural(pair[0]))


class Recorder(TorchDispatchMode):
    """Labels the tensors of one forward pass. Use as a context manager around the call of the model.

    `lift` names soft reasons to ignore ("qk", "experts"). `axes(tensor)` answers for any live tensor.
    """

    def __init__(self, model: nn.Module, *, lift: frozenset[str] = frozenset(), record_ops: bool = False) -> None:
        super().__init__()
        self.run = next(_RUNS)
        self.store = LabelStore()
        self.store.site = self._site
        self.lift = lift
        self.parameters, self.aliases = parameters_of(model), aliases_of(model)
        self.last_groups: Axis | None = None
        self.groups: dict[str, tuple[int, Axis | None]] = {}
        self.roles: defaultdict[str, list[Axis]] = defaultdict(list)
        self.chosen: list[tuple[Axis, str, bool, int]] = []
        self.unknown: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.calls: list[ModuleCall] = []
        self.ops: list[OpCall] | None = [] if record_ops else None
        self.names = {id(m): n for n, m in reversed(list(model.named_modules(remove_duplicate=False)))}
        self.stack: list[str] = []
        self.ran: set[int] = set()  # ids of modules
        self.reached: set[int] = set()  # ids of parameters that an op has read
        self.on_leave: Callable[[nn.Module, Any, Any, Any], None] | None = None
        self._leaf = 0
        self._number = 0
        self._op = ""
        self._rules: dict[Any, tuple[str, Rule | None, tuple[tuple[int, str], ...]]] = {}
        self._storages: dict[int, torch.Tensor] = {}
        self._marked: list[torch.Tensor] = []
        self._saved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._hooks: list[Any] = []
        self.parameter_names: dict[int, str] = {}
        for name, tensor in self.parameters.items():
            self._storages[tensor.untyped_storage()._cdata] = tensor
            self.parameter_names[id(tensor)] = name
            prunable = tensor.is_floating_point() or tensor.is_complex()
            self._mark(tensor, [self.store.fresh(n) if n > 1 and prunable else None for n in tensor.shape], static=True)

    @property
    def module(self) -> str:
        """The name of the module that runs now."""
        return self.stack[-1] if self.stack else ""

    # ------------------------------------------------------------------ labels of tensors
    def axes(self, tensor: torch.Tensor) -> tuple[Axis | None, ...]:
        """The axes of a tensor, one per dimension; all None for one that was never seen."""
        return self._info(tensor).axes

    def static(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor was computed from parameters and constants only."""
        return self._info(tensor).static

    def number(self, tensor: torch.Tensor) -> int:
        """A number of this tensor that no other tensor of this run has."""
        return self._info(tensor).number

    def set(self, tensor: torch.Tensor, axes: Sequence[Axis | None]) -> None:
        """Label a tensor. Dimensions of size one are never pruned."""
        info = tensor.__dict__.get(_KEY)
        static = info.static if info is not None and info.run == self.run else False
        self._mark(tensor, axes, static)

    def _mark(self, tensor: torch.Tensor, axes: Sequence[Axis | None], static: bool) -> _Info:
        shape = tensor.shape
        if len(axes) != len(shape):
            raise RuntimeError(f"{self._op}: {len(axes)} axes for a tensor of shape {tuple(shape)}")
        old = tensor.__dict__.get(_KEY)
        if old is None or old.run != self.run:
            self._number += 1
            number = self._number
        else:
            number = old.number
        info = _Info(self.run, tuple([None if n == 1 else a for a, n in zip(axes, shape, strict=True)]), static, number)
        tensor.__dict__[_KEY] = info
        if id(tensor) in self.parameter_names and old is None:
            self._marked.append(tensor)
        return info

    def _info(self, tensor: torch.Tensor) -> _Info:
        info = tensor.__dict__.get(_KEY)
        if info is not None and info.run == self.run:
            return info
        base = self._base(tensor)
        axes: Sequence[Axis | None] = [None] * tensor.dim()
        if base is not None:  # `.data` of a parameter, or another view of it that no op has made
            known = base.__dict__[_KEY].axes
            if base.shape == tensor.shape and base.stride() == tensor.stride():
                axes = known
            else:
                for axis in known:
                    self.store.freeze(axis, "a view of a parameter's storage that no op has made")
        self._marked.append(tensor)
        return self._mark(tensor, axes, static=base is not None)

    def _base(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The parameter or buffer whose memory this is, if any; tensors inside torch.vmap have no memory of their own."""
        if tensor.layout != torch.strided or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return None
        return self._storages.get(tensor.untyped_storage()._cdata)

    def ref(self, tensor: torch.Tensor) -> TensorRef:
        """The record of a tensor."""
        info = self._info(tensor)
        return TensorRef(info.number, tuple(tensor.shape), tensor.dtype, info.axes)

    # ------------------------------------------------------------------ ops
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = self._rules.get(func)
        if known is None:
            known = self._rules[func] = (*rule_for(func), _writes(func))
        name, rule, writes = known
        targets = [t for i, n in writes for t in tensors(args[i] if i < len(args) else kwargs.get(n))] if writes else []
        if targets:
            self._save(targets)
        out = func(*args, **kwargs)
        if self._leaf:
            return out
        self._op = name
        self.counts[name] += 1
        call = Call(self, func, name, args, kwargs, out)
        inputs = call.inputs()
        before = [self.ref(t) for t in inputs] if self.ops is not None else []
        old = [self.axes(t) for t in targets]
        self._apply(call, rule, inputs)
        for tensor, axes in zip(targets, old, strict=True):
            self._written(tensor, axes)
        if self.ops is not None:
            outs = tuple(self.ref(t) for t in tensors(out))
            self.ops.append(OpCall(name, tuple(before), outs, self.module, user_line()))
        return out

    def _apply(self, call: Call, rule: Rule | None, inputs: list[torch.Tensor]) -> None:
        outputs = call.outputs()
        static = all([self._info(t).static for t in inputs])  # noqa: C419  (each input must be known before its op)
        self.reached.update(id(t) for t in inputs if id(t) in self.parameter_names)
        if rule is None:
            axes = None
            self.unsupported(call, inputs, outputs)
        else:
            axes = rule(call)
        if axes is not None and outputs:
            self._mark(outputs[0], axes, static)
            outputs = outputs[1:]
        for tensor in outputs:
            self._info(tensor).static = static

    def unsupported(self, call: Call, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        """An op without a rule: everything labelled that goes in is kept."""
        version = self.store.version
        for tensor in inputs:
            for axis in self.axes(tensor):
                self.store.freeze(axis, f"there is no rule for {call.name}")
        if self.store.version != version:
            self.unknown[call.name] += 1
        for tensor in outputs:
            self.set(tensor, [None] * tensor.dim())

    def _save(self, targets: list[torch.Tensor]) -> None:
        """Keep the value of a parameter or buffer that an op is about to overwrite."""
        for tensor in targets:
            base = self._base(tensor)
            if base is not None and id(base) not in self._saved:
                self._saved[id(base)] = (base, base.detach().clone())

    def _written(self, tensor: torch.Tensor, old: Sequence[Axis | None]) -> None:
        """What was written into a tensor is what the base of that view holds from now on."""
        new = self.axes(tensor)
        if len(new) == len(old):
            for a, b in zip(old, new, strict=True):
                if a is not b:
                    algebra.unify(self.store, a, b)

    # ------------------------------------------------------------------ where we are
    def _site(self) -> tuple[str, str, str]:
        return self._op, self.module, user_line()

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        self.ran.add(id(module))
        self.stack.append(self.names.get(id(module), ""))
        if self._leaf or MODULE_RULES.match(module) is not None:
            self._leaf += 1

    def _leave_module(self, module: nn.Module, args: Any, *rest: Any) -> None:
        kwargs, output = rest if len(rest) == 2 else ({}, *rest)  # torch leaves kwargs out where forward has raised
        if self._leaf:
            self._leaf -= 1
            rule = MODULE_RULES.match(module)
            if not self._leaf and rule is not None:
                self._op = type(module).__name__
                rule(self, module, args, kwargs, output)
        name = self.stack.pop()
        if not self._leaf and id(module) in self.names:
            inputs = tuple(self.ref(t) for t in [*tensors(args), *tensors(kwargs)])
            outputs = tuple(self.ref(t) for t in tensors(output))
            self.calls.append(ModuleCall(name, type(module).__name__, inputs, outputs))
            if self.on_leave is not None:
                self.on_leave(module, args, kwargs, output)

    def __enter__(self) -> Recorder:
        self._fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        self._hooks = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, with_kwargs=True, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        for hook in self._hooks:
            hook.remove()
            # torch forgets this table when a global hook is removed, and torch.compile then warns for ever.
            torch.nn.modules.module._global_forward_hooks_with_kwargs.pop(hook.id, None)
        torch.backends.mha.set_fastpath_enabled(self._fast)
        with torch.no_grad():
            for base, value in self._saved.values():
                base.copy_(value)

    def freeze_outputs(self, output: Any) -> None:
        """What the model returns is what its user sees: those dimensions are kept."""
        self._op = "output"
        for tensor in tensors(_plain(results_of(output))):
            for axis in self.axes(tensor):
                self.store.freeze(axis, "the model returns it")

    def close(self) -> None:
        """Remove the marks from the tensors that outlive the run."""
        for tensor in self._marked:
            tensor.__dict__.pop(_KEY, None)
        self._marked.clear()


_INTERMEDIATE = ("hidden_states", "attentions", "past_key_values", "encoder_last_hidden_state", "mems", "cache_params")


_BESIDE_LOGITS = (*_INTERMEDIATE, "last_hidden_state", "model_output")


def results_of(output: Any) -> Any:
    """What of a model's output is a result: everything but what a mapping names as intermediate.

    Beside logits the last hidden state is intermediate too; boxes, embeddings and masks never are. The attributes of a plain
    object and the fields of a dataclass count.
    """
    if isinstance(output, Mapping):
        logits = any("logits" in str(k) for k in output)
        inner = _BESIDE_LOGITS if logits else _INTERMEDIATE
        return {k: v for k, v in output.items() if not str(k).endswith(inner)} or dict(output)
    if isinstance(output, (torch.Tensor, list, tuple)) or not hasattr(output, "__dict__"):
        return output
    return dict(vars(output))


def _plain(value: Any) -> Any:
    """Nested results with dataclasses as dicts of their fields."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value


def _writes(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that an op overwrites."""
    if not func._schema.is_mutable:
        return ()
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def user_line() -> str:
    """file:line of the nearest frame that is neither torch's nor this package's."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith((_HERE, _TORCH, "<")):
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
