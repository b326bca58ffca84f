"""What a report says, as values: `Report` to `report.json` and back.

The keys of the JSON file are the field names below; `schema` grows when one changes its meaning. Sizes are bytes, times
seconds, KL divergences nats per token, agreement a share of 1.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from modelopt import __version__
from modelopt.core.config import load_json
from modelopt.core.errors import CheckpointError, did_you_mean

SCHEMA = 1
PACKAGES = ("torch", "transformers", "compressed-tensors", "safetensors", "numpy")

T = TypeVar("T")


@dataclass(frozen=True)
class Original:
    """The model that everything is compared with."""

    name: str
    num_parameters: int
    num_bytes: int
    bits_per_weight: float
    perplexity: float
    source: str = ""


@dataclass(frozen=True)
class Data:
    """The text that was scored: where it is from and how much of it."""

    source: str
    split: str
    num_windows: int
    window_length: int
    num_tokens: int
    calibration: str = ""


@dataclass(frozen=True)
class LayerError:
    """One layer: its name, its formats as text ("" where unknown), relative errors (weight None where it has no one weight)."""

    name: str
    format: str
    output_error: float
    weight_error: float | None

    @property
    def index(self) -> int | None:
        """Number of the layer's block: the first number in its name."""
        found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", self.name)
        return int(found.group(1)) if found else None

    @property
    def kind(self) -> str:
        """Last part of the name, such as `down_proj`."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Row:
    """One candidate; `seconds` is what quantizing it took."""

    name: str
    format: str
    bits_per_weight: float
    num_bytes: int
    kl: float
    kl_standard_error: float | None
    kl_p99: float
    top1_agreement: float
    perplexity: float
    seconds: float
    description: str = ""
    layers: tuple[LayerError, ...] = ()


@dataclass(frozen=True)
class Export:
    """One candidate that was written, and what a second library made of the files."""

    name: str
    layout: str
    loaded_with: str
    largest_logit_difference: float
    agrees: bool
    prompt: str = ""
    text: str = ""


@dataclass(frozen=True)
class Report:
    """A comparison of candidates with an original.

    >>> Report(title="SmolLM2 in eight formats", original=original, data=data, rows=(row,)).to_dict()["schema"]  # doctest: +SKIP
    1
    """

    title: str
    original: Original
    data: Data
    rows: tuple[Row, ...]
    export: Export | None = None
    recipe: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=lambda: environment())
    created: str = field(default_factory=lambda: date.today().isoformat())
    modelopt: str = __version__
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data; values that are not finite become None."""
        return _plain(asdict(self))

    @classmethod
    def from_dict(cls, data: Any) -> Report:
        """Build a report from JSON data. Raises CheckpointError for keys, types or a schema that it does not know."""
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            seen = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise CheckpointError(f"This is no report of schema {SCHEMA} (seen: {seen}).")
        values = dict(data)
        values["original"] = _make(Original, data.get("original"), "original")
        values["data"] = _make(Data, data.get("data"), "data")
        values["rows"] = tuple(_row(row, f"rows[{i}]") for i, row in enumerate(_list(data.get("rows"), "rows")))
        values["export"] = None if data.get("export") is None else _make(Export, data["export"], "export")
        values["notes"] = tuple(str(note) for note in _list(data.get("notes", []), "notes"))
        return _make(cls, values, "report")


def environment() -> dict[str, str]:
    """Return versions and the kind of machine: no host name, no user, no path."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, "cpu cores": str(os.cpu_count())}


def write_json(report: Report, path: str | Path) -> Path:
    """Write `report.json`, whole or not at all, and return its path."""
    return write_text(path, json.dumps(report.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_report(path: str | Path) -> Report:
    """Read what `write_json` wrote. Raises ConfigError for a file that is no JSON, CheckpointError for one that is no report."""
    return Report.from_dict(load_json(path))


def write_text(path: str | Path, text: str) -> Path:
    """Write a file beside its place and move it there, so that a reader never meets half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _list(value: Any, where: str) -> Iterable[Any]:
    if not isinstance(value, list):
        raise CheckpointError(f"{where} of the report is {type(value).__name__}; a list is wanted.")
    return value


def _row(data: Any, where: str) -> Row:
    layers = _list(data.get("layers", []) if isinstance(data, dict) else [], f"{where}.layers")
    made = tuple(_make(LayerError, one, f"{where}.layers[{i}]") for i, one in enumerate(layers))
    return _make(Row, {**data, "layers": made} if isinstance(data, dict) else data, where)


def _make(cls: type[T], data: Any, where: str) -> T:
    known = {f.name: str(f.type) for f in fields(cls)}  # type: ignore[arg-type]
    if not isinstance(data, dict):
        raise CheckpointError(f"{where} of the report is {type(data).__name__}; a mapping is wanted.")
    for key, value in data.items():
        if key not in known:
            raise CheckpointError(f'{where} of the report has an unknown key "{key}".{did_you_mean(key, known)}')
        number = known[key].split(" ")[0] in ("int", "float")
        if number and (isinstance(value, bool) or not isinstance(value, int | float)) and value is not None:
            raise CheckpointError(f'"{key}" in {where} of the report is {value!r}; a number is wanted.')
        if known[key] == "str" and not isinstance(value, str):
            raise CheckpointError(f'"{key}" in {where} of the report is {type(value).__name__}; text is wanted.')
    nan = {k: math.nan for k, v in data.items() if v is None and known[k] == "float"}
    try:
        return cls(**{**data, **nan})
    except TypeError as error:
        raise CheckpointError(f"{where} of the report is incomplete: {error}") from error
