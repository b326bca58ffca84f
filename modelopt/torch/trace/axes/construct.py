"""Solves for the config that describes a pruned model, by running the model's own constructor on symbolic config values.

The constructor runs on the meta device with a tainted copy of the config, so each dim of each parameter comes out as an
expression: `q_proj.weight dim 0 = config.num_attention_heads * config.head_dim`. With the pruned shapes on the right these are
equations for the config. A solution counts only if a model built from it (through its JSON, where it has one) has exactly the
pruned shapes. No table of names.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from modelopt.torch.trace.axes.expr import Attr, Equation, Expr, Recording, evaluate, expr_of, leaves, number
from modelopt.torch.trace.axes.places import configs, is_config, read_numbers, write
from modelopt.torch.trace.axes.provenance import Tainter
from modelopt.torch.trace.axes.solve import solve_equations

_SHOWN = 4
_TRIALS = 32
_STEPS = 3
Shapes = dict[str, tuple[int, ...]]
Build = Callable[[Any], nn.Module]
Cut = Callable[[str, torch.Tensor], torch.Tensor]


class _Refusal(Exception):
    """What a foreign constructor or config raised; it becomes the reason of a plan that failed."""


@dataclass(frozen=True)
class ConfigPlan:
    """New int attributes of the config and of the modules that a model built from it would have; `reason` is empty on success."""

    values: dict[Attr, int] = field(default_factory=dict)
    reason: str = ""


def plan_config(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], known: Mapping[Attr, int], cut: Cut
) -> ConfigPlan | None:  # fmt: skip
    """Find the config under which `type(model)` builds the given shapes; None for a model that is not built from a config.

    `shapes` are the pruned shapes, `known` the attribute values that the pruned model needs, `cut` prunes a buffer by its name:
    what a file does not hold (tables of frequencies, scales) must come out of the constructor as it is. The model is only read.
    """
    builder = builder_of(model)
    if builder is None:
        return None
    name, config, build = builder
    goal = _Goal(_shapes(model, shapes), known, _unsaved(model), cut)
    try:
        first = _Construction(name, config, build)
    except _Refusal as error:
        return ConfigPlan(reason=f"its constructor does not run without weights ({error})")
    if first.shapes != _shapes(model, {}):
        return ConfigPlan(
            reason=f"{type(model).__name__}(config) does not build this model, which was changed after it was built"
        )
    plan, bad = _solved(first, build, goal)
    if not plan.reason:
        return plan
    for other in _with_optional(first, build, bad):
        better, _ = _solved(other, build, goal)
        if not better.reason:
            return better
    return _with_lost(first, build, goal, bad) or plan


@dataclass(frozen=True)
class _Goal:
    """What the pruned model is: shapes, known attributes, buffers that no file holds."""

    shapes: Shapes
    known: Mapping[Attr, int]
    unsaved: dict[str, torch.Tensor]
    cut: Cut


def expressions(model: nn.Module) -> dict[tuple[str, int], Expr]:
    """Return {(parameter, dim): expression of config attributes} where the constructor shows it; empty without a config."""
    builder = builder_of(model)
    if builder is None:
        return {}
    try:
        run = _Construction(*builder)
    except _Refusal:
        return {}
    if run.shapes != _shapes(model, {}):
        return {}
    return {place: expr for place, expr in run.dims.items() if any(True for _ in leaves(expr))}


def builder_of(model: nn.Module) -> tuple[str, Any, Build] | None:
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

    def __init__(self, name: str, config: Any, build: Build, extra: dict[Attr, int] | None = None, first: Any = None):
        self.name, self.config, self.extra = name, config, extra or {}
        recording = Recording()
        tainter = Tainter(recording)
        trial = copy.deepcopy(config)
        with recording:
            for path, part in list(configs(trial, name, set())):
                tainter.taint_object(path, part)
            sizes = _Sizes()
            model = _built(build, trial, sizes)
            self.shapes = _shapes(model, {})
            self.unsaved = _unsaved(model)
            self.floats = first.floats if first else read_numbers(model, float)
            self.dims: dict[tuple[str, int], Expr] = dict(self._dims(model, sizes))
            self.attributes = {a: expr_of(v) for a, v in read_numbers(model).items()}
        self.ints = first.ints if first else {a: number(v) for a, v in read_numbers(model).items()}
        self.originals = dict(tainter.values)
        self.equations = list(recording.equations)
        self.lost = tuple(dict.fromkeys(x for e in recording.lost for x in leaves(e) if isinstance(x, Attr)))

    def _dims(self, model: nn.Module, sizes: _Sizes) -> Iterator[tuple[tuple[str, int], Expr]]:
        for name, parameter in model.named_parameters(remove_duplicate=False):
            exprs = sizes.found.get(parameter.untyped_storage()._cdata, (None, ()))[1]
            for k, n in enumerate(parameter.shape):
                yield (name, k), exprs[k] if len(exprs) == parameter.dim() else n


class _Sizes(TorchFunctionMode):
    """Remembers with which expressions each storage was made, while tensors are made on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, tuple[torch.Tensor, tuple[Expr, ...]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:  # what weights are made of; buffers are made of numbers
            kwargs = {**kwargs, "device": "meta"}
        result = func(*args, **kwargs)
        if func in _MAKERS and isinstance(result, torch.Tensor):
            given = args if args else (kwargs.get("size", ()),)
            given = given[0] if given and isinstance(given[0], (tuple, list)) else given
            if len(given) >= result.dim():
                exprs = tuple(expr_of(g) for g in given[: result.dim()] if isinstance(g, int))
                if any(True for e in exprs for _ in leaves(e)):
                    self.found[result.untyped_storage()._cdata] = (result, exprs)
        return result


_MAKERS = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})


def _solved(
    run: _Construction, build: Build, goal: _Goal
) -> tuple[ConfigPlan, list[tuple[int, int]]]:  # fmt: skip
    """Solve for the config of one construction and prove it by building; also (present, wanted) of what no config describes."""
    equations = [Equation(e, "==", goal.shapes[n][k], f"dim {k} of {n}") for (n, k), e in run.dims.items()]
    for attr, value in goal.known.items():
        expr = attr if attr in run.originals else run.attributes.get(attr)
        if expr is not None and any(True for _ in leaves(expr)):
            equations.append(Equation(expr, "==", value, str(attr)))
    for attr, expr in run.attributes.items():  # the run took numbers below two as constants
        if run.ints.get(attr, 2) < 2 and any(True for _ in leaves(expr)):
            equations.append(Equation(expr, "==", run.ints[attr], str(attr)))
    for equation in run.equations:  # a size read from a tensor is a plain number here: only what compares two attributes counts
        if equation.relation == "==" and (equation.right == 0 or any(True for _ in leaves(equation.right))):
            equations.append(equation)
    values, _ = solve_equations(equations, {}, run.originals)
    bad = [e for e in equations if not e.holds(values)]
    if bad:
        sizes = [(evaluate(part, run.originals), e.right) for e in bad if isinstance(e.right, int) for part in _parts(e.left)]
        return ConfigPlan(reason="no single config has all of: " + "; ".join(_demand(e) for e in bad[:_SHOWN])), sizes
    changed = {a: v for a, v in values.items() if isinstance(a, Attr) and v != run.originals[a]}
    try:
        built = _rebuilt(run, build, changed)
    except _Refusal as error:
        return ConfigPlan(reason=f"the constructor refuses the config it would need ({error})"), []
    wrong = list(_differences(run, built, goal))
    if wrong:
        return ConfigPlan(reason=f"a model built from the nearest config has {'; '.join(wrong[:_SHOWN])}"), []
    differ = {a: v for a, v in read_numbers(built).items() if run.ints.get(a, v) != v}
    return ConfigPlan({**differ, **run.extra, **changed}), []


def _differences(run: _Construction, built: nn.Module, goal: _Goal) -> Iterator[str]:
    """What a model built from the new config would have that the pruned one must not."""
    shapes = _shapes(built, {})
    yield from (f"{n} {shapes.get(n)} instead of {s}" for n, s in goal.shapes.items() if shapes.get(n) != s)
    ints = read_numbers(built)
    yield from (f"{a} = {ints[a]} instead of {v}" for a, v in goal.known.items() if a in ints and ints[a] != v)
    floats = read_numbers(built, float)
    yield from (f"{a} = {v} instead of {run.floats[a]}" for a, v in floats.items() if a in run.floats and v != run.floats[a])
    new = _unsaved(built)
    for name, old in goal.unsaved.items():
        before, after = run.unsaved.get(name), new.get(name)
        if before is None or after is None or old.is_meta or after.is_meta or not _same(before, old):
            continue  # the dense model does not have what its constructor gives either
        if not _same(after, goal.cut(name, old)):
            yield f"another {name}"


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.is_meta or b.is_meta:
        return False
    return torch.allclose(a.to(b.dtype).float(), b.float(), rtol=1e-5, atol=1e-8, equal_nan=True)


def _unsaved(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that a checkpoint does not hold."""
    out = {}
    for name, module in model.named_modules():
        for key in sorted(module._non_persistent_buffers_set):
            buffer = module._buffers.get(key)
            if buffer is not None:
                out[f"{name}.{key}" if name else key] = buffer.detach().cpu() if not buffer.is_meta else buffer
    return out


def _parts(expr: Expr) -> Iterator[Expr]:
    """The expression, then what it is computed from."""
    yield expr
    if type(expr) is tuple:
        for inner in expr[1:]:
            if type(inner) is tuple:
                yield from _parts(inner)


def _demand(equation: Equation) -> str:
    return f"{equation.what}: {_named(equation.left)} {equation.relation} {_named(equation.right)}"


def _named(expr: Expr) -> str:
    if type(expr) is tuple:
        return "(" + f" {expr[0]} ".join(_named(e) for e in expr[1:]) + ")"
    return str(expr)


def _rebuilt(run: _Construction, build: Build, changed: Mapping[Attr, int]) -> nn.Module:
    """Build from the new config as a reader of its file would."""
    trial = copy.deepcopy(run.config)
    for attr, value in changed.items():
        write(types.SimpleNamespace(**{run.name: trial}), attr, value)
    if hasattr(trial, "save_pretrained") and hasattr(type(trial), "from_pretrained") and not isinstance(trial, dict):
        attention = getattr(trial, "_attn_implementation", None)
        try:
            with tempfile.TemporaryDirectory() as folder:
                trial.save_pretrained(folder)
                trial = type(trial).from_pretrained(folder)
        except Exception as error:
            raise _Refusal(f"{type(error).__name__}: {error}") from error
        if attention is not None:
            trial._attn_implementation = attention
    return _built(build, trial, _Sizes())


def _built(build: Build, config: Any, sizes: _Sizes) -> nn.Module:
    """Run a constructor without memory for weights; where it mixes devices, on the meta device throughout."""
    try:
        return _run(build, config, sizes, contextlib.nullcontext())
    except _Refusal:
        return _run(build, config, sizes, torch.device("meta"))


def _run(build: Build, config: Any, sizes: _Sizes, device: Any) -> nn.Module:
    try:
        with torch.random.fork_rng(devices=[]), device, sizes:
            return build(config)
    except Exception as error:
        raise _Refusal(f"{type(error).__name__}: {error}") from error


def _with_optional(first: _Construction, build: Build, bad: list[tuple[int, int]]) -> Iterator[_Construction]:
    """Constructions in which an attribute that is None has been given the present value of a size that no config describes.

    GPT-2's inner width is `n_inner`, or four times the hidden size where that is None.
    """
    values = list(dict.fromkeys(old for old, _ in bad))[:_STEPS]
    for key, value in itertools.product(_asked(first.config, build), values):
        extra = {Attr(first.name, key): value}
        other = _variant(first, build, extra)
        if other is None or other.shapes != first.shapes:
            continue
        if extra.keys() & {leaf for e in other.dims.values() for leaf in leaves(e)}:
            yield other


def _asked(config: Any, build: Build) -> list[str]:
    """The public attributes of `config` that the constructor asks for and that are None or missing."""
    asked: set[str] = set()
    cls: Any = type(config)

    def watch(self: Any, name: str) -> Any:
        try:
            value = cls.__getattribute__(self, name)
        except AttributeError:
            asked.add(name)
            raise
        if value is None:
            asked.add(name)
        return value

    watcher: Any = type(cls.__name__, (cls,), {"__getattribute__": watch, "__module__": cls.__module__})
    with contextlib.suppress(_Refusal, TypeError):  # a class that cannot be made so, a constructor that wants the very class
        trial = watcher.__new__(watcher)
        trial.__dict__.update(copy.deepcopy(config).__dict__)
        _built(build, trial, _Sizes())
    return sorted(name for name in asked if not name.startswith("_"))


def _with_lost(
    first: _Construction, build: Build, goal: _Goal, bad: list[tuple[int, int]]
) -> ConfigPlan | None:  # fmt: skip
    """Try values for attributes that went through int() or a float, in the ratios of the wrong sizes; None if none fits."""
    extra: dict[Attr, int] = {}
    for _ in range(_STEPS):
        ratios = list(dict.fromkeys(Fraction(new, old) for old, new in bad if old and new != old))[:_STEPS]
        best: tuple[dict[Attr, int], list[tuple[int, int]]] | None = None
        sizes = {old for old, _ in bad}
        unseen = [a for a, v in first.originals.items() if v in sizes]  # of tensors that were made in a way that is not followed
        for leaf, ratio in itertools.product(list(dict.fromkeys([*first.lost, *unseen]))[:_TRIALS], ratios):
            value = first.originals[leaf] * ratio
            other = _variant(first, build, {**extra, leaf: int(value)}) if value.denominator == 1 and leaf not in extra else None
            if other is None:
                continue
            plan, left = _solved(other, build, goal)
            if not plan.reason:
                return plan
            if left and len(left) < len(bad if best is None else best[1]):
                best = other.extra, left
        if best is None:
            return None
        extra, bad = best
    return None


def _variant(first: _Construction, build: Build, extra: dict[Attr, int]) -> _Construction | None:
    """The construction with some attributes set beforehand; None where the constructor refuses them."""
    trial = copy.deepcopy(first.config)
    for attr, value in extra.items():
        write(types.SimpleNamespace(**{first.name: trial}), attr, value)
    try:
        other = _Construction(first.name, trial, build, extra, first)
    except _Refusal:
        return None
    return other if other.shapes.keys() == first.shapes.keys() else None
