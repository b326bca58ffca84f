"""Which kernel multiplies which formats, and which kernel serves several layers at once.

    pattern = (input, weight, output), each a format string, a dtype name, or a wildcard over them
    Chain(...)                         a linear layer, an activation [a product with a second layer], and a linear layer

    ("e4m3*", "i4[128]*f32", "bfloat16")

A kernel of a layer is `kernel(input, module) -> output`: it takes the unquantized input and the module with its packed weight. A
kernel of a chain is `kernel(input, layers) -> output`. The last one registered wins. Where none matches, bfloat16 outputs have
`packed_gemm.packed_linear`, which quantized modules use on a GPU; otherwise the caller dequantizes and multiplies.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from modelopt.core.errors import ConfigError
from modelopt.core.match import matches

Kernel = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Chain:
    """Linear, activation, Linear: as a pattern (wildcards), or as what `backends.fuse` found in a graph (names).

    activation: "relu", "gelu", "gelu_tanh" or "silu"; gated: "yes" where the activation multiplies the output of another linear
    layer; input, weight, hidden and output: what the first layer reads, all layers hold, the last layer reads and gives back.
    """

    activation: str = "*"
    gated: str = "*"
    input: str = "*"
    weight: str = "*"
    hidden: str = "*"
    output: str = "*"

    def takes(self, found: Chain) -> bool:
        """Return whether `found` is an instance of this pattern."""
        pairs = [(getattr(found, f.name), getattr(self, f.name)) for f in fields(self)]
        return all(name == p or matches(name, p) for name, p in pairs)


class GEMMRegistry:
    """Patterns of (input, weight, output) types, and of chains of layers, to kernels.

    >>> registry = GEMMRegistry()
    >>> registry.find_kernel("bfloat16", "i4[128]*f32", "bfloat16") is None
    True
    """

    def __init__(self) -> None:
        self._kernels: list[tuple[tuple[str, str, str], Kernel]] = []
        self._chains: list[tuple[Chain, Kernel | str]] = []

    def __len__(self) -> int:
        return len(self._kernels)

    def register_kernel(self, pattern: Sequence[str] | Chain, kernel_impl: Kernel | str) -> Kernel | str:
        """Add a kernel for a pattern and return it. That of a chain may be "package.module:name", imported when it is found.

        Raises ConfigError for anything else than three wildcards or a Chain, and for what cannot be called.
        """
        if isinstance(pattern, Chain):
            if not callable(kernel_impl) and not (isinstance(kernel_impl, str) and ":" in kernel_impl):
                raise ConfigError(f'The kernel of a chain is callable or "package.module:name", got {kernel_impl!r}.')
            self._chains.append((pattern, kernel_impl))
            return kernel_impl
        parts = (pattern,) if isinstance(pattern, str) else tuple(pattern)
        if len(parts) != 3 or not all(isinstance(p, str) and p for p in parts):
            raise ConfigError(f"A GEMM pattern is three wildcards (input, weight, output types) or a Chain, got {pattern!r}.")
        if isinstance(kernel_impl, str) or not callable(kernel_impl):
            raise ConfigError(f"A GEMM kernel is callable, got a {type(kernel_impl).__name__}.")
        self._kernels.append(((parts[0], parts[1], parts[2]), kernel_impl))
        return kernel_impl

    def unregister_kernel(self, kernel_impl: Kernel | str) -> None:
        """Remove every pattern of a kernel."""
        self._kernels = [(p, k) for p, k in self._kernels if k is not kernel_impl]
        self._chains = [(p, k) for p, k in self._chains if k is not kernel_impl]

    def find_kernel(self, input_type: str, weight_type: str, output_type: str) -> Kernel | None:
        """Return the kernel registered last for these types, or None."""
        wanted = (input_type, weight_type, output_type)
        for pattern, kernel in reversed(self._kernels):
            if all(name == p or matches(name, p) for name, p in zip(wanted, pattern, strict=True)):
                return kernel
        return None

    def find_chain(self, found: Chain) -> Kernel | None:
        """Return the kernel registered last for a chain of layers, or None."""
        for pattern, kernel in reversed(self._chains):
            if pattern.takes(found):
                if not isinstance(kernel, str):
                    return kernel
                module, _, name = kernel.partition(":")
                target: Kernel = getattr(importlib.import_module(module), name)
                return target
        return None


_registry = GEMMRegistry()
_registry.register_kernel(
    Chain(input="e4m3*", weight="e4m3*", hidden="e4m3[...]*f32", output="bfloat16"),
    "modelopt.torch.quantization.backends.fp8_mlp:fp8_mlp",
)


def register_kernel(pattern: Sequence[str] | Chain, kernel_impl: Kernel | str) -> Kernel | str:
    """Add a kernel to the registry that quantized modules and `fuse` ask; see `GEMMRegistry.register_kernel`."""
    return _registry.register_kernel(pattern, kernel_impl)


def unregister_kernel(kernel_impl: Kernel | str) -> None:
    """Remove a kernel from the registry that quantized modules and `fuse` ask."""
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


def find_chain(found: Chain) -> Kernel | None:
    """Return the kernel for a chain of layers, or None.

    >>> static = "e4m3[...]*f32"
    >>> find_chain(Chain("gelu", "no", static, static, static, "bfloat16")).__name__
    'fp8_mlp'
    """
    return _registry.find_chain(found)


def _packed_linear() -> Kernel:
    from modelopt.torch.quantization.backends.packed_gemm import packed_linear  # here: it needs the quantizers

    return packed_linear


def have_kernels() -> bool:
    """Return whether any kernel of single layers is registered."""
    return len(_registry) > 0
