"""Kernels that multiply packed weights, the registry in which they are found, and the fusion of layers that a graph shows."""

from __future__ import annotations

import importlib
from typing import Any

from modelopt.torch.quantization.backends.gemm_registry import Chain, GEMMRegistry, find_chain, find_kernel, register_kernel

__all__ = ["Chain", "Fusions", "GEMMRegistry", "explain", "find_chain", "find_kernel", "fuse", "register_kernel"]

_LATER = {"fuse": "fusion", "Fusions": "fusion", "explain": "packed_gemm"}  # they need the quantized modules, which need this


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
