"""Which families must keep the same count so that one config describes the pruned model: those of dims with one expression.

q_proj.weight dim 0 of every layer = config.num_attention_heads * config.head_dim   ->   tie the heads of all layers, and so on
"""

from __future__ import annotations

from typing import Any

from torch import nn

from modelopt.torch.trace.axes.construct import expressions
from modelopt.torch.trace.axes.expr import Where
from modelopt.torch.trace.axes.relax import Tie, family_names


def config_ties(axes: Any, model: nn.Module) -> tuple[Tie, ...]:
    """Return pairs of families that a config gives one size; none for a model that is not built from a config.

    Choosing the same count for tied families (as `axes.tied` does for the model's own code) keeps a pruned transformers model
    loadable by plain `from_pretrained`; `apply` proves it.

        >>> [t.families for t in config_ties(axes, llama)]  # doctest: +SKIP
        [('model.layers.0.mlp.down_proj.weight.1', 'model.layers.1.mlp.down_proj.weight.1'), ...]
    """
    names = family_names(axes)
    sizes = {f.name: (f.kind, f.size) for f in axes.families}
    first: dict[Any, tuple[str, ...]] = {}
    ties: dict[tuple[str, str], Tie] = {}
    for (parameter, dim), expr in expressions(model).items():
        axis = axes.parameters.get(parameter, (None,) * (dim + 1))[dim]
        members = tuple(dict.fromkeys(names[a] for a in axes.axis_atoms(axis).tolist() if a in names))
        if not members:
            continue
        other = first.setdefault(expr, members)
        if len(other) != len(members) or [sizes[n] for n in other] != [sizes[n] for n in members]:
            continue  # another structure: it cannot be kept in step by counts alone
        for pair in zip(other, members, strict=True):
            if pair[0] != pair[1]:
                ties.setdefault(pair, Tie(pair, (sizes[pair[0]][1], sizes[pair[1]][1]), Where()))
    return tuple(ties.values())
