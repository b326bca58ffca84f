"""Quantizers, quantized modules and the cache of their weights. Names are found in `nn.modules` when first asked for."""

from __future__ import annotations

import importlib
from typing import Any

_CACHE = ("set_weight_cache_budget", "clear_weight_cache", "weight_cache_bytes")


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    module = importlib.import_module(f"{__name__}.modules{'.weight_cache' if name in _CACHE else ''}")
    if not hasattr(module, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*importlib.import_module(f"{__name__}.modules").__all__, *_CACHE])
