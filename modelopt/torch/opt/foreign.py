"""Reading what NVIDIA's `mto.save` wrote: a `torch.save` archive, opened with `weights_only=True` and nothing else.

    {"modelopt_state": {"modelopt_state_dict": [(mode, {"config": ..., "metadata": ...}), ...], "modelopt_version": "x"},
     "model_state_dict": {...}}

An `<algorithm>_calibrate` entry is no step of its own here: calibration is part of the "quantize" step before it, whose algorithm
it names and whose metadata it replaces. The mode itself translates the rest (`Mode.import_state`).
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._weights_only_unpickler import UnpicklingError  # type: ignore[attr-defined]

from modelopt.core.errors import CheckpointError, ConfigError
from modelopt.torch.opt.mode import to_plain

_CALIBRATE = "_calibrate"
_QUANTIZE = "quantize"
_HARMLESS: list[Any] = [slice]  # what NVIDIA's block quantizers keep; building one runs no code


def is_archive(path: Path) -> bool:
    """Return whether the file is a zip archive, which is what `torch.save` writes."""
    return path.is_file() and zipfile.is_zipfile(path)


def load_archive(path: Path) -> dict[str, Any]:
    """Load the archive with the restricted unpickler. Raises CheckpointError for anything that is not plain data and tensors."""
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, OSError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be loaded safely: {' '.join(str(error).split())[:300]} "
            "Only plain data and tensors are accepted; save the model again without custom objects."
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, not a saved model.")
    return data


def plain(value: Any, where: str) -> Any:
    """Return a loaded value as JSON: dtypes and devices become their names, shapes lists, single-element tensors numbers."""
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if isinstance(value, slice):
        return [plain(v, where) for v in (value.start, value.stop, value.step)]
    if isinstance(value, Tensor):
        return plain(value.item() if value.ndim == 0 else value.tolist(), where)
    if isinstance(value, Mapping):
        return {str(k): plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v, where) for v in value]
    try:
        return to_plain(value, where)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def foreign_steps(state: Any, where: str) -> tuple[str, list[dict[str, Any]]]:
    """Return (version, [{"mode", "config", "metadata"}]) of the "modelopt_state" of an archive. Raises CheckpointError."""
    entries = state.get("modelopt_state_dict") if isinstance(state, dict) else None
    if not isinstance(entries, list):
        raise CheckpointError(f'{where} has no list "modelopt_state_dict"; it was not written by a ModelOpt `save`.')
    steps: list[dict[str, Any]] = []
    for i, entry in enumerate(entries):
        if not (isinstance(entry, tuple | list) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], dict)):
            raise CheckpointError(f"{where}: entry {i} is not a pair (mode, dict).")
        name, content = entry
        config, metadata = (plain(content.get(k) or {}, f"{name}.{k}") for k in ("config", "metadata"))
        if not isinstance(config, dict) or not isinstance(metadata, dict):
            raise CheckpointError(f'{where}: "config" and "metadata" of entry {i} must be mappings.')
        if name.endswith(_CALIBRATE):
            if not steps or steps[-1]["mode"] != _QUANTIZE:
                raise CheckpointError(f'{where}: the entry "{name}" does not follow a "{_QUANTIZE}" entry.')
            _merge_calibration(steps[-1], name.removesuffix(_CALIBRATE), config, metadata)
        else:
            steps.append({"mode": name, "config": config, "metadata": metadata})
    return str(state.get("modelopt_version", "unknown")), steps


def _merge_calibration(step: dict[str, Any], method: str, config: dict[str, Any], metadata: dict[str, Any]) -> None:
    known = None if method.strip("_") == "no" else method
    step["config"]["algorithm"] = known if set(config) <= {"method"} else {**config, "method": known}
    step["metadata"] = {**step["metadata"], **metadata}
