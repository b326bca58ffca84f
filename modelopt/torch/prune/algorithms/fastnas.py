"""FastNAS: prune each family as far as its measured sensitivity allows.

For every family and every candidate size the score of the model with only that family pruned is measured; the loss of score,
made monotone, is the sensitivity s(family, size). For a threshold T every family takes its smallest size with s <= T, and the
smallest T that meets the constraints is found by halving. Source: NVIDIA Model Optimizer's documentation of its mode "fastnas".
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from modelopt.core.config import load_json
from modelopt.core.errors import ConfigError
from modelopt.core.files import staged_file
from modelopt.torch.prune.choose import Group, drop_of
from modelopt.torch.prune.cost import Costs
from modelopt.torch.prune.importance import score_families
from modelopt.torch.prune.pruning import Plan, Task, copied, finish, groups_of, limits_of

Score = Callable[[nn.Module], float]


def candidates(group: Group, ratios: Sequence[float]) -> tuple[int, ...]:
    """Return the sizes to try, ascending, the full size last. `ratios`: shares of the full size that may remain."""
    return tuple(sorted({group.at_least(r * group.size) for r in ratios} | {group.size}))


def sensitivity(
    groups: Sequence[Group],
    ratios: Sequence[float],
    score: Callable[[frozenset[int]], float],
    known: dict[str, dict[str, float]] | None = None,
    on_score: Callable[[dict[str, dict[str, float]]], None] | None = None,
) -> list[dict[int, float]]:
    """Return for each group {size: loss of score}, 0 at full size and not decreasing as the size falls.

    `score(drop)`: the quality of the model without the atoms `drop`, higher is better. `known` holds scores of an earlier run,
    by the group's first family and size; `on_score` is called after each new one, so that a killed search can go on.
    """
    known = {} if known is None else known
    full = known.setdefault("", {}).get("full")
    if full is None:
        full = known[""]["full"] = score(frozenset())
    table = []
    for group in groups:
        rows, losses = known.setdefault(group.names[0], {}), {group.size: 0.0}
        worst = 0.0
        for size in reversed(candidates(group, ratios)[:-1]):
            if str(size) not in rows:
                rows[str(size)] = score(drop_of([group], {0: size}))
                if on_score is not None:
                    on_score(known)
            worst = max(worst, full - rows[str(size)])
            losses[size] = worst
        table.append(losses)
    return table


def search(
    groups: Sequence[Group],
    table: Sequence[Mapping[int, float]],
    limits: Mapping[str, float],
    cost: Callable[[frozenset[int], str], float],
) -> frozenset[int]:
    """Return the atoms to remove at the smallest threshold that meets every limit. Raises ConfigError if none does."""
    levels = np.unique([loss for losses in table for loss in losses.values()])

    def at(level: float) -> frozenset[int]:
        return drop_of(groups, {i: min(k for k, loss in losses.items() if loss <= level) for i, losses in enumerate(table)})

    def fits(level: float) -> bool:
        return all(cost(at(level), name) <= limit for name, limit in limits.items())

    if not fits(levels[-1]):
        name = next(n for n, limit in limits.items() if cost(at(levels[-1]), n) > limit)
        raise ConfigError(
            f"The constraint {name} <= {limits[name]:.4g} cannot be met: the smallest candidate sizes leave "
            f"{cost(at(levels[-1]), name):.4g}. Raise the limit, or add smaller shares to channels_ratio."
        )
    low, high = -1, len(levels) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(levels[middle]) else (middle, high)
    return at(levels[high])


def plan_fastnas(task: Task, score_func: Score | None, checkpoint: str | Path | None = None) -> Plan:
    """Decide what to remove by measuring `score_func(model)`, higher is better, on copies of the model.

    `checkpoint`: a JSON file that holds the measured scores; a killed search goes on from it. Raises ConfigError without a
    score or a constraint, or where the constraint cannot be met.
    """
    config: Any = task.config
    if score_func is None:
        raise ConfigError(
            '"fastnas" measures the model: pass config={"score_func": f}, where f(model) is a number, higher is better.'
        )
    if not config.constraints:
        raise ConfigError('"fastnas" searches for a cost: pass constraints such as {"flops": "60%"}.')
    config = config.model_copy(update={"multiple_of": config.channel_divisor, "max_ratio": 1 - min(config.channels_ratio)})
    task = Task(task.model, task.axes, task.inputs, config, task.data)
    groups = groups_of(task, score_families(task.model, task.axes, config.importance, task.data))
    path = None if checkpoint is None else Path(checkpoint)
    known = load_json(path) if path is not None and path.is_file() else {}

    def score(drop: frozenset[int]) -> float:
        trial = task.model
        if drop:
            trial = copied(task.model)
            task.axes.apply(trial, task.axes.relax(drop)[0])
        value = float(score_func(trial))
        if not math.isfinite(value):
            raise ConfigError(f"score_func gave {value} for the model without {len(drop)} slices; it must be a finite number.")
        return value

    def keep(scores: dict[str, dict[str, float]]) -> None:
        if path is not None:
            with staged_file(path, overwrite=True) as stage:
                stage.write_text(json.dumps(scores), encoding="utf-8")

    table = sensitivity(groups, config.channels_ratio, score, known, keep)
    costs = Costs(task.model, task.axes)
    drop, reasons = task.axes.relax(search(groups, table, limits_of(task, costs), costs.of))
    return finish(task, costs, frozenset(drop), tuple(reasons))
