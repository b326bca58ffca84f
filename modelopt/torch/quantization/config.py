"""Quantization configuration: three dialects enter here, and one list of rules leaves.

    NVIDIA's list    {"quant_cfg": [{"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}}], ...}
    NVIDIA's dict    {"quant_cfg": {"*weight_quantizer": {"num_bits": (4, 3)}, "nn.BatchNorm2d": {"*": {"enable": False}}, ...}}
    described dict   {"quant_cfg": {"*weight_quantizer": {"num_bits": 4, "format": "nvfp4"}, "default": {"format": "fp8"}}, ...}

The keys are those of NVIDIA's public API (ModelOpt 0.47, `QuantizeConfig`); `format` is a name or a string of the format algebra.
How rules act on quantizers is in `rules.py`; how attributes become a format is in `attributes.py`.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator, model_validator

from modelopt.core.config import Config
from modelopt.core.errors import ConfigError, did_you_mean
from modelopt.torch.quantization.attributes import QuantizerAttributeConfig
from modelopt.torch.quantization.rules import QuantizerRule, resolve_rules

__all__ = ["QuantizeConfig", "QuantizerAttributeConfig", "QuantizerEntry", "QuantizerRule", "resolve_rules"]

_CLASS_NAME = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*$")
_ENTRY_KEYS = ("quantizer_name", "parent_class", "cfg", "enable")
_TOP_KEYS = ("quant_cfg", "algorithm", "effective_bits")


class QuantizerEntry(Config):
    """One entry of the ordered list: which quantizers, and what they become.

    `cfg` replaces the attributes and enables; a list of attributes makes a `SequentialQuantizer`; `enable` alone toggles.
    """

    quantizer_name: str
    parent_class: str | None = None
    cfg: QuantizerAttributeConfig | tuple[QuantizerAttributeConfig, ...] | None = None
    enable: bool | None = None

    @field_validator("quantizer_name")
    @classmethod
    def _named(cls, value: str) -> str:
        if not value:
            raise ValueError("is empty; write a pattern such as '*weight_quantizer'")
        return value

    @property
    def rule(self) -> QuantizerRule:
        """The entry as a frozen rule."""
        cfgs = None if self.cfg is None else self.cfg if isinstance(self.cfg, tuple) else (self.cfg,)
        return QuantizerRule(self.quantizer_name, self.parent_class, cfgs, self.enable)


class QuantizeConfig(Config):
    """What to quantize (`quant_cfg`), and how to find the scales (`algorithm`).

    Example:
        >>> config = QuantizeConfig.parse({"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "axis": 0}}})
        >>> str(config.rules[0].cfgs[0].to_format())
        'i8[1,...]*f32'
    """

    quant_cfg: tuple[QuantizerEntry, ...] = Field(default=())
    algorithm: str | dict[str, Any] | list[Any] | None = "max"
    effective_bits: float | None = None

    @classmethod
    def parse(cls, data: Any, where: str = "") -> QuantizeConfig:
        """Read any of the three dialects. Raises ConfigError (what was seen, which key, the nearest known name)."""
        if isinstance(data, cls):
            return data
        where = where or "quantization config"
        if not isinstance(data, dict):
            raise ConfigError(f'{where}: expected a mapping with the key "quant_cfg", got {type(data).__name__}.')
        for key in data:
            if key not in _TOP_KEYS:
                raise ConfigError(
                    f'{where}: unknown key "{key}".{did_you_mean(str(key), _TOP_KEYS)} Known: {", ".join(_TOP_KEYS)}.'
                )
        if "quant_cfg" not in data:
            raise ConfigError(f'{where}: the key "quant_cfg" is missing. It holds the list (or dict) of quantizer patterns.')
        entries = tuple(_entry(raw, f"{where}, {place}") for place, raw in _listed(data["quant_cfg"], where))
        return super().parse({**data, "quant_cfg": entries}, where)

    @model_validator(mode="after")
    def _method_named(self) -> QuantizeConfig:
        steps = self.algorithm if isinstance(self.algorithm, list) else [self.algorithm]
        for step in steps:
            if step is not None and not isinstance(step, str | dict):
                raise ValueError(
                    f"algorithm must be a name, a mapping with the key 'method', a list of these, or None; got {step!r}"
                )
            if isinstance(step, dict) and "method" not in step:
                raise ValueError(f"algorithm {step} has no key 'method'")
        return self

    @property
    def rules(self) -> tuple[QuantizerRule, ...]:
        """The entries as frozen rules, in order."""
        return tuple(entry.rule for entry in self.quant_cfg)

    def to_json(self) -> dict[str, Any]:
        """Return plain data that `json.dumps` takes and `parse` reads back to an equal config."""
        data: dict[str, Any] = {"quant_cfg": [], "algorithm": self.algorithm}
        for entry in self.quant_cfg:
            item: dict[str, Any] = {"quantizer_name": entry.quantizer_name}
            if entry.parent_class is not None:
                item["parent_class"] = entry.parent_class
            if entry.cfg is not None:
                item["cfg"] = [c.to_json() for c in entry.cfg] if isinstance(entry.cfg, tuple) else entry.cfg.to_json()
            if entry.enable is not None:
                item["enable"] = entry.enable
            data["quant_cfg"].append(item)
        if self.effective_bits is not None:
            data["effective_bits"] = self.effective_bits
        return data


def _listed(quant_cfg: Any, where: str) -> list[tuple[str, Any]]:
    """Return (place, entry) pairs in NVIDIA's list dialect, from any of the three."""
    if isinstance(quant_cfg, list | tuple):
        return [(f"entry {i}", raw) for i, raw in enumerate(quant_cfg)]
    if not isinstance(quant_cfg, dict):
        raise ConfigError(f"{where}: quant_cfg must be a list of entries or a dict of patterns, got {type(quant_cfg).__name__}.")
    pairs: list[tuple[str, Any]] = []
    for pattern, value in quant_cfg.items():
        if not isinstance(pattern, str):
            raise ConfigError(f"{where}: the pattern {pattern!r} is not a string. Filter functions are not configuration.")
        place = f'pattern "{pattern}"'
        if _CLASS_NAME.match(pattern) and isinstance(value, dict) and value and all("quantizer" in k or "*" in k for k in value):
            pairs += [(f'{place}, "{k}"', {**_split(v), "quantizer_name": k, "parent_class": pattern}) for k, v in value.items()]
        else:
            pairs.append((place, {**_split(value), "quantizer_name": pattern}))
    return pairs


def _split(value: Any) -> dict[str, Any]:
    """Separate the attributes of a dict-dialect value from its `enable` switch."""
    if not isinstance(value, dict) or "enable" not in value:
        return {"cfg": value}
    rest = {k: v for k, v in value.items() if k != "enable"}
    return {"cfg": rest, "enable": value["enable"]} if rest else {"enable": value["enable"]}


def _entry(raw: Any, where: str) -> QuantizerEntry:
    if isinstance(raw, QuantizerEntry):
        return raw
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: expected a mapping, got {type(raw).__name__} ({raw!r}).")
    for key in raw:
        if key not in _ENTRY_KEYS:
            hint = did_you_mean(str(key), _ENTRY_KEYS)
            hint = hint or (' Attributes of a quantizer go under "cfg".' if key in QuantizerAttributeConfig.model_fields else "")
            raise ConfigError(f'{where}: unknown key "{key}".{hint} Known: {", ".join(_ENTRY_KEYS)}.')
    entry = dict(raw)
    cfg = entry.get("cfg")
    if cfg is None and entry.get("enable") is None:
        raise ConfigError(f'{where}: neither "cfg" nor "enable" is given, so the entry says nothing. Give one, or remove it.')
    if isinstance(cfg, list | tuple):
        if not cfg:
            raise ConfigError(f"{where}: cfg is an empty list. A SequentialQuantizer needs at least one step.")
        entry["cfg"] = tuple(QuantizerAttributeConfig.parse(c, f"{where}, step {i}") for i, c in enumerate(cfg))
    elif isinstance(cfg, dict) and "enable" in cfg:
        enable = _agreed_enable(cfg["enable"], entry.get("enable"), where)
        rest = {k: v for k, v in cfg.items() if k != "enable"}
        entry["enable"] = enable
        entry["cfg"] = QuantizerAttributeConfig.parse(rest, where) if rest else None
    elif cfg is not None:
        entry["cfg"] = QuantizerAttributeConfig.parse(cfg, where)
    return QuantizerEntry.parse(entry, where)


def _agreed_enable(inner: Any, outer: Any, where: str) -> Any:
    if outer is not None and inner != outer:
        raise ConfigError(f'{where}: "enable" is {inner} inside cfg and {outer} beside it. Keep one.')
    return inner
