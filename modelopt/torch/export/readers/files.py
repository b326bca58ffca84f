"""Reading a checkpoint directory: configuration, index and tensors of strangers, checked before use.

Tensors are read one at a time (the files are mapped), so a checkpoint larger than memory can be read layer by layer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modelopt.core.config import load_json
from modelopt.core.errors import CheckpointError, ConfigError

INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 * 2**20


class Tensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint directory by name, read when asked for.

    Raises CheckpointError for a directory without weights, a missing, truncated or corrupt file, or an index that lies.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._files: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        names = self._file_names()
        for name in names:
            path = self.directory / name
            if not path.is_file():
                raise CheckpointError(f"{path} is missing. Fetch the checkpoint again.")
            try:
                self._files[name] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"{path} is truncated or no safetensors file: {error}. Fetch it again.") from error
            for key in self._files[name].keys():  # noqa: SIM118 - a safetensors handle is no dict
                if key in self._where:
                    raise CheckpointError(f'"{key}" is in {self._where[key]} and again in {name}.')
                self._where[key] = name
        self._check_index()

    def _file_names(self) -> list[str]:
        if not self.directory.is_dir():
            raise CheckpointError(
                f"{self.directory} is no directory. A checkpoint is a directory with config.json and safetensors."
            )
        self._index: dict[str, str] = {}
        if (self.directory / INDEX).is_file():
            data = _read_index(self.directory / INDEX)
            weight_map = data.get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
                raise CheckpointError(f"{self.directory / INDEX} has no weight_map of names to files.")
            for name in set(weight_map.values()):
                if Path(name).name != name or not name.endswith(".safetensors"):
                    raise CheckpointError(f"{self.directory / INDEX} points to {name!r}, which is no safetensors file beside it.")
            self._index = weight_map
            return sorted(set(weight_map.values()))
        found = sorted(p.name for p in self.directory.glob("*.safetensors"))
        if not found:
            raise CheckpointError(f"There is no safetensors file in {self.directory}.")
        return found

    def _check_index(self) -> None:
        lost = [key for key, name in self._index.items() if self._where.get(key) != name]
        if lost:
            raise CheckpointError(f"{self.directory / INDEX} names {lost[0]} in {self._index[lost[0]]}, which does not hold it.")

    def __getitem__(self, key: str) -> Tensor:
        name = self._where[key]
        try:
            return self._files[name].get_tensor(key)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f'"{key}" in {self.directory / name} cannot be read: {error}.') from error

    def shape(self, key: str) -> list[int]:
        """Return the shape of a tensor without reading it."""
        return list(self._files[self._where[key]].get_slice(key).get_shape())

    def dtype(self, key: str) -> str:
        """Return the safetensors dtype of a tensor without reading it."""
        return str(self._files[self._where[key]].get_slice(key).get_dtype())

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most 4 MiB. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.")
    try:
        data = load_json(path)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is no JSON object.")
    return data


def _read_index(path: Path) -> dict[str, Any]:
    """Read an index, which names every tensor and may be larger than a configuration."""
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes; at most {MAX_INDEX_BYTES} are read.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is no JSON object.")
    return data


def dtype_of(config: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype that config.json names (`torch_dtype` in older ones), float32 if it names none that weights can have."""
    found = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize > 1 else torch.float32


def inverse(divisor: Tensor) -> Tensor:
    """Return the float32 scale [] whose reciprocal is `divisor`: 1 / divisor, or the neighbour that gives it back exactly."""
    guess = 1.0 / divisor.float().reshape(())
    limits = torch.tensor(float("inf")), torch.tensor(0.0)
    nearby = [guess, *(torch.nextafter(guess, limit) for limit in limits)]
    return next((s for s in nearby if torch.equal(s.reciprocal(), divisor.float().reshape(()))), guess)


def take(tensors: Tensors, key: str, used: set[str]) -> Tensor | None:
    """Return a tensor and note that it was used, or None if it is not there."""
    if key not in tensors:
        return None
    used.add(key)
    return tensors[key]


def need(tensors: Tensors, key: str, used: set[str]) -> Tensor:
    """Return a tensor and note that it was used. Raises CheckpointError if it is not there."""
    found = take(tensors, key, used)
    if found is None:
        raise CheckpointError(f"{tensors.directory} lacks the tensor {key}, which its configuration promises.")
    return found
