"""What every quantized module is: an ordinary module of its own class, with quantizers as children.

A quantized class is (quantized behaviour, original class): `QuantLinear(QuantInputBase, nn.Linear)`. An instance becomes
quantized by changing its class, so parameters, ties, hooks and references stay. Where the original class is a subclass of the
registered one, the pair is built on demand by `quantized_class`, one class for each pair; such modules copy and pickle by it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from modelopt.core.errors import ConfigError
from modelopt.core.registry import TypeRegistry
from modelopt.torch.quantization.nn.modules.packed import PackedTensor
from modelopt.torch.quantization.nn.modules.tensor_quantizer import SequentialQuantizer, TensorQuantizer
from modelopt.torch.quantization.nn.modules.weight_cache import quantized_weight

Quantizer = TensorQuantizer | SequentialQuantizer


@dataclass(frozen=True)
class QuantizedTensor:
    """One weight of a quantized module and the quantizers around it.

    `tensor` is [out, in, ...] whatever the layout in memory: `transposed` says that it is a view of a parameter stored [in, out].
    `expert`: which matrix of a fused parameter it is; `interleaved`: its rows are gate, up, gate, up ... instead of two halves.
    `packed` is set where the weight is held as codes.
    """

    name: str
    tensor: Tensor
    weight_quantizer: Quantizer
    input_quantizer: Quantizer | None = None
    output_quantizer: Quantizer | None = None
    expert: int | None = None
    packed: PackedTensor | None = None
    transposed: bool = False
    interleaved: bool = False


class QuantModule(nn.Module):
    """Base of quantized modules. A subclass names its quantizers and calls them in `forward`."""

    original_class: ClassVar[type[nn.Module]] = nn.Module
    quantizer_names: ClassVar[tuple[str, ...]] = ()
    packable: ClassVar[tuple[str, ...]] = ()  # weights that `compress` may replace by codes
    counts_in_coverage: ClassVar[bool] = False  # whether its weights are Linear or expert weights

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.setup_quantizers()

    @classmethod
    def quantizers_of(cls, module: nn.Module) -> tuple[str, ...]:
        """Return the quantizers that `module` (not yet converted) would have, as attribute paths."""
        return cls.quantizer_names

    @classmethod
    def weights_of(cls, module: nn.Module) -> Iterator[tuple[str, str, Tensor, int | None]]:
        """Yield (weight quantizer, weight name, tensor, expert or None) of `module`, converted or not."""
        if "weight_quantizer" in cls.quantizer_names and isinstance(getattr(module, "weight", None), Tensor):
            yield "weight_quantizer", "weight", module.weight, None

    def setup_quantizers(self) -> None:
        """Add the quantizers that are not there yet, all disabled."""
        for name in self.quantizers_of(self):
            parent: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.ModuleList())
                parent = parent._modules[part]
            if last not in parent._modules:
                parent.add_module(last, TensorQuantizer())

    def remove_quantizers(self) -> None:
        """Remove what `setup_quantizers` added; called before the class is changed back."""
        for name in {n.split(".")[0] for n in self.quantizers_of(self)}:
            self._modules.pop(name, None)

    def quantized_tensors(self) -> Iterator[QuantizedTensor]:
        """Yield every weight with its quantizers, enabled or not. Export sees a model through this and nothing else."""
        get = self._modules.get
        for quantizer, name, tensor, expert in self.weights_of(self):
            yield QuantizedTensor(
                name,
                tensor,
                self.get_submodule(quantizer),
                get("input_quantizer"),
                get("output_quantizer"),
                expert,
                get(f"{name}_packed"),
            )

    def quantized(self, name: str = "weight", quantizer: str = "weight_quantizer") -> Tensor:
        """Return the weight `name` as the forward uses it: unpacked, or fake-quantized (cached in evaluation)."""
        packed = self._modules.get(f"{name}_packed")
        if packed is not None:
            return packed()
        return quantized_weight(self._modules[quantizer], getattr(self, name))

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if f"{name}_packed" in modules:  # other code may still ask a packed module for its weight
            return modules[f"{name}_packed"].stored()
        return super().__getattr__(name)


class QuantInputBase(QuantModule):
    """A module that quantizes its first input and, where a rule says so, its output."""

    quantizer_names = ("input_quantizer", "output_quantizer")

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Quantize the input, run the original class, quantize the output."""
        return self.output_quantizer(super().forward(self.input_quantizer(input), *args, **kwargs))


class _QuantModuleRegistry(TypeRegistry[type[QuantModule]]):
    """Classes to their quantized classes. A subclass matches its base while it does not override `forward`."""

    def quantized(self, module: nn.Module | type[nn.Module]) -> type[QuantModule] | None:
        """Return the registered quantized class for a module or a class, or None."""
        return self.match(module, accept=_same_forward)

    def get(self, cls: type[nn.Module]) -> type[QuantModule] | None:
        """Return the registered quantized class for a class, or None."""
        return self.quantized(cls)

    def exact(self, cls: type[nn.Module]) -> bool:
        """Return whether `cls` itself, not only a base of it, is registered."""
        return self._key(cls) in self._by_name

    def __contains__(self, cls: object) -> bool:
        return isinstance(cls, type) and self.quantized(cls) is not None


def _same_forward(own: type, registered: type) -> bool:
    return getattr(own, "forward", None) is getattr(registered, "forward", None)


QuantModuleRegistry = _QuantModuleRegistry("quantized module")


def quantizes(*originals: type[nn.Module]) -> Any:
    """Class decorator: register the class for `originals` and note the first as its original class."""

    def decorate(cls: type[QuantModule]) -> type[QuantModule]:
        cls.original_class = originals[0]
        for original in originals:
            QuantModuleRegistry.register(original, cls)
        return cls

    return decorate


@functools.cache
def quantized_class(base: type[QuantModule], original: type[nn.Module]) -> type[QuantModule]:
    """Return the class that is `original` with the behaviour of `base`: `base` itself for the class it was written for."""
    if base.original_class is original and issubclass(base, original):
        return base
    if issubclass(original, QuantModule):
        raise ConfigError(f"{original.__name__} is a quantized class already.")
    body = {
        "original_class": original,
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        "__reduce_ex__": lambda self, protocol: (_blank, (base, original), self.__getstate__()),
    }
    return type(f"Quant{original.__name__}", (base, original), body)


def _blank(base: type[QuantModule], original: type[nn.Module]) -> nn.Module:
    cls = quantized_class(base, original)
    return cls.__new__(cls)
