"""Kernels that multiply packed weights, and the registry in which they are found."""

from __future__ import annotations

from modelopt.torch.quantization.backends.gemm_registry import GEMMRegistry, find_kernel, register_kernel

__all__ = ["GEMMRegistry", "find_kernel", "register_kernel"]
