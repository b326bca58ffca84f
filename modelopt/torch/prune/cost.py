"""What a model costs, as a function of the atoms that are removed from it.

    params   the number of elements of all parameters (a tied one counts once)
    memory   bytes of all parameters and buffers, in their own dtypes
    flops    2 * multiply-adds of all matrix products, convolutions and attentions of one forward pass on the dummy input

Every dimension of every operand knows its labels, so the cost after pruning is a product of live lengths: nothing is cut or run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from modelopt.core.errors import ConfigError

Live = Callable[[Any, int], int]


class Costs:
    """The costs of `model` under `axes`, without the modules named in `removed`. `flops` needs recorded operations.

    Costs(model, axes).of(frozenset(), "params") is the number of parameters of the model.
    """

    def __init__(self, model: nn.Module, axes: Any, removed: Iterable[str] = ()) -> None:
        self.axes = axes
        self.removed = tuple(f"{name}." for name in sorted(removed))
        named = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
        self.tensors = [(name, named[name]) for name in axes.parameters if not self._gone(name)]

    def _gone(self, name: str) -> bool:
        return bool(self.removed) and f"{name}.".startswith(self.removed)

    def of(self, drop: frozenset[int], name: str) -> float:
        """Return the cost called `name` (params, memory, flops) of the model without the atoms `drop`."""
        live: Live = self.axes.survivors(drop).count if drop else _whole
        if name == "flops":
            return self._flops(live)
        if name == "params":
            return float(sum(self._numel(n, t, live) for n, t in self.tensors if isinstance(t, nn.Parameter)))
        if name == "memory":
            return float(sum(self._numel(n, t, live) * t.element_size() for n, t in self.tensors))
        raise ConfigError(f'There is no cost "{name}"; known: params, memory, flops.')

    def _numel(self, name: str, tensor: Tensor, live: Live) -> int:
        return math.prod(live(a, s) for a, s in zip(self.axes.parameters[name], tensor.shape, strict=True))

    def _flops(self, live: Live) -> float:
        if not self.axes.ops:
            raise ConfigError("The cost flops needs the operations of the forward pass: infer_axes(..., record_ops=True).")
        return float(sum(_flops_of(call, live) for call in self.axes.ops if not self._gone(call.module)))


def _whole(axis: Any, size: int) -> int:
    return size


def _shape(ref: Any, live: Live) -> list[int]:
    return [live(a, s) for a, s in zip(ref.axes, ref.shape, strict=True)]


def _product(refs: list[list[int]], i: int, j: int) -> int:
    left, right = refs[i], refs[j]
    return 2 * math.prod(left) * right[-1]


def _flops_of(call: Any, live: Live) -> int:
    """Return the floating-point operations of one recorded call, 0 for those that do no products."""
    op = call.op.removeprefix("aten::").partition(".")[0]
    if op not in _RULES:
        return 0
    shapes = [_shape(ref, live) for ref in call.inputs]
    return _RULES[op](shapes, [_shape(ref, live) for ref in call.outputs])


def _convolution(ins: list[list[int]], outs: list[list[int]]) -> int:
    weight, out = ins[1], outs[0]
    # [O, I / groups, *kernel]: every output element is a sum over I / groups and the kernel.
    return 2 * math.prod(out) * math.prod(weight[1:])


def _attention(ins: list[list[int]], outs: list[list[int]]) -> int:
    query, key, value = ins[0], ins[1], ins[2]
    return 2 * math.prod(query) * key[-2] + 2 * math.prod(query[:-1]) * key[-2] * value[-1]


_RULES: dict[str, Callable[[list[list[int]], list[list[int]]], int]] = {
    "mm": lambda i, o: _product(i, 0, 1),
    "bmm": lambda i, o: _product(i, 0, 1),
    "addmm": lambda i, o: _product(i, 1, 2),
    "baddbmm": lambda i, o: _product(i, 1, 2),
    "mv": lambda i, o: 2 * math.prod(i[0]),
    "convolution": _convolution,
    "mkldnn_convolution": _convolution,
    **dict.fromkeys(
        (
            "scaled_dot_product_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_attention_math",
        ),
        _attention,
    ),
}
