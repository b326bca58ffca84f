"""What is in a checkpoint directory, from its headers and JSON files only: formats, bits per weight, sizes, history, coverage.

A layer is quantized if it has a `weight_scale`. Its format is the one in `modelopt.json`, or what the directory's own
configuration calls it. Weights are counted from the stored codes: 8 bytes / bits of the element.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modelopt.core.errors import CheckpointError, FormatError
from modelopt.numerics.formats import parse
from modelopt.recipes.source import Source, check_directory, open_source
from modelopt.torch.export.readers.files import read_json

_CODES = ("weight_packed", "weight")
_PARTS = ("weight_scale", "weight_scale_2", "weight_zero_point", "weight_global_scale", "weight_shape", "weight_g_idx")
_INPUTS = ("input_scale", "input_global_scale", "pre_quant_scale", "input_zero_point")


@dataclass(frozen=True)
class Entry:
    """One layer or tensor: its bytes, and the number of weights where the format is known (0: not)."""

    name: str
    shape: tuple[int, ...]
    format: str
    input_format: str
    num_bytes: int
    num_weights: int = 0


@dataclass(frozen=True)
class Inspection:
    """A checkpoint directory in numbers. `steps` are the names of the modes of its history, `plan` what `plan.json` says."""

    directory: str
    architecture: str
    layout: str
    entries: tuple[Entry, ...]
    num_bytes: int
    kv_cache: str
    steps: tuple[str, ...]
    producer: str
    plan: dict[str, Any]
    files: dict[str, int]

    @property
    def quantized(self) -> tuple[Entry, ...]:
        """The quantized layers."""
        return tuple(e for e in self.entries if e.format)

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits, scales included, for each quantized weight; None where no format is known."""
        known = [e for e in self.quantized if e.num_weights]
        return 8 * sum(e.num_bytes for e in known) / sum(e.num_weights for e in known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data."""
        return {**asdict(self), "bits_per_weight": self.bits_per_weight}


def inspect_directory(directory: str | Path) -> Inspection:
    """Read the headers of a directory. Raises CheckpointError for what is missing, truncated or corrupt.

    >>> inspect_directory("out").bits_per_weight                                    # doctest: +SKIP
    4.5
    """
    path = check_directory(str(directory))
    source = open_source(str(path))
    story = _optional(path / "modelopt.json")
    told = story.get("export") if isinstance(story.get("export"), dict) else {}
    quantization = source.config.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{path / 'config.json'}: quantization_config is no JSON object.")
    method = str(quantization.get("quant_method") or "")
    layout = {"modelopt": "hf", "": "modelopt (own form)" if story else "plain"}.get(method, method)
    steps = story.get("steps")
    maker = told.get("producer") or quantization.get("producer") or {}
    return Inspection(
        directory=str(path),
        architecture=", ".join(map(str, source.config.get("architectures") or ["unknown"])),
        layout=layout,
        entries=tuple(_entries(source, told.get("layers"), _config_name(quantization))),
        num_bytes=source.num_bytes,
        kv_cache=_kv_cache(told.get("kv_cache"), quantization, path),
        steps=tuple(str(s.get("mode")) for s in steps if isinstance(s, dict)) if isinstance(steps, list) else (),
        producer=f"{maker.get('name', '')} {maker.get('version', '')}".strip() if isinstance(maker, dict) else "",
        plan=_optional(path / "plan.json"),
        files={f.relative_to(path).as_posix(): f.stat().st_size for f in sorted(path.rglob("*")) if f.is_file()},
    )


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _config_name(quantization: dict[str, Any]) -> str:
    return str(quantization.get("quant_algo") or quantization.get("format") or "unknown format")


def _kv_cache(told: Any, quantization: dict[str, Any], path: Path) -> str:
    if isinstance(told, dict) and told:
        return f"{', '.join(sorted({str(f) for f in told.values()}))} in {len(told)} attention layers"
    if quantization.get("kv_cache_scheme"):
        return str(quantization["kv_cache_scheme"])
    inner = _optional(path / "hf_quant_config.json").get("quantization")
    return str(inner.get("kv_cache_quant_algo") or "") if isinstance(inner, dict) else ""


def _entries(source: Source, told: Any, fallback: str) -> list[Entry]:
    formats = told if isinstance(told, dict) else {}
    layers = {key.removesuffix(".weight_scale") for key in source.tensors if key.endswith(".weight_scale")}
    grouped: dict[str, dict[str, tuple[tuple[int, ...], str, int]]] = {name: {} for name in layers}
    entries = []
    for key, value in source.tensors.items():
        name, _, part = key.rpartition(".")
        if name in grouped and part in (*_CODES, *_PARTS, *_INPUTS):
            grouped[name][part] = value
        else:
            entries.append(Entry(key, value[0], "", "", value[2]))
    for name, parts in grouped.items():
        known = formats.get(name) if isinstance(formats.get(name), dict) else {}
        fmt = str(known.get("weight") or fallback)
        codes = next((parts[p] for p in _CODES if p in parts), ((), "", 0))
        stored = sum(nbytes for part, (_, _, nbytes) in parts.items())
        entries.append(Entry(name, codes[0], fmt, str(known.get("input") or ""), stored, _num_weights(fmt, codes[2])))
    return sorted(entries, key=lambda e: [(int(p), "") if p.isdigit() else (-1, p) for p in e.name.split(".")])


def _num_weights(fmt: str, code_bytes: int) -> int:
    try:
        return code_bytes * 8 // parse(fmt).element.bits
    except FormatError:  # the name of an algorithm of another exporter, not a format of the algebra
        return 0
