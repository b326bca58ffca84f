"""What the tests of provenance share: drop half of every family, and prove that the pruned model is the masked dense one."""

from __future__ import annotations

import copy
import random

from modelopt.torch.prune.verify import verify_pruning
from modelopt.torch.trace.axes import infer_axes


def half(axes, seed=0, ratio=0.5, names=None, width=True):
    """A random share of the atoms of each family (of those whose names contain one of `names`; without the residual stream)."""
    chance, drop = random.Random(seed), set()
    stream = max(axes.families, key=lambda f: len(f.slots), default=None)
    for family in axes.families:
        if family is stream and not width:
            continue
        count = min(int(family.size * ratio), family.size - 1)
        if count > 0 and (names is None or any(n in family.name for n in names)):
            drop |= set(chance.sample(family.atoms, count))
    return frozenset(drop)


def pruned_by_half(model, args=(), kwargs=None, **options):
    """Prune a copy by half as far as the code allows; returns (pruned, changes, axes, drop, reasons), the oracle agreeing."""
    axes = infer_axes(model, args, kwargs)
    drop, reasons = axes.relax(half(axes, **options))
    pruned = copy.deepcopy(model)
    changes = axes.apply(pruned, drop)
    report = verify_pruning(model, pruned, axes.families, dummy_input=(tuple(args), kwargs or {}), kept=axes.kept(drop))
    assert report.exact, report.message
    return pruned, changes, axes, drop, reasons
