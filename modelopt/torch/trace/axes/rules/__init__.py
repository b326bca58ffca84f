"""ATen rules by op family. Importing this package registers them all; `rule_for` finds the one of an op."""

from __future__ import annotations

from typing import Any

import torch

from modelopt.torch.trace.axes.rules import (
    attention,
    contraction,
    convolution,
    factories,
    fourier,
    indexing,
    normalization,
    pointwise,
    pooling,
    recurrent,
    reduction,
    scatter,
    views,
)
from modelopt.torch.trace.axes.rules.registry import RULES, Rule, register_module_rule, register_rule

__all__ = [
    "attention",
    "contraction",
    "convolution",
    "factories",
    "fourier",
    "indexing",
    "normalization",
    "pointwise",
    "pooling",
    "recurrent",
    "reduction",
    "register_module_rule",
    "register_rule",
    "rule_for",
    "scatter",
    "views",
]


def rule_for(func: Any) -> tuple[str, Rule | None]:
    """The name of an op and its rule: by overload, by name, by the op that it does in place, by torch's pointwise tag."""
    name = str(func._schema.name)
    base = name.rstrip("_")
    for key in (f"{name}.{func._overloadname}", name, f"{base}.{func._overloadname}", base, base.removesuffix("_copy")):
        if key in RULES:
            return name, RULES.get(key)
    return name, pointwise.elementwise if _is_pointwise(func, base) else None


def _is_pointwise(func: Any, base: str) -> bool:
    """Whether torch says so of the op, or of the one that it does in place."""
    if torch.Tag.pointwise in func.tags:
        return True
    space, _, short = base.partition("::")
    packet = getattr(getattr(torch.ops, space), short, None)
    return packet is not None and any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())
