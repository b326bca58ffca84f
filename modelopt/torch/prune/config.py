"""Configuration of structured pruning: which families, by how much or to what cost, ranked by what.

ratio        share of a family that goes away, in (0, 1): one number, or rules {pattern: share} over kinds and names of
             families; the last match wins, "default" is the weakest. "layers" and "experts" are pruned only where named.
constraints  what may remain: {"params" | "flops" | "memory": "60%" or a number}; memory is in bytes
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import field_validator, model_validator

from modelopt.core.config import Config
from modelopt.core.errors import ConfigError, did_you_mean
from modelopt.core.match import DEFAULT, Rules, matches

COSTS = ("params", "flops", "memory")
LIFTS = ("qk", "experts")
NAMED_ONLY = ("layers", "experts")
_PERCENT = re.compile(r"\s*([0-9.]+)\s*%\s*")


class StructuredConfig(Config):
    """How to prune; every field is saved in the model's history.

    `importance`: a name of `modelopt.torch.prune.importance.IMPORTANCE`. `ranking`: "local" removes the same share of every
    family, "global" compares all atoms. `multiple_of`: what the surviving size of a family is a multiple of (a number, or
    rules). `max_ratio`: the largest share that a global ranking or a constraint may take from one family. `exclude`: patterns of
    families, or of parameters, that stay. `lift`: dimensions kept by default that may go too ("qk": the width of the product
    of queries and keys). `verify`: prove the result by the oracle (None: up to 100 million parameters).
    """

    ratio: float | dict[str, float] | None = None
    constraints: dict[str, float | str] = {}
    importance: str = "l2"
    ranking: Literal["local", "global"] = "local"
    multiple_of: int | dict[str, int] = 1
    max_ratio: float = 0.9
    exclude: tuple[str, ...] = ()
    lift: tuple[str, ...] = ()
    seed: int = 0
    verify: bool | None = None

    @field_validator("ratio", "max_ratio")
    @classmethod
    def _share(cls, value: Any) -> Any:
        for share in value.values() if isinstance(value, dict) else [value]:
            if share is not None and not 0 < share < 1:
                raise ValueError(f"a share lies between 0 and 1, both excluded; seen: {share}")
        return value

    @field_validator("multiple_of")
    @classmethod
    def _multiple(cls, value: Any) -> Any:
        for number in value.values() if isinstance(value, dict) else [value]:
            if number < 1:
                raise ValueError(f"a multiple is 1 or more; seen: {number}")
        return value

    @field_validator("constraints", mode="before")
    @classmethod
    def _limits(cls, value: Any) -> Any:
        for name, limit in value.items() if isinstance(value, dict) else ():
            if isinstance(limit, bool) or not isinstance(limit, int | float | str):
                raise ValueError(f'{name} is {limit!r}; write a share such as "60%", or a number')
            if name not in COSTS:
                raise ValueError(f'"{name}" is no cost.{did_you_mean(name, COSTS)} Known: {", ".join(COSTS)}')
            read_limit(name, limit, 1.0)
        return value

    @field_validator("lift")
    @classmethod
    def _lifts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in LIFTS:
                raise ValueError(f'"{name}" cannot be lifted.{did_you_mean(name, LIFTS)} Known: {", ".join(LIFTS)}')
        return value

    def share_of(self, name: str, kind: str) -> float | None:
        """Return the share of the family that goes away, or None where no rule speaks of it."""
        if not isinstance(self.ratio, dict):
            return None if kind in NAMED_ONLY else self.ratio
        return _resolve(self.ratio, name, kind)

    def excludes(self, family: Any) -> bool:
        """Return whether the family must stay as it is: a pattern names it, its kind, or any parameter in which it lives."""
        names = [family.name, *dict.fromkeys(slot.parameter for slot in family.slots)]
        return any(_speaks_of(pattern, name, family.kind) for pattern in self.exclude for name in names)

    def multiple(self, name: str, kind: str) -> int:
        """Return what the surviving size of the family is a multiple of."""
        if not isinstance(self.multiple_of, dict):
            return 1 if kind in (*NAMED_ONLY, "heads", "kv_heads", "groups") else self.multiple_of
        return _resolve(self.multiple_of, name, kind) or 1

    @property
    def lifts(self) -> frozenset[str]:
        """Names of what is kept by default and may go here: `lift`, and what `ratio` names."""
        named = self.ratio if isinstance(self.ratio, dict) else ()
        return frozenset(self.lift) | {kind for kind in NAMED_ONLY if kind in named}


def _speaks_of(pattern: str, name: str, kind: str) -> bool:
    return pattern == kind or matches(name, pattern)


def _resolve(rules: dict[str, Any], name: str, kind: str) -> Any:
    found = None
    for rule in Rules.of(list(rules.items())).ordered():
        if kind in NAMED_ONLY and rule.pattern not in (kind, name):
            continue
        if rule.pattern == DEFAULT or _speaks_of(rule.pattern, name, kind):
            found = rule.value
    return found


def read_limit(name: str, limit: float | str, full: float) -> float:
    """Return a limit as a number in the unit of the cost; "60%" is that share of `full`. Raises ConfigError.

    >>> read_limit("params", "60%", 200.0)
    120.0
    """
    if isinstance(limit, str):
        match = _PERCENT.fullmatch(limit)
        if match is None or not 0 < float(match.group(1)) < 100:
            raise ConfigError(f'The constraint {name} is "{limit}"; write a share such as "60%", or a number.')
        return full * float(match.group(1)) / 100.0
    if not limit > 0:
        raise ConfigError(f"The constraint {name} is {limit}; it must be above 0.")
    return float(limit)


class FastNASConfig(StructuredConfig):
    """A search by measured sensitivity: sizes to try, as shares of the full size that remain.

    `channels_ratio`: the shares. `channel_divisor`: what surviving sizes are multiples of. NVIDIA's rules per module type
    ({"nn.Conv2d": {"*": {"channels_ratio": ..., "channel_divisor": ...}}}) are read too; all types then share the widest set.
    """

    channels_ratio: tuple[float, ...] = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
    channel_divisor: int = 8

    @model_validator(mode="before")
    @classmethod
    def _types(cls, data: Any) -> Any:
        rules = {k: v for k, v in data.items() if k.startswith(("nn.", "torch.nn."))} if isinstance(data, dict) else {}
        if not rules:
            return data
        ratios: set[float] = set()
        divisors: set[int] = set()
        for name, patterns in rules.items():
            for pattern, fields in (patterns or {}).items():
                for key, value in (fields or {}).items():
                    if key.endswith("_ratio"):
                        ratios.update(v for v in value if v < 1)
                    elif key.endswith("_divisor"):
                        divisors.add(value)
                    elif key != "kernel_size":
                        raise ValueError(f'{name}["{pattern}"] has the key "{key}"; known: *_ratio, *_divisor')
        read = {k: v for k, v in data.items() if k not in rules}
        read |= {"channels_ratio": tuple(sorted(ratios))} if ratios else {}
        return read | ({"channel_divisor": max(divisors)} if divisors else {})
