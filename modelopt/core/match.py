"""One wildcard law for every technique: rules are ordered, the last match wins, `"default"` is always the weakest.

Patterns are shell wildcards (`*`, `?`, `[seq]`) over full dotted names, matched with case.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from modelopt.core.errors import nearest as _nearest

T = TypeVar("T")

DEFAULT = "default"


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(pattern))


def matches(name: str, pattern: str) -> bool:
    """Return whether the full dotted `name` matches the wildcard `pattern`.

    >>> matches("model.layers.0.mlp.up_proj", "*mlp*")
    True
    """
    return _compiled(pattern).match(name) is not None


@dataclass(frozen=True)
class Rule(Generic[T]):
    """A pattern and what it means."""

    pattern: str
    value: T


@dataclass(frozen=True)
class Rules(Generic[T]):
    """An ordered list of rules."""

    rules: tuple[Rule[T], ...]

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, T]]) -> Rules[T]:
        """Build rules from (pattern, value) pairs."""
        return cls(tuple(Rule(p, v) for p, v in pairs))

    def ordered(self) -> Iterator[Rule[T]]:
        """Yield the rules from the weakest to the strongest: every `"default"` first, then as written."""
        yield from (r for r in self.rules if r.pattern == DEFAULT)
        yield from (r for r in self.rules if r.pattern != DEFAULT)

    def matching(self, name: str) -> list[T]:
        """Return the values of all rules that match `name`, the weakest first."""
        return [r.value for r in self.ordered() if r.pattern == DEFAULT or matches(name, r.pattern)]

    def resolve(self, name: str) -> T | None:
        """Return the value of the strongest rule that matches `name`, or None."""
        found = self.matching(name)
        return found[-1] if found else None

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Return the patterns (other than `"default"`) that match none of `names`."""
        pool = list(names)
        wanted = {r.pattern for r in self.rules if r.pattern != DEFAULT}
        return [p for p in dict.fromkeys(r.pattern for r in self.rules) if p in wanted and not any(matches(n, p) for n in pool)]


def nearest_names(pattern: str, names: Iterable[str], n: int = 3) -> list[str]:
    """Return the names nearest to a pattern that matched nothing, for a warning.

    The wildcards are dropped and the rest is compared with the last parts of each name, so that `*lm_haed*` finds `lm_head`.
    """
    core = re.sub(r"[*?\[\]]", "", pattern).strip(".")
    pool = list(names)
    tails: dict[str, str] = {}
    for name in pool:
        parts = name.split(".")
        for k in range(1, min(len(parts), 4) + 1):
            tails.setdefault(".".join(parts[-k:]), name)
            tails.setdefault(parts[-k], parts[-k])
    return _nearest(core, tails, n=n)
