"""What the tests of the rules share: prune half of every family, prove it against the masked dense model and by permutation."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from modelopt.torch.prune.verify import VerifyReport, verify_pruning
from modelopt.torch.trace.axes import infer_axes
from modelopt.torch.trace.axes.families import Axes


class Body(nn.Module):
    """A model made of a function of (self, x), some modules and some attributes."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self, *inputs)


def halves(axes: Axes, seed: int = 0, ratio: float = 0.5) -> set[int]:
    """Random atoms of every family."""
    chosen = random.Random(seed)
    return {a for f in axes.families for a in chosen.sample(f.atoms, int(f.size * ratio))}


def prune_half(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    seed: int = 0,
    lift: frozenset[str] = frozenset(),
) -> tuple[Axes, VerifyReport]:
    """Trace, cut half of every family, prove; returns the axes and the verdict."""
    model = model.double().eval()
    axes = infer_axes(model, args, kwargs or {}, lift=lift)
    drop, _ = axes.relax(halves(axes, seed))
    pruned = copy.deepcopy(model)
    axes.apply(pruned, drop)
    families = [f for f in axes.families if f.size > 1]
    report = verify_pruning(model, pruned, families, dummy_input=(args, kwargs or {}), kept=axes.kept(drop))
    return axes, report
