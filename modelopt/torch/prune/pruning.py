"""Structured pruning: choose atoms, prove that the model's own code still holds together, cut, prove the result.

    axes   = infer_axes(model, dummy_input)          which slices of which tensors live and die together
    drop   = choose(groups, config, cost)            which of them go
    drop   = relax(axes, drop)                       what the model's integer arithmetic does not allow stays
    apply(axes, model, drop)                         parameters cut, attributes and configs repaired

Everything up to the last line works on descriptions: a refusal leaves the model as it was. With `verify` the last line is done on
a copy first and judged by the oracle (`verify_pruning`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from modelopt.core.errors import ConfigError, ModeError, ModelOptError
from modelopt.core.logging import warn
from modelopt.torch.calibration.executor import run_forward
from modelopt.torch.opt.mode import apply_mode, history
from modelopt.torch.prune.choose import Group, check_reachable, choose, make_groups
from modelopt.torch.prune.config import COSTS, StructuredConfig, read_limit
from modelopt.torch.prune.cost import Costs
from modelopt.torch.prune.depth import (
    choose_units,
    find_stacks,
    influence,
    remove_units,
    removed_units,
    renamed,
    skipping,
    tensors_of,
)
from modelopt.torch.prune.importance import Data, score_families
from modelopt.torch.prune.verify import verify_pruning
from modelopt.torch.trace.axes import infer_axes
from modelopt.torch.trace.axes.apply import describe
from modelopt.torch.trace.axes.families import UNUSED
from modelopt.torch.trace.inputs import MODEL_ERRORS, Inputs, failure, resolve_inputs, run
from modelopt.torch.utils.network import num_parameters, unwrap_model

VERIFY_UP_TO = 100_000_000
RUNTIME_KEYS = ("data_loader", "forward_loop", "loss_func", "score_func", "num_batches", "progress", "checkpoint")
_SHOWN = 5


class PruningError(ModelOptError, RuntimeError):
    """A pruning that the model's code does not allow, or whose result failed its proof."""


@dataclass(frozen=True)
class Plan:
    """What will be removed: atoms of families, whole layers, and what it does to the cost."""

    drop: frozenset[int]
    families: tuple[dict[str, Any], ...]
    costs: dict[str, tuple[float, float]]
    kept_back: tuple[str, ...]
    layers: dict[str, list[int]] = field(default_factory=dict)


def prune(
    model: nn.Module,
    mode: Any,
    constraints: Mapping[str, float | str],
    dummy_input: Any,
    config: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Prune whole channels, heads, experts or layers; return the model and what was done.

    `mode`: "structured", "fastnas", or [("structured", {...StructuredConfig})]. `constraints`: {"params" | "flops" | "memory":
    "60%" or a number} of what may remain, and/or {"ratio": share of every family to remove}. `dummy_input`: what the model is
    called with, a tensor, a tuple, a dict of keyword arguments, or (args, kwargs). `config`: fields of the mode's
    configuration, and what cannot be saved: "forward_loop", "data_loader", "loss_func", "score_func", "checkpoint".

    The second value holds the families (name, kind, size before and after), the costs before and after, the changed attributes
    and the verdict of the oracle; it is saved in the model's history.

    Raises ConfigError (nothing to prune, a constraint that cannot be met, unknown families), PruningError (the result would not
    be the masked model), and the model's own error if it does not run on `dummy_input`. Then the model is as it was.

        model, result = prune(model, "structured", {"params": "60%"}, dummy_input=(torch.randn(1, 3, 224, 224),))
    """
    name, fields = _read_mode(mode)
    runtime: dict[str, Any] = {"dummy_input": dummy_input}
    for key, value in (config or {}).items():
        (runtime if key in RUNTIME_KEYS else fields)[key] = value
    if not isinstance(constraints or {}, Mapping):
        raise ConfigError(f'constraints is {constraints!r:.60}; write a mapping such as {{"params": "60%"}} or {{"ratio": 0.5}}.')
    limits = dict(constraints or {})
    if "ratio" in limits:
        fields["ratio"] = limits.pop("ratio")
    fields["constraints"] = {**fields.get("constraints", {}), **limits}
    model = apply_mode(model, [(name, fields)], mode_kwargs=runtime)
    return model, dict(history(model)[-1].state["report"])


def _read_mode(mode: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(mode, list | tuple) and len(mode) == 1 and not isinstance(mode[0], str):
        mode = mode[0]
    if isinstance(mode, list) and len(mode) == 1:
        mode = mode[0]
    name, fields = (mode, {}) if isinstance(mode, str) else mode if isinstance(mode, tuple) and len(mode) == 2 else (None, None)
    if not isinstance(name, str) or not isinstance(fields, Mapping):
        raise ConfigError(f'mode is {mode!r:.80}; write "structured" or [("structured", {{...}})].')
    return name, dict(fields)


def check_model(model: nn.Module) -> None:
    """Refuse models whose parameters are not what they seem. Raises ModeError."""
    inner = unwrap_model(model)
    for name, module in inner.named_modules():
        kind = type(module).__name__
        if kind in ("FullyShardedDataParallel", "FSDPModule") or any("FSDP" in c.__name__ for c in type(module).__mro__):
            raise ModeError(
                f'"{name or kind}" is wrapped by FSDP, whose parameters are shards. Prune the model before wrapping it.'
            )
        if kind == "OptimizedModule":
            raise ModeError(f'"{name}" is compiled by torch.compile, which hides its code. Prune first, compile afterwards.')
        if any(c.__name__ in ("QuantModule", "TensorQuantizer") for c in type(module).__mro__):
            raise ModeError(f'"{name}" is quantized already. Prune the original model, then quantize the result.')
        for key, parameter in module._parameters.items():
            if parameter is not None and type(parameter).__name__ in ("DTensor", "UninitializedParameter"):
                raise ModeError(
                    f'"{name}.{key}" is a {type(parameter).__name__}. Prune before sharding, after the first forward.'
                )


def plan_structured(task: Task) -> Plan:
    """Decide what to remove. Changes nothing. Raises ConfigError where nothing can go or a constraint cannot be met."""
    config = task.config
    if config.ratio is None and not config.constraints:
        raise ConfigError('Nothing says how much to prune. Give {"ratio": 0.5}, or a constraint such as {"params": "60%"}.')
    layers = _plan_layers(task)
    costs = Costs(task.model, task.axes, removed_units(task.model, layers))
    limits = limits_of(task, Costs(task.model, task.axes))
    if isinstance(config.ratio, dict) and set(config.ratio) == {"layers"}:
        check_reachable(limits, {name: costs.of(frozenset(), name) for name in limits}, config)
        return finish(task, costs, frozenset(), (), layers)
    groups = groups_of(task, score_families(task.model, task.axes, config.importance, task.data))
    drop = choose(groups, config, costs.of, limits)
    if not drop and not layers:
        raise ConfigError(_nothing(groups, config))
    drop, reasons = task.axes.relax(drop)
    if not drop and not layers:
        raise PruningError(f"The model's own code needs every size that would shrink. {'; '.join(reasons[:_SHOWN])}.")
    drop, reasons = _tighten(task.axes, groups, config, costs, limits, drop, tuple(reasons))
    return finish(task, costs, drop, reasons, layers)


def limits_of(task: Task, costs: Costs) -> dict[str, float]:
    """Return the constraints in the units of the costs; a percentage is one of the whole model."""
    return {n: read_limit(n, v, costs.of(frozenset(), n)) for n, v in task.config.constraints.items()}


def _plan_layers(task: Task) -> dict[str, list[int]]:
    config = task.config
    share = config.ratio.get("layers") if isinstance(config.ratio, dict) else None
    if share is None or "layers" in config.exclude:
        return {}
    stacks = find_stacks(task.model, task.axes, config.exclude)
    loop = task.data.forward_loop

    def once(model: nn.Module) -> None:
        run(model, task.inputs)

    scores = influence(task.model, stacks, once if loop is None else lambda model: run_forward(model, loop))
    kept = choose_units(stacks, scores, share)
    if not kept:
        sizes = ", ".join(f"{s.name} has {len(s.units)} blocks" for s in stacks)
        raise ConfigError(f"The share layers={share} removes no block: {sizes}. Raise it.")
    return kept


def groups_of(task: Task, scores: Mapping[str, Any]) -> list[Group]:
    """Return the groups of families that the configuration lets go. Raises ConfigError where there are none."""
    groups = make_groups(task.axes, scores, task.config)
    if not groups:
        raise ConfigError(f"The model has no dimension that these rules can prune. {explain_frozen(task.axes)}")
    return groups


def finish(
    task: Task, costs: Costs, drop: frozenset[int], reasons: tuple[str, ...], layers: dict[str, list[int]] | None = None
) -> Plan:
    """Return the plan for these atoms and layers, with its families and costs."""
    dense = Costs(task.model, task.axes) if layers else costs
    table = {n: (dense.of(frozenset(), n), costs.of(drop, n)) for n in COSTS}
    return Plan(drop, tuple(_family_rows(task.axes, drop)), table, reasons, layers or {})


def _tighten(
    axes: Any,
    groups: list[Group],
    config: StructuredConfig,
    costs: Costs,
    limits: Mapping[str, float],
    drop: frozenset[int],
    reasons: tuple[str, ...],
) -> tuple[frozenset[int], tuple[str, ...]]:
    """Ask for more where atoms that had to stay broke a limit, up to what the rules allow."""
    asked = dict(limits)
    for _ in range(8):
        over = {n: costs.of(drop, n) / limit for n, limit in limits.items() if costs.of(drop, n) > limit}
        if not over:
            return frozenset(drop), reasons
        asked = {n: asked[n] / over.get(n, 1.0) ** 1.5 for n in asked}
        drop, more = axes.relax(choose(groups, config, costs.of, asked))
        reasons = tuple(more)
    name = next(iter(over))
    raise ConfigError(
        f"The constraint {name} <= {limits[name]:.4g} cannot be met: {costs.of(frozenset(drop), name):.4g} remain, because "
        f"{len(reasons)} families must stay ({'; '.join(reasons[:_SHOWN])})."
    )


def _nothing(groups: list[Group], config: StructuredConfig) -> str:
    sizes = ", ".join(f"{g.names[0]} has {g.size}" for g in groups[:_SHOWN])
    return (
        f"The rules remove nothing: with multiple_of = {config.multiple_of} and these shares every family keeps its size "
        f"({sizes}). Raise the ratio or lower multiple_of."
    )


def _family_rows(axes: Any, drop: frozenset[int]) -> list[dict[str, Any]]:
    rows = []
    for family in axes.families:
        gone = sum(a in drop for a in family.atoms)
        if gone:
            rows.append({"name": family.name, "kind": family.kind, "before": family.size, "after": family.size - gone})
    return rows


def _line(where: str) -> str:
    return f" ({'/'.join(where.split('/')[-2:])})" if where else ""


def explain_frozen(axes: Any) -> str:
    """Return one sentence that says why dimensions of the model cannot be pruned."""
    if not axes.frozen:
        return "No dimension of a parameter was used by the forward pass."
    shown = "; ".join(f"{f.parameter} dim {f.dim}: {f.reason}{_line(f.where)}" for f in axes.frozen[:_SHOWN])
    return f"{len(axes.frozen)} dimensions are fixed: {shown}."


@dataclass(frozen=True)
class Task:
    """What the steps of one pruning share: the model, its labels, the inputs it was traced with, what criteria may use."""

    model: nn.Module
    axes: Any
    inputs: Inputs
    config: StructuredConfig
    data: Data

    @classmethod
    def of(cls, model: nn.Module, config: StructuredConfig, dummy_input: Any, data: Data) -> Task:
        """Check the model and trace it. Raises ModeError, TraceError."""
        check_model(model)
        inputs = resolve_inputs(model, dummy_input)
        try:
            axes = infer_axes(model, *inputs, lift=config.lifts, record_ops=True)
        except MODEL_ERRORS as error:
            raise failure(model, inputs, error) from error
        return cls(model, axes, inputs, config, data)


def carry_out(task: Task, plan: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    """Prove the plan if that is wanted, then cut; return the report and the description of the new structure."""
    wanted = task.config.verify
    if wanted is None:
        wanted = num_parameters(task.model) <= VERIFY_UP_TO and not _is_meta(task.model)
    verdict = _prove(task, plan) if wanted else None
    idle = _idle(task)
    changes = task.axes.apply(task.model, plan.drop)
    shortened = remove_units(task.model, plan.layers)
    return _report(plan, changes, shortened, verdict, idle), {
        "axes": renamed(describe(changes), plan.layers),
        "layers": plan.layers,
    }


def _idle(task: Task) -> list[str]:
    """Return the modules that hold parameters themselves and of which nothing entered the forward pass."""
    axes, called = task.axes, {call.name for call in task.axes.calls}
    reasons: dict[str, set[str]] = {}
    for frozen in axes.frozen:
        reasons.setdefault(frozen.parameter, set()).add(frozen.reason)
    unused = {n for n, dims in axes.parameters.items() if not any(dims) and reasons.get(n) == {UNUSED}}
    idle = []
    for name, module in task.model.named_modules():
        own = [f"{name}.{n}" if name else n for n, p in module.named_parameters(recurse=False) if p.numel() > 1]
        if own and name not in called and unused.issuperset(own):
            idle.append(name)
    return idle


def _is_meta(model: nn.Module) -> bool:
    return any(p.device.type == "meta" for p in model.parameters())


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy. Raises PruningError for a model that cannot be copied, with what to do."""
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        raise PruningError(
            f"The {type(model).__name__} cannot be copied ({error}), so its pruning cannot be tried before it is done. Use "
            "torch.nn.utils.parametrizations in place of old weight norms, or pass verify=False."
        ) from error


def _prove(task: Task, plan: Plan) -> dict[str, Any]:
    trial = copied(task.model)
    task.axes.apply(trial, plan.drop)
    if plan.layers:
        _prove_layers(trial, task.inputs, plan)
    if not plan.drop:
        return {"exact": True, "error": 0.0}
    trial = copied(task.model)
    task.axes.apply(trial, plan.drop)
    report = verify_pruning(task.model, trial, task.axes.families, dummy_input=task.inputs, kept=task.axes.kept(plan.drop))
    if not report.exact:
        raise PruningError(
            f"The pruned model is not the masked dense model: {report.message} The model was not changed. Exclude the families "
            "concerned (exclude=[...]), or report the architecture."
        )
    return {"exact": True, "error": report.error}


def _prove_layers(trial: nn.Module, inputs: Inputs, plan: Plan) -> None:
    """Run the model with the units skipped and with the units gone; the outputs must be the same, bit for bit."""
    with skipping(trial, sorted(removed_units(trial, plan.layers))):
        wanted = [t.clone() for t in tensors_of(run(trial, inputs))]
    remove_units(trial, plan.layers)
    found = tensors_of(run(trial, inputs))
    if len(found) < 1 or not torch.equal(wanted[0], found[0]):
        raise PruningError(
            f"With only the layers {plan.layers} the model is not the one that skips the others: its "
            'code uses their number or their position. The model was not changed. Leave "layers" out of the ratios.'
        )


def _report(
    plan: Plan, changes: Any, shortened: dict[str, tuple[Any, Any]], verdict: dict[str, Any] | None, idle: list[str]
) -> dict[str, Any]:
    if plan.kept_back:
        warn(f"{len(plan.kept_back)} families could not be pruned as asked: {'; '.join(plan.kept_back[:_SHOWN])}")
    if idle:
        warn(
            f"{len(idle)} modules with parameters did not run on the dummy input, the first: {', '.join(idle[:_SHOWN])}. They "
            "kept their sizes; what reads pruned channels in them (training-only heads) will not run any more."
        )
    attributes = {**getattr(changes, "attributes", {}), **shortened}
    return {
        "families": list(plan.families),
        "layers": plan.layers,
        "costs": {name: {"before": before, "after": after} for name, (before, after) in plan.costs.items()},
        "kept_back": list(plan.kept_back),
        "did_not_run": idle,
        "attributes": {k: list(v) for k, v in attributes.items()},
        "config": changes.config,
        "described_by_config": changes.described,
        "verified": verdict,
    }
