"""Quantizers on the operands of attention, for every transformers module that computes attention through its attention interface.

    S = q_bmm_quantizer(Q) k_bmm_quantizer(K)^T        O = softmax_quantizer(softmax(S)) v_bmm_quantizer(V)

Keys and values arrive after rotary embedding and cache update, [B, H_kv, T, D]: what a cache holds. A module looks its attention
function up under `self.config._attn_implementation`. While one of its quantizers is on, the module answers with a view of its
configuration in which that name has a prefix; under the prefixed names our function is registered through transformers' own
`AttentionInterface.register`. It quantizes and calls the function that the plain name stands for. The configuration itself, the
masks that the model makes from it, and modules whose quantizers are off see nothing of this.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modelopt.core.errors import ConfigError
from modelopt.torch.calibration.data import key_tokens
from modelopt.torch.opt.surgery import original_class
from modelopt.torch.quantization.nn.modules.quant_module import QuantModule, QuantModuleRegistry

PREFIX = "modelopt|"
_INSIDE = "_modelopt_inside_attention"
_MATMULS = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__)


@dataclass(frozen=True)
class _Source:
    """Where a class looks its attention up: the interface it uses and its own eager function (None where it has none)."""

    interface: Any
    eager: Any


_SOURCES: dict[type, _Source | None] = {}


def attention_source(cls: type[nn.Module]) -> _Source | None:
    """Return where the methods of `cls` look up their attention function, or None if they never do."""
    if cls not in _SOURCES:
        _SOURCES[cls] = None if issubclass(cls, PreTrainedModel) else _find_source(cls)
    return _SOURCES[cls]


def _find_source(cls: type[nn.Module]) -> _Source | None:
    for base in cls.__mro__:
        if base is nn.Module:
            break
        for member in vars(base).values():
            function = inspect.unwrap(member) if callable(member) else None
            if not isinstance(function, FunctionType):
                continue
            names = _names_in(function.__code__)
            if "ALL_ATTENTION_FUNCTIONS" in names and "_attn_implementation" in names:
                eager = next((n for n in names if n.endswith("eager_attention_forward")), "")
                scope = function.__globals__
                return _Source(scope.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS), scope.get(eager))
    return None


def _names_in(code: CodeType) -> list[str]:
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    return [*code.co_names, *(name for c in inner for name in _names_in(c))]


class _Prefixed:
    """A configuration whose attention implementation has our prefix; everything else is the configuration's own."""

    def __init__(self, config: Any) -> None:
        self._modelopt_config = config
        self._attn_implementation = PREFIX + (config._attn_implementation or "eager")

    def __getattr__(self, name: str) -> Any:
        if name == "_modelopt_config":  # not set yet: a copy in the making
            raise AttributeError(name)
        return getattr(self._modelopt_config, name)


class QuantAttention(QuantModule):
    """An attention module with quantizers on queries, keys, values and probabilities, all off until a rule names them."""

    quantizer_names = ("q_bmm_quantizer", "k_bmm_quantizer", "v_bmm_quantizer", "softmax_quantizer")

    @property
    def config(self) -> Any:
        """The module's configuration; with our attention in it while a quantizer is on."""
        own = self.__dict__.get("config")
        if own is None or self.__dict__.get(_INSIDE) or not self._acts():
            return own
        return _Prefixed(own)

    @config.setter
    def config(self, value: Any) -> None:
        self.__dict__["config"] = value

    def _acts(self) -> bool:
        quantizers = [self._modules.get(name) for name in self.quantizer_names]
        return any(q is not None and q.is_enabled for q in quantizers)


def quantized_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Quantize [B, H, T, D] queries, keys and values and call the attention that `module` would have called."""
    source = attention_source(original_class(module))
    if source is None:
        raise ConfigError(f"{type(module).__name__} does not look its attention up in transformers' attention interface.")
    query = module.q_bmm_quantizer(query)
    with key_tokens():
        key, value = module.k_bmm_quantizer(key), module.v_bmm_quantizer(value)
    name = module.__dict__["config"]._attn_implementation or "eager"
    module.__dict__[_INSIDE] = True
    try:
        if module.softmax_quantizer.is_enabled:
            return _explicit(source, name, module, (query, key, value), args, kwargs)
        return source.interface.get_interface(name, source.eager)(module, query, key, value, *args, **kwargs)
    finally:
        module.__dict__[_INSIDE] = False


def _explicit(source: _Source, name: str, module: Any, qkv: tuple[Tensor, ...], args: Any, kwargs: dict[str, Any]) -> Any:
    """Run the model's eager attention, with its probabilities quantized on their way into the second product."""
    if source.eager is None or name not in ("eager", "sdpa"):
        raise ConfigError(
            f"softmax_quantizer of a {type(module).__name__} cannot act: probabilities exist only in eager attention, and the "
            f'implementation is "{name}". Load the model with attn_implementation="eager", or disable "*softmax_quantizer".'
        )
    mask, rest = (args[0], args[1:]) if args else (kwargs.pop("attention_mask", None), ())
    if name == "sdpa":
        mask = _additive_mask(module, mask, qkv[0], qkv[1], kwargs.get("is_causal"))
    products = _SecondProduct(module.softmax_quantizer)
    with products:
        output = source.eager(module, *qkv, mask, *rest, **kwargs)
    if products.count != 2:
        raise ConfigError(
            f"softmax_quantizer of a {type(module).__name__} cannot act: its eager attention makes {products.count} matrix "
            'products, not two. Disable "*softmax_quantizer".'
        )
    return output


def _additive_mask(module: Any, mask: Tensor | None, query: Tensor, key: Tensor, is_causal: bool | None) -> Tensor | None:
    """Say in numbers added to the scores what SDPA is told by booleans, or by `is_causal` and no mask at all."""
    if mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if not causal or query.shape[2] == 1:
            return None
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, torch.finfo(query.dtype).min)


class _SecondProduct(TorchFunctionMode):
    """Quantize the first operand of the second matrix product (the first is Q K^T)."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _MATMULS:
            self.count += 1
            if self.count == 2:
                args = (self.quantizer(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


def register_attention(classes: set[type[nn.Module]]) -> None:
    """Register a quantized class for those of `classes` that use the attention interface, and our function for each name."""
    found = [cls for cls in classes if not issubclass(cls, QuantModule) and attention_source(cls) is not None]
    for cls in found:
        if not QuantModuleRegistry.exact(cls):
            QuantModuleRegistry.register(cls, QuantAttention)
    if not found:
        return
    for name in ["eager", *ALL_ATTENTION_FUNCTIONS]:
        if not name.startswith(PREFIX) and PREFIX + name not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(PREFIX + name, quantized_attention)
