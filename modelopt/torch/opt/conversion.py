"""Saving and restoring what was done to a model: its history as readable JSON, its tensors as safetensors.

    modelopt.json = {"modelopt_version": "x", "steps": [{"mode", "config", "state"}, ...], "nested": {"path": [step, ...]}}

A step has "order" where modules were optimized on their own, so that all steps are replayed in the order in which they were done.
`restore` tries everything on a weightless copy first: a file of another model leaves the model as it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import modelopt
from modelopt.core.config import Config
from modelopt.core.errors import CheckpointError, ConfigError, ModeError, ModelOptError, UnknownNameError
from modelopt.core.files import staged_directory, staged_file
from modelopt.torch.opt import files, foreign
from modelopt.torch.opt.mode import HISTORY, Mode, ModeRegistry, Step, history, nested_histories, new_mode, record, refresh
from modelopt.torch.opt.surgery import walk
from modelopt.torch.opt.tensors import fill_empty_buffers, gather, load, plan, shadow
from modelopt.torch.utils.distributed import is_master
from modelopt.torch.utils.network import get_submodule, set_submodule, unwrap_model

_MAX_STEPS = 10_000
_MAX_NAME = 1000


@dataclass(frozen=True)
class Replay:
    """One checked step of a saved state: where, what, with which configuration and state."""

    path: str
    mode: Mode
    config: Config
    state: dict[str, Any]


def _step_json(step: Step) -> dict[str, Any]:
    return {"mode": step.mode, "config": step.config, "state": step.state}


def modelopt_state(model: nn.Module) -> dict[str, Any]:
    """Return the history of the model and of the modules in it that were optimized on their own, as JSON values.

    The states are read from the model now, so that what happened after a step (calibration, for instance) is in them.
    """
    inner = unwrap_model(model)
    steps = refresh(inner)
    nested = {path: refresh(get_submodule(inner, path)) for path in nested_histories(inner)}
    state = {"modelopt_version": modelopt.__version__, "steps": [_step_json(s) for s in steps], "nested": {}}
    if not nested:
        return state
    ranks = {order: i for i, order in enumerate(sorted(s.order for h in [steps, *nested.values()] for s in h))}
    ordered = {path: [{**_step_json(s), "order": ranks[s.order]} for s in h] for path, h in {"": steps, **nested}.items()}
    return {**state, "steps": ordered.pop(""), "nested": ordered}


def parse_state(state: Any, registry: Any = None, where: str = "modelopt_state") -> list[Replay]:
    """Check a saved state and return its steps in the order in which they were done. Nothing is applied.

    Raises CheckpointError for unknown keys and modes, wrong types, and configurations that do not parse.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{where} is a {type(state).__name__}, not a mapping.")
    keys = {"modelopt_version", "steps", "nested"}
    if set(state) - keys or not {"modelopt_version", "steps"} <= set(state):
        raise CheckpointError(f"{where} has the keys {sorted(map(str, state))[:8]}; it must have {sorted(keys)}.")
    nested = state.get("nested", {})
    if not isinstance(state["modelopt_version"], str) or not isinstance(nested, Mapping):
        raise CheckpointError(f'{where}: "modelopt_version" must be text and "nested" a mapping of module names to steps.')
    found: list[tuple[int, Replay]] = []
    for path, steps in [("", state["steps"]), *nested.items()]:
        if not isinstance(path, str) or not isinstance(steps, list) or len(path) > _MAX_NAME:
            raise CheckpointError(f'{where}: the steps of "{path!s:.80}" must be a list.')
        found.extend(
            _parse_step(path, step, registry, f"{where}: step {i} of {path or 'the model'}") for i, step in enumerate(steps)
        )
    if len(found) > _MAX_STEPS:
        raise CheckpointError(f"{where} has {len(found)} steps; at most {_MAX_STEPS} are read.")
    return [replay for _, replay in sorted(found, key=lambda pair: pair[0])]


def _parse_step(path: str, step: Any, registry: Any, where: str) -> tuple[int, Replay]:
    if not isinstance(step, Mapping) or set(step) - {"order"} != {"mode", "config", "state"}:
        shown = sorted(map(str, step))[:8] if isinstance(step, Mapping) else type(step).__name__
        raise CheckpointError(f'{where} must have the keys "mode", "config" and "state"; seen: {shown}.')
    name, config, state, order = step["mode"], step["config"], step["state"], step.get("order", 0)
    typed = isinstance(name, str) and isinstance(config, dict) and isinstance(state, dict)
    if not typed or not isinstance(order, int) or isinstance(order, bool):
        raise CheckpointError(f'{where}: "mode" must be text, "config" and "state" mappings, "order" an integer.')
    try:
        mode = new_mode(ModeRegistry if registry is None else registry, name)
        return order, Replay(path, mode, mode.Config.parse(config, f"{name}.config"), state)
    except (UnknownNameError, ConfigError) as error:
        raise CheckpointError(f"{where} cannot be read: {error}") from error


def replay(model: nn.Module, steps: list[Replay], where: str) -> nn.Module:
    """Rebuild the structure that `steps` describe, record them, and return the model (a step may wrap it)."""
    for step in steps:
        try:
            target = get_submodule(model, step.path)
            result = step.mode.restore(target, step.config, step.state)
            record(result, target, step.mode, step.config, step.state)
        except (ModelOptError, KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            place = f' of "{step.path}"' if step.path else ""
            raise CheckpointError(
                f'{where}: the step "{step.mode.name}"{place} does not fit this {type(model).__name__}: {error}'
            ) from error
        if result is not target:
            if step.path:
                set_submodule(model, step.path, result)
            else:
                model = result
    return model


def _require_plain(model: nn.Module) -> None:
    done = [s.mode for s in history(model)] + [f"{path}: {s.mode}" for path, h in nested_histories(model).items() for s in h]
    if done:
        raise ModeError(f"The model has the steps {', '.join(done)} already. Restore into a freshly built model.")


def restore_from_modelopt_state(
    model: nn.Module,
    modelopt_state: Mapping[str, Any] | None = None,
    modelopt_state_path: str | Path | None = None,
    registry: Any = None,
) -> nn.Module:
    """Rebuild the structure of an optimized model without its tensors, and return the model.

    Give either the state or the path of a saved model (or of its modelopt.json). Load the tensors afterwards, for instance
    with `load_state_dict`. Raises CheckpointError, or ModeError if the model was optimized already.
    """
    if (modelopt_state is None) == (modelopt_state_path is None):
        raise ConfigError("Give either modelopt_state or modelopt_state_path, and not both.")
    where = "modelopt_state" if modelopt_state_path is None else str(modelopt_state_path)
    state = modelopt_state if modelopt_state_path is None else load_modelopt_state(modelopt_state_path)
    inner = unwrap_model(model)
    _require_plain(inner)
    result = replay(inner, parse_state(state, registry, where), where)
    return model if result is inner else result


def save(model: nn.Module, path: str | Path, overwrite: bool = False) -> None:
    """Save history and tensors. A path without a suffix becomes a directory, any other one a single safetensors file.

    What is written appears whole or not at all. Existing files are replaced only if they are those of a saved model, or with
    `overwrite`. Under `torch.distributed` the first process writes, the others return at once. Raises CheckpointError.

        save(model, "out")            # out/modelopt.json, out/model.safetensors
        save(model, "out.safetensors")
    """
    if not is_master():
        return
    target = Path(path)
    inner = unwrap_model(model)
    state = modelopt_state(inner)
    tensors, aliases = gather(inner)
    metadata = {files.ALIAS_KEY: json.dumps(aliases)}
    if files.is_directory_path(target):
        with staged_directory(target, overwrite, own=files.OWN_FILES, last=files.STATE_FILE) as stage:
            files.write_tensors(stage / files.TENSOR_FILE, tensors, metadata)
            (stage / files.STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        return
    metadata[files.STATE_KEY] = json.dumps(state)
    with staged_file(target, overwrite or _is_own_file(target)) as stage:
        files.write_tensors(stage, tensors, metadata)


def _is_own_file(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        return files.STATE_KEY in files.TensorSource([path]).metadata
    except CheckpointError:
        return False


def load_modelopt_state(path: str | Path) -> dict[str, Any]:
    """Read the state of a saved model: a directory, its modelopt.json, a single file, or an archive of NVIDIA's `mto.save`.

    Raises CheckpointError if it is missing or damaged. The content is checked when it is used.
    """
    target = Path(path)
    if target.is_dir():
        target = target / files.STATE_FILE
    if not target.is_file():
        raise CheckpointError(f"{target} does not exist; no optimized model was saved there. Check the path.")
    if foreign.is_archive(target):
        archive = foreign.load_archive(target)
        return _import(archive.get("modelopt_state", archive), str(target))
    if target.suffix == ".json":
        state = files.read_json(files.read_text(target), str(target))
    else:
        state = _embedded_state(files.TensorSource([target]), target)
    if not isinstance(state, dict):
        raise CheckpointError(f"{target} holds a {type(state).__name__}, not a mapping.")
    return state


def _embedded_state(source: files.TensorSource, path: Path) -> Any:
    if files.STATE_KEY not in source.metadata:
        raise CheckpointError(f'{path} has no metadata "{files.STATE_KEY}"; it was not written by `save`.')
    return files.read_json(source.metadata[files.STATE_KEY], f'the metadata "{files.STATE_KEY}" of {path}')


def _import(state: Any, where: str) -> dict[str, Any]:
    version, steps = foreign.foreign_steps(state, where)
    converted = []
    for step in steps:
        try:
            config, own = new_mode(ModeRegistry, step["mode"]).import_state(step["config"], step["metadata"])
        except ModelOptError as error:
            raise CheckpointError(f'{where}: the step "{step["mode"]}" cannot be read: {error}') from error
        converted.append({"mode": step["mode"], "config": config, "state": own})
    return {"modelopt_version": version, "steps": converted, "nested": {}}


class _MemorySource(files.TensorSource):
    """Tensors that are in memory already (of an archive), with the interface of a file."""

    def __init__(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        super().__init__([])
        self._tensors = tensors
        self.infos = {n: files.TensorInfo(path, tuple(t.shape), t.dtype) for n, t in tensors.items()}

    def get(self, name: str) -> Tensor:
        return self._tensors[name]


def _open(path: Path) -> tuple[Any, files.TensorSource]:
    if path.is_dir():
        state = load_modelopt_state(path)
        return state, files.TensorSource(files.tensor_files(path))
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist. Check the path.")
    if foreign.is_archive(path):
        archive = foreign.load_archive(path)
        tensors = archive.get("model_state_dict")
        if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
            raise CheckpointError(
                f'{path} has no "model_state_dict" of tensors; use restore_from_modelopt_state for a state alone.'
            )
        return _import(archive.get("modelopt_state"), str(path)), _MemorySource(tensors, path)
    source = files.TensorSource([path])
    return _embedded_state(source, path), source


def restore(model: nn.Module, path: str | Path, registry: Any = None) -> nn.Module:
    """Restore structure, history and tensors into a freshly built model, bit for bit, and return it.

    The type and the ties of the saved tensors win over those of the model; parameters keep their identity where the type allows.
    `path` is what `save` wrote (a directory or a file), or an archive of NVIDIA's `mto.save`.

    Raises CheckpointError (missing, damaged, hostile, or of another model: then the model is as it was), ModeError.

        model = restore(MyModel(), "out")
    """
    target = Path(path)
    where = str(target)
    inner = unwrap_model(model)
    _require_plain(inner)
    state, source = _open(target)
    steps = parse_state(state, registry, where)
    trial = shadow(inner)
    if trial is not None:
        trial = replay(trial, steps, where)
        fill_empty_buffers(trial, source.infos, "meta")
        plan(trial, source, where)
        del trial
    result = replay(inner, steps, where)
    load(result, source, plan(result, source, where))
    return model if result is inner else result


class ModeloptStateManager:
    """The history of one model, under the name that NVIDIA's public API uses."""

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrap_model(model)

    @staticmethod
    def is_converted(model: nn.Module, is_root: bool = False) -> bool:
        """Return whether the model, or (unless `is_root`) any module in it, was optimized."""
        inner = unwrap_model(model)
        return bool(history(inner)) if is_root else any(m.__dict__.get(HISTORY) for _, m in walk(inner))

    @property
    def has_state(self) -> bool:
        """Whether the model itself was optimized."""
        return bool(history(self.model))

    def state_dict(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the history as (mode, {"config", "metadata"}) pairs."""
        return [(s.mode, {"config": s.config, "metadata": s.state}) for s in refresh(self.model)]

    @property
    def last_mode(self) -> str | None:
        """The name of the last step, or None."""
        steps = history(self.model)
        return steps[-1].mode if steps else None
