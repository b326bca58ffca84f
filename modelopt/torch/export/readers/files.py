"""Reading a checkpoint directory: configuration, index and tensors of strangers, checked before use.

Tensors are read one at a time (the files are mapped), so a checkpoint larger than memory can be read layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelopt.core.config import load_json
from modelopt.core.errors import CheckpointError, ConfigError
from modelopt.torch.opt.files import DTYPE_NAMES, INDEX_FILE, TensorSource, read_index


class Tensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint directory by name, read when asked for.

    Raises CheckpointError for a directory without weights, a missing, truncated or corrupt file, or an index that lies.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(
                f"{self.directory} is no directory. A checkpoint is a directory with config.json and safetensors."
            )
        index = self.directory / INDEX_FILE
        where = read_index(index) if index.is_file() else {}
        names = sorted(set(where.values())) or sorted(p.name for p in self.directory.glob("*.safetensors"))
        if not names:
            raise CheckpointError(f"There is no safetensors file in {self.directory}.")
        self._source = TensorSource([self.directory / name for name in names])
        for key, name in where.items():
            if key not in self._source.infos or self._source.infos[key].file.name != name:
                raise CheckpointError(f"{index} names {key} in {name}, which does not hold it.")

    def __getitem__(self, key: str) -> Tensor:
        return self._source.get(key)

    def shape(self, key: str) -> list[int]:
        """Return the shape of a tensor without reading it."""
        return list(self._source.infos[key].shape)

    def dtype(self, key: str) -> str:
        """Return the safetensors dtype of a tensor without reading it."""
        return DTYPE_NAMES[self._source.infos[key].dtype]

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.infos)

    def __len__(self) -> int:
        return len(self._source.infos)


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
