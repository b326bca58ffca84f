"""Safetensors shards written tensor by tensor, so that no shard is ever held in memory.

A safetensors file is `u64 N | N bytes of JSON header | data`, the data without holes. The header needs all offsets, so the
data is spooled to disk first, one spool per item size: concatenated from the widest to the narrowest item, every tensor is
aligned to its item, which readers that map the file rely on.
Source: github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from modelopt.core.errors import ExportError
from modelopt.torch.export.files import write_json
from modelopt.torch.opt.files import DTYPE_NAMES

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
    """Return a number of bytes; `"10GB"` is decimal and `"10GiB"` is binary. Raises ExportError.

    >>> parse_size("5MB")
    5000000
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ExportError(f'max_shard_size={size!r} is no size. Write it like "10GB", "500MB" or a number of bytes.')
    return int(float(match[1]) * _UNITS[match[2].upper()])


@dataclass
class _Spool:
    path: Path
    file: BinaryIO
    size: int = 0


@dataclass
class ShardWriter:
    """Writes named tensors into `directory`, starting a new shard when one would exceed `max_shard_size` bytes.

    >>> with ShardWriter(directory, "10GB") as shards:    # doctest: +SKIP
    ...     shards.add("weight", torch.zeros(2, 2))
    """

    directory: Path
    max_shard_size: int | str = "10GB"
    total_size: int = 0
    weight_map: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._limit = parse_size(self.max_shard_size)
        self._shards: list[Path] = []
        self._spools: dict[int, _Spool] = {}
        self._entries: dict[str, tuple[Tensor, int, int]] = {}  # name -> (meta tensor, item size, offset in its spool)
        self._held = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.finish()
        for spool in self._spools.values():
            spool.file.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor. Raises ExportError for a name written before, or a dtype that safetensors lacks."""
        if name in self.weight_map:
            raise ExportError(f'Two tensors are both called "{name}"; one of them would be lost.')
        if tensor.dtype not in DTYPE_NAMES:
            raise ExportError(f'"{name}" has dtype {tensor.dtype}, which a safetensors file cannot hold.')
        num_bytes = tensor.numel() * tensor.element_size()
        if self._held and self._held + num_bytes > self._limit:
            self._close_shard()
        spool = self._spool(tensor.element_size())
        self._entries[name] = (tensor.detach().to("meta"), tensor.element_size(), spool.size)
        if num_bytes:
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            spool.file.write(memoryview(flat.numpy()))
        spool.size += num_bytes
        self._held += num_bytes
        self.total_size += num_bytes
        self.weight_map[name] = len(self._shards)

    def _spool(self, item_size: int) -> _Spool:
        if item_size not in self._spools:
            path = self.directory / f".spool-{len(self._shards)}-{item_size}"
            self._spools[item_size] = _Spool(path, path.open("wb"))
        return self._spools[item_size]

    def _close_shard(self) -> None:
        widths = sorted(self._spools, reverse=True)
        start = dict(zip(widths, _running(self._spools[w].size for w in widths), strict=True))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for name, (meta, width, offset) in sorted(self._entries.items(), key=lambda e: start[e[1][1]] + e[1][2]):
            begin = start[width] + offset
            end = begin + meta.numel() * width
            header[name] = {"dtype": DTYPE_NAMES[meta.dtype], "shape": list(meta.shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        path = self.directory / f".shard-{len(self._shards)}"
        with path.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for width in widths:
                spool = self._spools[width]
                spool.file.close()
                with spool.path.open("rb") as data:
                    shutil.copyfileobj(data, out, 2**22)
                spool.path.unlink()
        self._shards.append(path)
        self._spools, self._entries, self._held = {}, {}, 0

    def finish(self) -> None:
        """Close the last shard, give the files their names, and write the index if there is more than one."""
        if self._entries or not self._shards:
            self._close_shard()
        count = len(self._shards)
        names = ["model.safetensors"] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for path, name in zip(self._shards, names, strict=True):
            path.rename(self.directory / name)
        if count > 1:
            weight_map = {name: names[i] for name, i in sorted(self.weight_map.items())}
            index = {"metadata": {"total_size": self.total_size}, "weight_map": weight_map}
            write_json(self.directory / "model.safetensors.index.json", index)


def _running(sizes: object) -> list[int]:
    """Return the start of each part: 0, s0, s0 + s1, ..."""
    starts, total = [], 0
    for size in sizes:  # type: ignore[attr-defined]
        starts.append(total)
        total += size
    return starts
