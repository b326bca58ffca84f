"""Structured pruning: whole channels, heads, experts and layers removed, and the result proved.

model, result = prune(model, "structured", {"params": "60%"}, dummy_input)
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "prune": "pruning",
    "PruningError": "pruning",
    "StructuredConfig": "config",
    "FastNASConfig": "config",
    "IMPORTANCE": "importance",
    "verify_pruning": "verify",
}

__all__ = ["IMPORTANCE", "FastNASConfig", "PruningError", "StructuredConfig", "prune", "verify_pruning"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"modelopt.torch.prune.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
