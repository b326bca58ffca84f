"""PyTorch techniques. A subpackage is imported when it is first touched (PEP 562): `import modelopt.torch` costs nothing."""

from __future__ import annotations

import importlib
from types import ModuleType

_SUBPACKAGES = ("calibration", "export", "kernels", "opt", "prune", "quantization", "trace", "utils")


def __getattr__(name: str) -> ModuleType:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its subpackages are {', '.join(_SUBPACKAGES)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBPACKAGES})
