"""Modes: a model is optimized by a list of steps, and the list is the whole story.

    mode = "name"  |  [("name", config), ...]  |  [{"mode": "name", "config": {...}}, ...]

A `Mode` is one kind of step: `apply` changes the model, `state` says in JSON what structure it has now, `restore` rebuilds that
structure (tensors come from the checkpoint). What was applied is kept on the model as its history. The argument of `apply_mode`,
the steps of a recipe and the history have one shape.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import nn

from modelopt.core.config import Config
from modelopt.core.errors import ConfigError, ModeError
from modelopt.core.registry import Registry
from modelopt.torch.opt.surgery import walk
from modelopt.torch.utils.network import unwrap_model

HISTORY = "_modelopt_history"
_clock = itertools.count(1)


class EmptyConfig(Config):
    """The configuration of a mode that has nothing to configure."""


class Mode:
    """One kind of step. Subclass it, set `name` and `Config`, and register the class in `ModeRegistry`.

    `after`: one of these steps must have been applied before (None: no condition). `next_modes`: the steps that may directly
    follow (None: any). `repeatable`: whether the step may be applied twice. `rewrites`: the step changes the structure so much
    that `state` of the earlier steps no longer describes it; what they recorded before it stays.
    """

    name: ClassVar[str] = ""
    Config: ClassVar[type[Config]] = EmptyConfig
    after: ClassVar[frozenset[str] | None] = None
    next_modes: ClassVar[frozenset[str] | None] = None
    repeatable: ClassVar[bool] = False
    rewrites: ClassVar[bool] = False

    def apply(self, model: nn.Module, config: Any, **runtime: Any) -> nn.Module:
        """Do the step and return the model. `runtime` holds what cannot be saved (data, callables)."""
        raise NotImplementedError(f"{type(self).__name__}.apply")

    def state(self, model: nn.Module, config: Any) -> dict[str, Any]:
        """Return what `restore` needs besides the configuration, as plain JSON values. Read again whenever the model is saved."""
        return {}

    def restore(self, model: nn.Module, config: Any, state: dict[str, Any]) -> nn.Module:
        """Rebuild the structure, on whatever device the model is (the meta device included), and return the model."""
        raise NotImplementedError(f"{type(self).__name__}.restore")

    def config_json(self, config: Any) -> dict[str, Any]:
        """Return the configuration as JSON values that `Config.parse` reads back."""
        to_json = getattr(config, "to_json", None)
        return to_json() if callable(to_json) else config.model_dump(mode="json")

    def import_state(self, config: dict[str, Any], metadata: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Turn the configuration and metadata that NVIDIA's `mto.save` stored for this step into ours: (config, state)."""
        return config, metadata


class ModeTable(Registry[type[Mode]]):
    """A registry of modes. `get_mode` is `get` under the name that the public API uses."""

    def get_mode(self, name: str) -> type[Mode]:
        """Return the mode class called `name`. Raises UnknownNameError, with the nearest name."""
        return self.get(name)


_QUANTIZATION = "modelopt.torch.quantization.mode"
ModeRegistry = ModeTable(
    "mode",
    quantize=f"{_QUANTIZATION}:QuantizeMode",
    calibrate=f"{_QUANTIZATION}:CalibrateMode",
    compress=f"{_QUANTIZATION}:CompressMode",
    max_calibrate=f"{_QUANTIZATION}:MaxCalibrateMode",
    mse_calibrate=f"{_QUANTIZATION}:MSECalibrateMode",
    _no_calibrate=f"{_QUANTIZATION}:NoCalibrateMode",
    structured="modelopt.torch.prune.mode:StructuredMode",
    fastnas="modelopt.torch.prune.mode:FastNASMode",
)


@dataclass(frozen=True)
class Step:
    """One applied step. `order` counts over the whole process, so that steps of nested modules can be replayed in order."""

    mode: str
    config: dict[str, Any]
    state: dict[str, Any]
    order: int = field(default=0, compare=False)
    implementation: Mode | None = field(default=None, compare=False, repr=False)


def to_plain(value: Any, where: str) -> Any:
    """Return `value` as JSON holds it (tuples become lists, keys become strings). Raises ConfigError for anything else."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ConfigError(f"{where} is {value}; only finite numbers can be saved.")
        return value
    if isinstance(value, Mapping):
        return {str(k): to_plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    raise ConfigError(f"{where} is a {type(value).__name__}, which cannot be saved as JSON. Pass such objects as mode_kwargs.")


def history(model: nn.Module) -> tuple[Step, ...]:
    """Return the steps that were applied to this very model (not to its submodules), the oldest first."""
    return tuple(unwrap_model(model).__dict__.get(HISTORY, ()))


def nested_histories(model: nn.Module) -> dict[str, tuple[Step, ...]]:
    """Return the histories of submodules that were optimized on their own, by dotted name."""
    return {name: history(m) for name, m in walk(unwrap_model(model)) if name and HISTORY in m.__dict__}


def record(model: nn.Module, before: nn.Module, mode: Mode, config: Any, state: dict[str, Any] | None = None) -> None:
    """Append a step to the history of `model`; a history that was kept on `before` (a model now wrapped) moves over."""
    steps: list[Step] = before.__dict__.get(HISTORY, []) if model is before else before.__dict__.pop(HISTORY, [])
    step = Step(
        mode=mode.name,
        config=to_plain(mode.config_json(config), f"{mode.name}.config"),
        state=to_plain(mode.state(model, config) if state is None else state, f"{mode.name}.state"),
        order=next(_clock),
        implementation=mode,
    )
    model.__dict__[HISTORY] = [*steps, step]


def refresh(model: nn.Module) -> tuple[Step, ...]:
    """Read the state of the steps from the model again, as far as it still can be read, and return the history."""
    steps = list(model.__dict__.get(HISTORY, ()))
    for i in reversed(range(len(steps))):
        mode = steps[i].implementation
        if mode is not None:
            config = mode.Config.parse(steps[i].config, f"{mode.name}.config")
            steps[i] = replace(steps[i], state=to_plain(mode.state(model, config), f"{mode.name}.state"))
            if mode.rewrites:
                break
    if steps:
        model.__dict__[HISTORY] = steps
    return tuple(steps)


def parse_steps(mode: Any) -> list[tuple[str, dict[str, Any] | Config]]:
    """Read the argument of `apply_mode`, or the `steps:` of a recipe, as a list of (name, config)."""
    entries = [mode] if isinstance(mode, str | Mapping) or _is_pair(mode) else mode
    if not isinstance(entries, Sequence):
        raise ConfigError(f'A mode is a name or a list of ("name", config), not {type(mode).__name__}.')
    return [_parse_entry(entry, i) for i, entry in enumerate(entries)]


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str) and not isinstance(entry[1], str | tuple)


def _parse_entry(entry: Any, index: int) -> tuple[str, dict[str, Any] | Config]:
    name: Any = entry
    config: Any = None
    if isinstance(entry, Mapping):
        extra = set(entry) - {"mode", "config"}
        if extra or "mode" not in entry:
            raise ConfigError(f'Step {index} must have the keys "mode" and "config", not {sorted(map(str, entry))}.')
        name, config = entry["mode"], entry.get("config")
    elif isinstance(entry, tuple | list) and len(entry) == 2:
        name, config = entry
    if not isinstance(name, str) or not isinstance(config, dict | Config | None):
        raise ConfigError(f'Step {index} is {entry!r:.80}; write "name" or ("name", {{...}}).')
    return name, {} if config is None else config


def new_mode(registry: Any, name: str) -> Mode:
    """Return an instance of the mode called `name`. Raises UnknownNameError."""
    found = registry.get(name) if hasattr(registry, "get") else registry.get_mode(name)
    return found() if isinstance(found, type) else found


def _refuse(model: nn.Module, mode: Mode, before: list[Mode]) -> None:
    names = [m.name for m in before]
    shown = ", ".join(names) or "none"
    if mode.name in names and not mode.repeatable:
        raise ModeError(f'"{mode.name}" was applied to this model already (its steps: {shown}). Start from the original model.')
    if mode.after is not None and not mode.after & set(names):
        raise ModeError(f'"{mode.name}" needs one of {sorted(mode.after)} before it; the steps of this model: {shown}.')
    last = before[-1] if before else None
    if last is not None and last.next_modes is not None and mode.name not in last.next_modes:
        allowed = f"only {sorted(last.next_modes)} may follow" if last.next_modes else "nothing may follow"
        raise ModeError(f'"{mode.name}" cannot follow "{last.name}": {allowed} it.')
    for path, steps in nested_histories(model).items():
        if not mode.repeatable and any(s.mode == mode.name for s in steps):
            raise ModeError(
                f'"{mode.name}" was applied to the submodule "{path}" on its own; applying it to the whole would do it twice. '
                "Apply it to the other submodules one by one, or start from the original model."
            )


def _spread(mode_kwargs: Any, n: int) -> list[dict[str, Any]]:
    if mode_kwargs is None:
        return [{} for _ in range(n)]
    if isinstance(mode_kwargs, Mapping):
        return [dict(mode_kwargs) for _ in range(n)]
    if not isinstance(mode_kwargs, Sequence) or len(mode_kwargs) != n:
        raise ConfigError(f"mode_kwargs must be a dict for all steps or a list with one dict for each of the {n} steps.")
    return [dict(kw) for kw in mode_kwargs]


def apply_mode(
    model: nn.Module,
    mode: Any,
    registry: Any = None,
    mode_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    init_state: bool | None = None,
) -> nn.Module:
    """Apply one step or a chain of steps in order, record them, and return the model.

    `mode_kwargs` goes to `Mode.apply` (one dict for all steps, or one for each). `init_state=True` demands a model without
    history, False one with a history. Names, configurations and the order of the whole chain are checked before the model is
    touched; if a step then fails, the history holds exactly the steps that were done.

    Raises UnknownNameError, ConfigError, or ModeError when a step may not follow.

        apply_mode(model, [("quantize", mtq.INT8_DEFAULT_CFG)])
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"A {type(model).__name__} is no model; give a torch.nn.Module.")
    table = ModeRegistry if registry is None else registry
    wanted = parse_steps(mode)
    runtime = _spread(mode_kwargs, len(wanted))
    inner = unwrap_model(model)
    done = [s.implementation or new_mode(table, s.mode) for s in history(inner)]
    if init_state is not None and init_state is bool(done):
        state = "has the steps " + ", ".join(m.name for m in done) if done else "has no history"
        raise ModeError(f"init_state={init_state} was asked for, but the model {state}.")
    plan: list[tuple[Mode, Any]] = []
    for name, config in wanted:
        one = new_mode(table, name)
        _refuse(inner, one, [*done, *(m for m, _ in plan)])
        plan.append((one, one.Config.parse(config, f"{name}.config")))
    current = inner
    for (one, config), kwargs in zip(plan, runtime, strict=True):
        refresh(current)
        result = one.apply(current, config, **kwargs)
        if not isinstance(result, nn.Module):
            raise ModeError(f'"{one.name}" returned a {type(result).__name__} instead of the model.')
        record(result, current, one, config)
        current = result
    return model if current is inner else current
