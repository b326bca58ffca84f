"""The eye of the library: graphs, symbols and axis families of any model, from its own forward pass.

Names are imported from their files when first asked for, so that this package costs little to import.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "tracer": "recursive_trace GraphCollection RobustTracer",
    "symbols": "Symbol SymInfo SymMap",
    "dependencies": "GraphDependencyProcessor NodeProcessor Map",
    "analyzer": "analyze_symbols Analyzer",
    "axes": "Axes Family infer_axes",
    "sharing": "shared_inputs",
    "equalization": "equalization_pairs EqualizationPair",
    "rotation": "rotation_axes RotationAxis",
}
_NAMES = {name: module for module, names in _WHERE.items() for name in names.split()}
_SUBMODULES = ("axes", "inputs", "modules", "plugins", "tracer")

__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES, *_SUBMODULES})
