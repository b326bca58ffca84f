"""Safetensors files that keep ties and every bit, and the JSON beside them, read as the work of strangers.

Layout of a saved model:  DIR/modelopt.json + DIR/model.safetensors,  or one FILE.safetensors whose metadata holds the JSON under
"modelopt". Tensors that share memory are written once; the metadata "modelopt_aliases" maps their other names to the first.
A directory with `model.safetensors.index.json` (several shards) is read as well.
Source: safetensors format, https://huggingface.co/docs/safetensors (8-byte header length, JSON header, raw little-endian data).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modelopt.core.errors import CheckpointError

STATE_FILE = "modelopt.json"
TENSOR_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
STATE_KEY = "modelopt"
ALIAS_KEY = "modelopt_aliases"
OWN_FILES = {STATE_FILE, TENSOR_FILE}
MAX_JSON_BYTES = 64 * 1024 * 1024
_MAX_DEPTH = 64
_MAX_INT = 2**63

# The names that safetensors writes into its headers.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_json(text: str, where: str) -> Any:
    """Parse JSON of strangers. NaN, infinities, integers beyond 64 bits and deep nesting are refused with CheckpointError."""

    def refuse(token: str) -> Any:
        raise CheckpointError(f"{where} contains {token}, which is not JSON.")

    if len(text) > MAX_JSON_BYTES:
        raise CheckpointError(f"{where} has {len(text)} characters; at most {MAX_JSON_BYTES} are read.")
    try:
        data = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{where} is not JSON that can be read: {error}. The file is damaged; save the model again."
        ) from error
    _check_values(data, where)
    return data


def _check_values(data: Any, where: str) -> None:
    level = [data]
    for _ in range(_MAX_DEPTH):
        following: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                following.extend(value.values())
            elif isinstance(value, list):
                following.extend(value)
            elif isinstance(value, float) and not math.isfinite(value):
                raise CheckpointError(f"{where} contains a number that is too large for a float.")
            elif isinstance(value, int) and not -_MAX_INT <= value < _MAX_INT:
                raise CheckpointError(f"{where} contains an integer of more than 64 bits.")
        if not following:
            return
        level = following
    raise CheckpointError(f"{where} is nested more than {_MAX_DEPTH} levels deep.")


def read_text(path: Path) -> str:
    """Read a text file of at most 64 MiB. Raises CheckpointError."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes; at most {MAX_JSON_BYTES} are read.")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors, none of which may share memory, into one safetensors file. Raises CheckpointError."""
    meta = [name for name, t in tensors.items() if t.device.type == "meta"]
    if meta:
        raise CheckpointError(f'The tensor "{meta[0]}" is on the meta device and has no values to save. Load the weights first.')
    try:
        save_file({n: t.detach().contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt", **metadata})
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path.name} could not be written: {error}.") from error


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and what it looks like, known without reading its values."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorSource:
    """The tensors of one or more safetensors files; headers are read at once, values when they are asked for."""

    def __init__(self, files: list[Path]) -> None:
        self.metadata: dict[str, str] = {}
        self.infos: dict[str, TensorInfo] = {}
        self._open: dict[Path, Any] = {}
        for file in files:
            self._read_header(file)
        self.aliases = self._read_aliases(files)

    def _read_header(self, file: Path) -> None:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing. Copy the whole directory of the saved model, or save it again.")
        try:
            handle = safe_open(file, framework="pt")
            self.metadata.update(handle.metadata() or {})
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                if name in self.infos:
                    raise CheckpointError(f'"{name}" is in {self.infos[name].file.name} and again in {file.name}.')
                view = handle.get_slice(name)
                kind = view.get_dtype()
                if kind not in DTYPES:
                    raise CheckpointError(f'{file}: the tensor "{name}" has the type {kind}, which is not supported.')
                self.infos[name] = TensorInfo(file, tuple(view.get_shape()), DTYPES[kind])
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{file} is truncated, damaged or not a safetensors file ({error}). Copy it again, or save the model again."
            ) from error
        self._open[file] = handle

    def _read_aliases(self, files: list[Path]) -> dict[str, str]:
        where = f'the metadata "{ALIAS_KEY}" of {files[0]}' if files else ALIAS_KEY
        aliases = read_json(self.metadata.get(ALIAS_KEY, "{}"), where)
        if not isinstance(aliases, dict):
            raise CheckpointError(f"{where} is a {type(aliases).__name__}, not a mapping of names.")
        for name, first in aliases.items():
            if not isinstance(first, str) or first not in self.infos or name in self.infos:
                raise CheckpointError(f'{where} ties "{name}" to {first!r:.80}, which cannot be. The file is damaged.')
        return aliases

    def get(self, name: str) -> Tensor:
        """Read one tensor onto the CPU. Raises CheckpointError."""
        file = self.infos[name].file
        try:
            return self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f'The tensor "{name}" of {file} cannot be read: {error}.') from error


def tensor_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a directory: one, or the shards that its index names. Raises CheckpointError."""
    single, index = directory / TENSOR_FILE, directory / INDEX_FILE
    if single.is_file() or not index.is_file():
        return [single]
    return [directory / name for name in sorted(set(read_index(index).values()))]


def read_index(index: Path) -> dict[str, str]:
    """Return {tensor: file name} of an index; every file lies beside it. Raises CheckpointError."""
    data = read_json(read_text(index), str(index))
    shards = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise CheckpointError(f'{index} has no "weight_map" of file names.')
    for name in set(shards.values()):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {name!r:.80}, which is no safetensors file of the same directory.")
    return shards


def is_directory_path(path: Path) -> bool:
    """Return whether a model saved to `path` is a directory: an existing one, or a path without a suffix."""
    return path.is_dir() or not (path.exists() or path.suffix)
