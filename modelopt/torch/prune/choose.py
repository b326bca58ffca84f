"""How many atoms of each family stay, and which: by share, or by a limit on what the model costs.

A *group* is a set of families that must keep the same number (the parts of one split, the gates of one layer). The number that a
group keeps is a multiple of what was asked for, or all of it. With one dial t in [0, 1] for all groups,

    local   keep(t) = size - t * share * size          the same share of every family
    global  keep(t) = number of atoms that are not among the share t of all atoms with the lowest scores

the cost falls as t grows, and the smallest t that meets every limit is found by halving. Scores are divided by their mean over
the family before they are compared across families.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelopt.core.errors import ConfigError, did_you_mean
from modelopt.core.match import matches
from modelopt.torch.prune.config import StructuredConfig

_STEPS = 24


@dataclass(frozen=True)
class Group:
    """Families that keep the same number: `keep` atoms out of `size`, each family its own best ones.

    `order[i]`: the atoms of family i, the least important first. `score[j]`: the sum over families of the j-th lowest
    normalised score, a non-decreasing sequence. `choices`: the numbers that may stay, ascending, `size` last.
    """

    names: tuple[str, ...]
    size: int
    order: tuple[np.ndarray, ...]
    score: np.ndarray
    choices: tuple[int, ...]
    share: float | None

    def at_least(self, keep: float) -> int:
        """Return the smallest choice that is not below `keep`."""
        return next((c for c in self.choices if c >= keep - 1e-9), self.size)

    def dropped(self, keep: int) -> list[int]:
        """Return the atoms that go when `keep` stay."""
        return [int(a) for order in self.order for a in order[: self.size - keep]]


def make_groups(axes: Any, scores: Mapping[str, np.ndarray], config: StructuredConfig) -> list[Group]:
    """Gather the families that the configuration speaks of into groups.

    `scores[family]`: [size] importance of each atom, higher is better. A family may say the least that it needs
    (`least`: the experts that a router picks). Raises ConfigError for a rule that matches no family.
    """
    _check_rules(config, axes.families)
    together: dict[str, list[Any]] = {}
    roots = _tied_roots(axes)
    for family in axes.families:
        together.setdefault(roots[family.name], []).append(family)
    made = (_group(members, scores, config) for members in together.values())
    return [group for group in made if group is not None]


def _tied_roots(axes: Any) -> dict[str, str]:
    """Return for each family the first one of those of its size whose number one line of code binds to its own."""
    sizes = {f.name: f.size for f in axes.families}
    roots = {name: name for name in sizes}

    def find(name: str) -> str:
        while roots[name] != name:
            name = roots[name]
        return name

    order = {name: i for i, name in enumerate(sizes)}
    for tie in axes.tied:
        a, b = (find(n) for n in tie.families)
        if sizes[a] == sizes[b] and tie.ratios[0] == tie.ratios[1]:
            first, second = sorted((a, b), key=order.__getitem__)
            roots[second] = first
    return {name: find(name) for name in sizes}


def _group(members: Sequence[Any], scores: Any, config: StructuredConfig) -> Group | None:
    size = members[0].size
    if any(f.size != size for f in members) or any(config.excludes(f) for f in members):
        return None
    shares = [s for f in members if (s := config.share_of(f.name, f.kind)) is not None]
    if config.ratio is not None and not shares:
        return None
    multiple = int(np.lcm.reduce([config.multiple(f.name, f.kind) for f in members]))
    share = min(shares) if shares else None
    floor = max(f.least for f in members)
    if share is None or config.ranking == "global":
        floor = max(floor, int(np.ceil(size * (1 - config.max_ratio) - 1e-9)))
    choices = tuple(k for k in range(multiple, size, multiple) if k >= floor)
    order, sums = [], np.zeros(size)
    for family in members:
        score = np.asarray(scores[family.name], dtype=np.float64)
        rank = np.lexsort((np.arange(size), score))
        mean = score.mean()
        order.append(np.asarray(family.atoms)[rank])
        sums += score[rank] / (mean if mean > 0 else 1.0)
    return Group(tuple(f.name for f in members), size, tuple(order), sums / len(members), (*choices, size), share)


def _check_rules(config: StructuredConfig, families: Sequence[Any]) -> None:
    patterns = [*(config.ratio if isinstance(config.ratio, dict) else ())]
    patterns += list(config.multiple_of) if isinstance(config.multiple_of, dict) else []
    kinds = sorted({f.kind for f in families})
    parameters = {slot.parameter for f in families for slot in f.slots}
    for pattern in [*patterns, *config.exclude]:
        if pattern in ("default", "layers") or (pattern in config.exclude and any(matches(p, pattern) for p in parameters)):
            continue
        if not any(pattern == f.kind or matches(f.name, pattern) for f in families):
            names = [*kinds, *(f.name for f in families)]
            raise ConfigError(
                f'No family of dimensions matches "{pattern}".{did_you_mean(pattern, names)} Kinds in this model: '
                f"{', '.join(kinds) or 'none'}; {len(families)} families, the first: {', '.join(f.name for f in families[:5])}."
            )


def by_share(groups: Sequence[Group], t: float = 1.0) -> dict[int, int]:
    """Return {index of the group: number that stays} where each group loses `t` times its share."""
    return {i: g.at_least(g.size * (1 - t * (g.share if g.share is not None else 1.0))) for i, g in enumerate(groups)}


def by_rank(groups: Sequence[Group], order: np.ndarray, count: int) -> dict[int, int]:
    """Return {index of the group: number that stays} where the `count` least important atoms of all groups go.

    `order`: the group of each atom, the least important atom first; ties are in the order of groups and positions.
    """
    gone = np.bincount(order[:count], minlength=len(groups))
    return {i: g.at_least(g.size - int(gone[i])) for i, g in enumerate(groups)}


def drop_of(groups: Sequence[Group], keep: Mapping[int, int]) -> frozenset[int]:
    """Return all atoms that go."""
    return frozenset(a for i, g in enumerate(groups) for a in g.dropped(keep[i]))


def choose(
    groups: Sequence[Group], config: StructuredConfig, cost: Callable[[frozenset[int], str], float], limits: Mapping[str, float]
) -> frozenset[int]:
    """Return the atoms to remove, such that every cost is at or below its limit.

    `cost(drop, name)` is the cost of the model without the atoms `drop`. Raises ConfigError for a limit that cannot be
    met, with the least that can.
    """
    dial = _dial(groups, config)
    if not limits:
        return drop_of(groups, dial(1.0))
    check_reachable(limits, {name: cost(drop_of(groups, dial(1.0)), name) for name in limits}, config)
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        drop = drop_of(groups, dial(middle))
        fits = all(cost(drop, name) <= limit for name, limit in limits.items())
        low, high = (low, middle) if fits else (middle, high)
    return drop_of(groups, dial(high))


def _dial(groups: Sequence[Group], config: StructuredConfig) -> Callable[[float], dict[int, int]]:
    if config.ranking == "local":
        return lambda t: by_share(groups, t)
    scores = np.concatenate([g.score for g in groups]) if groups else np.zeros(0)
    owners = np.repeat(np.arange(len(groups)), [g.size for g in groups])
    order = owners[np.argsort(scores, kind="stable")]
    share = config.ratio if isinstance(config.ratio, float) and not config.constraints else 1.0
    return lambda t: by_rank(groups, order, int(round(t * share * len(order))))


def check_reachable(limits: Mapping[str, float], least: Mapping[str, float], config: StructuredConfig) -> None:
    """Raise ConfigError where the least cost that the rules allow is above its limit."""
    for name, limit in limits.items():
        if least[name] > limit:
            raise ConfigError(
                f"The constraint {name} <= {limit:.4g} cannot be met: with these rules the least is {least[name]:.4g}. Raise the "
                f"limit, raise max_ratio (now {config.max_ratio}) or the ratios, lower multiple_of, or allow more kinds of "
                "families."
            )
