"""Solves for the config that describes a pruned model, by running the model's own constructor on symbolic config values.

The constructor runs on the meta device with a tainted copy of the config, so each dim of each parameter comes out as an
expression: `q_proj.weight dim 0 = config.num_attention_heads * config.head_dim`. With the pruned shapes on the right these are
equations for the config. A solution counts only if a model built from it (through its JSON, where it has one) has exactly the
pruned shapes. No table of names.
"""

from __future__ import annotations

import copy
import inspect
import json
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from modelopt.torch.trace.axes.expr import Attr, Equation, Expr, Recording, evaluate, expr_of, leaves
from modelopt.torch.trace.axes.places import configs, is_config, read_ints, write
from modelopt.torch.trace.axes.provenance import Tainter
from modelopt.torch.trace.axes.solve import solve_equations

_SHOWN = 4
_TRIALS = 32
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ConfigPlan:
    """New int attributes of the config and of the modules that a model built from it would have; `reason` is empty on success."""

    values: dict[Attr, int] = field(default_factory=dict)
    reason: str = ""


def plan_config(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], known: Mapping[Attr, int]) -> ConfigPlan | None:
    """Find the config under which `type(model)` builds the given shapes; None for a model that is not built from a config.

    `shapes` are the pruned shapes of all parameters and buffers, `known` the attribute values that the pruned model needs. The
    model is only read.
    """
    builder = builder_of(model)
    if builder is None:
        return None
    name, config, build = builder
    shapes = _shapes(model, shapes)
    try:
        first = _Construction(name, config, build)
    except _ERRORS as error:
        return ConfigPlan(reason=f"its constructor does not run without weights ({type(error).__name__}: {error})")
    if first.shapes.keys() != shapes.keys() or any(s != tuple(first.shapes[n]) for n, s in _shapes(model, {}).items()):
        return ConfigPlan(
            reason=f"{type(model).__name__}(config) does not build this model, which was changed after it was built"
        )
    plan, bad = _solved(first, config, build, shapes, known)
    if not plan.reason:
        return plan
    for other in _with_optional(first, config, build, bad):
        better, _ = _solved(other, other.config, build, shapes, known)
        if not better.reason:
            return ConfigPlan({**other.extra, **better.values})
    return plan


_ERRORS = (
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    KeyError,
    NotImplementedError,
    AssertionError,
    IndexError,
    OSError,
)


def builder_of(model: nn.Module) -> tuple[str, Any, Callable[[Any], nn.Module]] | None:
    """Return (name of the attribute, config, function that builds such a model from such a config), or None."""
    for name in ("config", "_internal_dict", "cfg", "args", "hparams"):
        config = model.__dict__.get(name)
        if config is None or isinstance(config, nn.Module):
            continue
        parameters = list(inspect.signature(type(model).__init__).parameters.values())[1:]
        if isinstance(config, dict):
            names = {p.name for p in parameters if p.name in config}
            if names:
                return name, config, lambda c, n=frozenset(names): type(model)(**{k: c[k] for k in c if k in n})
        elif is_config(config) and parameters:
            return name, config, type(model)
    return None


def _shapes(model: nn.Module, new: Mapping[str, tuple[int, ...]]) -> Shapes:
    """The shapes of a model's parameters, the new ones where they are given."""
    return {n: tuple(new.get(n, p.shape)) for n, p in model.named_parameters(remove_duplicate=False)}


class _Construction:
    """One run of a constructor with a tainted copy of a config: an expression for each size, and what the code compared."""

    def __init__(self, name: str, config: Any, build: Callable[[Any], nn.Module], extra: dict[Attr, int] | None = None):
        self.name, self.config, self.extra = name, config, extra or {}
        recording = Recording()
        tainter = Tainter(recording)
        trial = copy.deepcopy(config)
        with recording:
            for path, part in list(configs(trial, name, set())):
                tainter.taint_object(path, part)
            sizes = _Sizes()
            with _quiet(), sizes:
                model = build(trial)
            self.shapes: Shapes = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
            self.dims: dict[tuple[str, int], Expr] = dict(self._dims(model, sizes))
            self.attributes = {a: expr_of(v) for a, v in read_ints(model).items()}
        self.ints = {a: int(v) for a, v in read_ints(model).items()}
        self.originals = dict(tainter.values)
        self.equations = list(recording.equations)

    def _dims(self, model: nn.Module, sizes: _Sizes) -> Iterator[tuple[tuple[str, int], Expr]]:
        for name, parameter in model.named_parameters(remove_duplicate=False):
            exprs = sizes.found.get(parameter.untyped_storage()._cdata, (None, ()))[1]
            if len(exprs) == parameter.dim():
                yield from (((name, k), e) for k, e in enumerate(exprs))


class _Sizes(TorchFunctionMode):
    """Remembers with which expressions each storage was made, while tensors are made on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, tuple[torch.Tensor, tuple[Expr, ...]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _MAKERS and isinstance(result, torch.Tensor):
            given = args if args else ((kwargs or {}).get("size", ()),)
            given = given[0] if given and isinstance(given[0], (tuple, list)) else given
            if len(given) >= result.dim():
                exprs = tuple(expr_of(g) for g in given[: result.dim()] if isinstance(g, int))
                if any(True for e in exprs for _ in leaves(e)):
                    self.found[result.untyped_storage()._cdata] = (result, exprs)
        return result


_MAKERS = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})


class _quiet:
    """The meta device, with the random state put back."""

    def __enter__(self) -> None:
        self._rng = torch.random.get_rng_state()
        self._device = torch.device("meta")
        self._device.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self._device.__exit__(*exc)
        torch.random.set_rng_state(self._rng)


def _solved(
    run: _Construction, config: Any, build: Callable[[Any], nn.Module], shapes: Shapes, known: Mapping[Attr, int]
) -> tuple[ConfigPlan, list[int]]:  # fmt: skip
    """Solve for the config of one construction and prove it by building; also the present sizes of what it cannot describe."""
    equations = [Equation(e, "==", shapes[n][k], f"dim {k} of {n}") for (n, k), e in run.dims.items() if list(leaves(e))]
    for attr, value in known.items():
        expr = attr if attr in run.originals else run.attributes.get(attr)
        if expr is not None and any(True for _ in leaves(expr)):
            equations.append(Equation(expr, "==", value, str(attr)))
    equations += [e for e in run.equations if e.relation in ("==", "!=")]
    values, _ = solve_equations(equations, {}, run.originals)
    bad = [e for e in equations if not e.holds(values)]
    if bad:
        sizes = [evaluate(e.left, run.originals) for e in bad]
        return ConfigPlan(reason="no single config has all of: " + "; ".join(_demand(e) for e in bad[:_SHOWN])), sizes
    changed = {a: v for a, v in values.items() if isinstance(a, Attr) and v != run.originals[a]}
    try:
        built, ints = _rebuilt(run, config, build, changed)
    except _ERRORS as error:
        return ConfigPlan(reason=f"the constructor refuses the config it would need ({type(error).__name__}: {error})"), []
    wrong = [f"{n} {built.get(n)} instead of {s}" for n, s in shapes.items() if built.get(n) != s]
    if wrong:
        return ConfigPlan(reason=f"a model built from the nearest config has {'; '.join(wrong[:_SHOWN])}"), []
    differ = {a: v for a, v in ints.items() if run.ints.get(a, v) != v}
    clash = [f"{a} = {differ.get(a)} instead of {v}" for a, v in known.items() if a in ints and ints[a] != v]
    if clash:
        return ConfigPlan(reason=f"a model built from the nearest config has {'; '.join(clash[:_SHOWN])}"), []
    return ConfigPlan({**differ, **changed}), []


def _demand(equation: Equation) -> str:
    return f"{equation.what}: {_named(equation.left)} {equation.relation} {_named(equation.right)}"


def _named(expr: Expr) -> str:
    if type(expr) is tuple:
        return "(" + f" {expr[0]} ".join(_named(e) for e in expr[1:]) + ")"
    return str(expr)


def _rebuilt(
    run: _Construction, config: Any, build: Callable[[Any], nn.Module], changed: Mapping[Attr, int]
) -> tuple[Shapes, dict[Attr, int]]:  # fmt: skip
    """Build from the new config as a reader of its file would, and return shapes and int attributes."""
    trial = copy.deepcopy(config)
    for attr, value in changed.items():
        write(types.SimpleNamespace(**{run.name: trial}), attr, value)
    if hasattr(trial, "to_json_string") and hasattr(type(trial), "from_dict") and not isinstance(trial, dict):
        attention = getattr(trial, "_attn_implementation", None)
        trial = type(trial).from_dict(json.loads(trial.to_json_string()))
        if attention is not None:
            trial._attn_implementation = attention
    with _quiet():
        model = build(trial)
    return {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}, read_ints(model)


def _with_optional(
    first: _Construction, config: Any, build: Callable[[Any], nn.Module], sizes: list[int]
) -> Iterator[_Construction]:  # fmt: skip
    """Constructions in which an attribute that is None has been given the present value of a size that no config describes.

    GPT-2's inner width is `n_inner`, or four times the hidden size where that is None.
    """
    if isinstance(config, dict) or not sizes:
        return
    empty = [k for k, v in config.__dict__.items() if v is None and not k.startswith("_")]
    for key in empty[:_TRIALS]:
        trial = copy.copy(config)
        trial.__dict__[key] = sizes[0]
        try:
            other = _Construction(first.name, trial, build, {Attr(first.name, key): sizes[0]})
        except _ERRORS:
            continue
        read = {leaf for e in other.dims.values() for leaf in leaves(e)}
        if Attr(first.name, key) in read and other.shapes == first.shapes:
            yield other
