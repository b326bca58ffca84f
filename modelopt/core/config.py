"""Configuration: text enters here, is checked, and leaves as frozen values.

`Config` is a frozen pydantic model that refuses unknown keys. `load_yaml` and `load_json` read files of strangers:
safe loader, no tags, no aliases (an alias can expand without bound), at most 4 MiB, at most 64 levels deep.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from modelopt.core.errors import ConfigError, did_you_mean

MAX_BYTES = 4 * 1024 * 1024
MAX_DEPTH = 64

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Base class of all configuration: frozen, typed, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=False, protected_namespaces=())

    @classmethod
    def parse(cls: type[C], data: Any, where: str = "") -> C:
        """Build the config from a dict (or return it if it is one already). Raises ConfigError, naming the key."""
        if isinstance(data, cls):
            return data
        if isinstance(data, Config):
            data = data.model_dump()
        if not isinstance(data, dict):
            raise ConfigError(f"{where or cls.__name__}: expected a mapping, got {type(data).__name__} ({_shorten(data)}).")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(_explain(cls, error, where)) from error


def _shorten(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _explain(cls: type[Config], error: ValidationError, where: str) -> str:
    lines = []
    for item in error.errors():
        path = ".".join(str(p) for p in item["loc"])
        if item["type"] == "extra_forbidden":
            known = list(cls.model_fields)
            hint = did_you_mean(str(item["loc"][-1]), known)
            lines.append(f'unknown key "{path}".{hint} Known keys: {", ".join(known)}')
        else:
            place = f'"{path}" = ' if path else ""
            lines.append(f"{place}{_shorten(item.get('input'))}: {item['msg'].removeprefix('Value error, ')}")
    return f"{where or cls.__name__}: " + "; ".join(lines) + "."


class _NoAliasLoader(yaml.SafeLoader):
    """SafeLoader that refuses anchors and aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ConfigError(f"YAML aliases are not accepted (line {event.start_mark.line + 1}). Write the value out.")
        return super().compose_node(parent, index)


def _read_text(path: str | Path, what: str) -> str:
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{what} {path} does not exist or is not a file.")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ConfigError(f"{what} {path} has {size} bytes; at most {MAX_BYTES} are read.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} {path} is not UTF-8 text: {error}.") from error


def _check_depth(data: Any, path: str, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise ConfigError(f"{path} is nested more than {MAX_DEPTH} levels deep.")
    for child in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        _check_depth(child, path, depth + 1)


def load_yaml(path: str | Path) -> Any:
    """Read a YAML file with the safe loader. Raises ConfigError with the line of the fault."""
    text = _read_text(path, "The YAML file")
    try:
        data = yaml.load(text, Loader=_NoAliasLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML that can be read safely: {' '.join(str(error).split())}") from error
    _check_depth(data, str(path))
    return data


def load_json(path: str | Path) -> Any:
    """Read a JSON file; NaN and infinities are refused. Raises ConfigError."""
    text = _read_text(path, "The JSON file")

    def refuse(token: str) -> Any:
        raise ConfigError(f"{path} contains {token}, which is not JSON.")

    try:
        data = json.loads(text, parse_constant=refuse)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    _check_depth(data, str(path))
    return data
