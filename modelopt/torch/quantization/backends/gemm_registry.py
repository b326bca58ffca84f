"""Which kernel multiplies which formats.

    pattern = (input, weight, output), each a format string, a dtype name, or a wildcard over them

    ("e4m3*", "i4[128]*f32", "bfloat16")

A kernel is `kernel(input, module) -> output`: it takes the unquantized input and the module with its packed weight. The
last one registered wins. Where none matches, bfloat16 outputs have `packed_gemm.packed_linear`, which quantized modules use on
a GPU; otherwise the caller dequantizes and multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from modelopt.core.errors import ConfigError
from modelopt.core.match import matches

Kernel = Callable[[Tensor, Any], Tensor]


class GEMMRegistry:
    """Patterns of (input, weight, output) types to kernels.

    >>> registry = GEMMRegistry()
    >>> registry.find_kernel("bfloat16", "i4[128]*f32", "bfloat16") is None
    True
    """

    def __init__(self) -> None:
        self._kernels: list[tuple[tuple[str, str, str], Kernel]] = []

    def __len__(self) -> int:
        return len(self._kernels)

    def register_kernel(self, pattern: Sequence[str], kernel_impl: Kernel) -> Kernel:
        """Add a kernel for a pattern of three wildcards and return it. Raises ConfigError for anything else."""
        parts = (pattern,) if isinstance(pattern, str) else tuple(pattern)
        if len(parts) != 3 or not all(isinstance(p, str) and p for p in parts):
            raise ConfigError(f"A GEMM pattern is three wildcards (input, weight, output types), got {pattern!r}.")
        if not callable(kernel_impl):
            raise ConfigError(f"A GEMM kernel is callable, got a {type(kernel_impl).__name__}.")
        self._kernels.append(((parts[0], parts[1], parts[2]), kernel_impl))
        return kernel_impl

    def unregister_kernel(self, kernel_impl: Kernel) -> None:
        """Remove every pattern of a kernel."""
        self._kernels = [(p, k) for p, k in self._kernels if k is not kernel_impl]

    def find_kernel(self, input_type: str, weight_type: str, output_type: str) -> Kernel | None:
        """Return the kernel registered last for these types, or None."""
        wanted = (input_type, weight_type, output_type)
        for pattern, kernel in reversed(self._kernels):
            if all(name == p or matches(name, p) for name, p in zip(wanted, pattern, strict=True)):
                return kernel
        return None


_registry = GEMMRegistry()


def register_kernel(pattern: Sequence[str], kernel_impl: Kernel) -> Kernel:
    """Add a kernel to the registry that quantized modules ask; see `GEMMRegistry.register_kernel`."""
    return _registry.register_kernel(pattern, kernel_impl)


def unregister_kernel(kernel_impl: Kernel) -> None:
    """Remove a kernel from the registry that quantized modules ask."""
    _registry.unregister_kernel(kernel_impl)


def find_kernel(input_type: str, weight_type: str, output_type: str) -> Kernel | None:
    """Return the kernel for these types (format strings, or dtype names such as "bfloat16"), or None.

    >>> find_kernel("bfloat16", "i4[128]*f32", "bfloat16").__name__
    'packed_linear'
    """
    found = _registry.find_kernel(input_type, weight_type, output_type)
    if found is None and output_type == "bfloat16":
        return _packed_linear()
    return found


def _packed_linear() -> Kernel:
    from modelopt.torch.quantization.backends.packed_gemm import packed_linear  # here: it needs the quantizers

    return packed_linear


def have_kernels() -> bool:
    """Return whether any kernel is registered."""
    return len(_registry) > 0
