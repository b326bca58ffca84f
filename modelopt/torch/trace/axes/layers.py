"""The int attributes of torch's own layers as functions of the shapes of their parameters: `in_features = weight.shape[1]`, ...

They are solved like everything else a model's code computes, so a layer's repr, its checks and its export agree with its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from modelopt.torch.trace.axes.expr import Attr, Equation
from modelopt.torch.trace.axes.record import parameters_of


class Standard(NamedTuple):
    """`attr = times * shape[dim] of parameter`; `times` is another attribute of the layer or a number."""

    attr: Attr
    parameter: str
    dim: int
    times: Attr | int = 1


Row = tuple[str, str, int, str | int]  # attribute (with [k] for an element), parameter, dim, times


def _linear(module: Any) -> Iterator[Row]:
    yield "out_features", "weight", 0, 1
    yield "in_features", "weight", 1, 1


def _bilinear(module: Any) -> Iterator[Row]:
    yield "out_features", "weight", 0, 1
    yield "in1_features", "weight", 1, 1
    yield "in2_features", "weight", 2, 1


def _conv(module: Any) -> Iterator[Row]:
    out_dim, in_dim = (1, 0) if module.transposed else (0, 1)
    groups: str | int = "groups" if module.groups > 1 else 1
    yield "out_channels", "weight", out_dim, groups if module.transposed else 1
    yield "in_channels", "weight", in_dim, 1 if module.transposed else groups


def _batch_norm(module: Any) -> Iterator[Row]:
    yield "num_features", "weight", 0, 1
    yield "num_features", "running_mean", 0, 1


def _group_norm(module: Any) -> Iterator[Row]:
    yield "num_channels", "weight", 0, 1


def _normalized(module: Any) -> Iterator[Row]:
    for k in range(len(module.normalized_shape)):
        yield f"normalized_shape[{k}]", "weight", k, 1


def _embedding(module: Any) -> Iterator[Row]:
    yield "num_embeddings", "weight", 0, 1
    yield "embedding_dim", "weight", 1, 1


def _attention(module: Any) -> Iterator[Row]:
    yield "embed_dim", "out_proj.weight", 1, 1
    yield "kdim", "k_proj_weight", 1, 1
    yield "vdim", "v_proj_weight", 1, 1
    if module._qkv_same_embed_dim:
        yield "kdim", "in_proj_weight", 1, 1
        yield "vdim", "in_proj_weight", 1, 1


def _rnn(module: Any) -> Iterator[Row]:
    yield "input_size", "weight_ih_l0", 1, 1
    yield "proj_size", "weight_hr_l0", 0, 1
    if not module.proj_size:
        yield "hidden_size", "weight_hh_l0", 1, 1
    else:
        yield "hidden_size", "weight_hr_l0", 1, 1


def _rnn_cell(module: Any) -> Iterator[Row]:
    yield "input_size", "weight_ih", 1, 1
    yield "hidden_size", "weight_hh", 1, 1


def _prelu(module: Any) -> Iterator[Row]:
    yield "num_parameters", "weight", 0, 1


LAYERS: dict[type[nn.Module] | tuple[type[nn.Module], ...], Callable[[Any], Iterator[Row]]] = {
    nn.Linear: _linear,
    nn.Bilinear: _bilinear,
    nn.modules.conv._ConvNd: _conv,
    nn.modules.batchnorm._NormBase: _batch_norm,
    nn.GroupNorm: _group_norm,
    (nn.LayerNorm, nn.RMSNorm): _normalized,
    (nn.Embedding, nn.EmbeddingBag): _embedding,
    nn.MultiheadAttention: _attention,
    nn.RNNBase: _rnn,
    nn.RNNCellBase: _rnn_cell,
    nn.PReLU: _prelu,
}
_ALIASES = ("", "_v")  # a weight-normed layer keeps its direction in weight_v, or below parametrizations
_PARAMETRIZED = ("original", "original1")


def _tensor(module: nn.Module, name: str) -> torch.Tensor | None:
    owner: nn.Module | None = module
    *path, last = name.split(".")
    for step in path:
        owner = None if owner is None else owner._modules.get(step)
    if owner is None:
        return None
    for alias in _ALIASES:
        tensor = owner._parameters.get(last + alias, owner._buffers.get(last + alias))
        if tensor is not None:
            return tensor
    parametrized = owner._modules.get("parametrizations")
    inner = None if parametrized is None else parametrized._modules.get(last)
    return (
        None if inner is None else next((inner._parameters[n] for n in reversed(_PARAMETRIZED) if n in inner._parameters), None)
    )


def standard(model: nn.Module, values: dict[Attr, int]) -> tuple[Standard, ...]:
    """Return how the attributes in `values` (traced attributes, present values) of torch's layers follow from parameters.

    A row that does not hold now (a subclass that uses the name for something else) is left out.
    """
    names = {id(t): n for n, t in parameters_of(model).items()}
    rows = []
    for path, module in model.named_modules():
        describe = next((f for cls, f in LAYERS.items() if isinstance(module, cls)), None)
        for attribute, parameter, dim, times in describe(module) if describe else ():
            name, _, index = attribute.partition("[")
            attr = Attr(path, name, int(index[:-1]) if index else None)
            tensor = _tensor(module, parameter)
            factor = Attr(path, times) if isinstance(times, str) else times
            if attr not in values or tensor is None or dim >= tensor.dim():
                continue
            if values[attr] == tensor.shape[dim] * (values[factor] if isinstance(factor, Attr) else factor):
                rows.append(Standard(attr, names[id(tensor)], dim, factor))
    return tuple(rows)


def identities(model: nn.Module, values: dict[Attr, int]) -> tuple[Equation, ...]:
    """Relations between attributes of one layer that its forward does not read but its users do."""
    out = []
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            heads, width, total = (Attr(path, name) for name in ("num_heads", "head_dim", "embed_dim"))
            if heads in values and width in values:
                out.append(Equation(("*", heads, width), "==", total, "head_dim of nn.MultiheadAttention"))
    return tuple(out)
