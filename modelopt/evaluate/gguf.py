"""Read a GGUF file: its metadata, and its tensors dequantized to float32.

Layout (version 2 and 3, little endian): magic "GGUF", u32 version, u64 tensor count, u64 key count; the keys as (string,
u32 type, value); the tensors as (string, u32 rank, u64 sizes innermost first, u32 type, u64 offset); padding to
`general.alignment` (32); the data. A string is u64 length and UTF-8 bytes; an array u32 type, u64 length, items.

Blocks of 32 values along the innermost dimension:  Q8_0 = f16 d, 32 int8 q:  x = d q.
Q4_1 = f16 d, f16 m, 16 bytes: x = d q + m, where the low nibbles are values 0 to 15 and the high nibbles 16 to 31.

Source: the GGUF specification in the ggml repository (docs/gguf.md) and its block definitions (ggml-common.h).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelopt.core.errors import CheckpointError

BLOCK = 32
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: its shape (outermost first), GGUF type and offset from the start of the file in bytes."""

    shape: tuple[int, ...]
    type: int
    offset: int


def _f32(raw: Tensor) -> Tensor:
    return raw.view(torch.float32)


def _f16(raw: Tensor) -> Tensor:
    return raw.view(torch.float16).float()


def _q4_1(raw: Tensor) -> Tensor:
    blocks = raw.view(-1, 20)
    d, m = blocks[:, :4].contiguous().view(torch.float16).float().unbind(1)
    q = torch.cat([blocks[:, 4:] & 0xF, blocks[:, 4:] >> 4], dim=1).float()
    return q * d[:, None] + m[:, None]


def _q8_0(raw: Tensor) -> Tensor:
    blocks = raw.view(-1, 34)
    d = blocks[:, :2].contiguous().view(torch.float16).float()
    return blocks[:, 2:].contiguous().view(torch.int8).float() * d


# type -> (name, values per block, bytes per block, bytes to values)
_TYPES: dict[int, tuple[str, int, int, Callable[[Tensor], Tensor]]] = {
    0: ("F32", 1, 4, _f32),
    1: ("F16", 1, 2, _f16),
    3: ("Q4_1", BLOCK, 20, _q4_1),
    8: ("Q8_0", BLOCK, 34, _q8_0),
}


class _Cursor:
    """Reads values one after the other from a memory map."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def scalar(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self.data, self.at)[0]
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        raw = self.data[self.at : self.at + length]
        if len(raw) != length:
            raise struct.error("a string runs past the end")
        self.at += length
        return raw.decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, length = self.scalar("I"), self.scalar("Q")
            if length > len(self.data):
                raise struct.error("an array runs past the end")
            return [self.value(inner) for _ in range(length)]
        return self.scalar(_SCALARS[kind])


class GGUFFile:
    """An open GGUF file: `metadata`, `tensors` (name to Entry) and `read(name)`.

    Raises CheckpointError where the file is missing, truncated or no GGUF, or uses a type other than F32, F16, Q4_1, Q8_0.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"The GGUF file {self.path} does not exist.")
        try:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.metadata, self.tensors = self._header()
        except (struct.error, UnicodeDecodeError, KeyError, ValueError) as error:
            raise CheckpointError(f"{self.path.name} is not a GGUF file that can be read: {error}") from error

    def _header(self) -> tuple[dict[str, Any], dict[str, Entry]]:
        cursor = _Cursor(self._map)
        magic, version = cursor.scalar("4s"), cursor.scalar("I")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it starts with {magic!r}, version {version}; GGUF version 2 or 3 is wanted")
        num_tensors, num_keys = cursor.scalar("Q"), cursor.scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = cursor.string()
            metadata[key] = cursor.value(cursor.scalar("I"))
        found = []
        for _ in range(num_tensors):
            name = cursor.string()
            sizes = tuple(cursor.scalar("Q") for _ in range(cursor.scalar("I")))
            found.append((name, sizes[::-1], cursor.scalar("I"), cursor.scalar("Q")))
        alignment = metadata.get("general.alignment", 32)
        start = -(-cursor.at // alignment) * alignment
        return metadata, {name: Entry(shape, kind, start + offset) for name, shape, kind, offset in found}

    def read(self, name: str) -> Tensor:
        """Return a tensor as float32."""
        entry = self.tensors[name]
        if entry.type not in _TYPES:
            kinds = ", ".join(t[0] for t in _TYPES.values())
            raise CheckpointError(f"{self.path.name}: {name} has GGUF type {entry.type}; {kinds} can be read.")
        _, values, size, convert = _TYPES[entry.type]
        length = prod(entry.shape) // values * size
        raw = self._map[entry.offset : entry.offset + length]
        if len(raw) != length or prod(entry.shape) % values:
            raise CheckpointError(f"{self.path.name}: {name} {list(entry.shape)} runs past the end of the file; it is truncated.")
        return convert(torch.frombuffer(bytearray(raw), dtype=torch.uint8)).reshape(entry.shape)
