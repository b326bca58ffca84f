"""Symbols of torch's own modules: which sizes they have, which side shows them, and which parameter dimensions hold them."""

from __future__ import annotations

from typing import Any

from torch import nn

from modelopt.torch.trace.symbols import Slots, Symbol, SymInfo, SymMap

_IN, _OUT = Symbol.CLType.INCOMING, Symbol.CLType.OUTGOING
_CONVS: list[type | str] = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
_TRANSPOSED: list[type | str] = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
_CHANNEL_NORMS: list[type | str] = [
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
]  # fmt: skip
_CHANNEL_PASS: list[type | str] = [
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Upsample,
    nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
]  # fmt: skip
_ANY_PASS: list[type | str] = [
    nn.Identity, nn.Dropout, nn.AlphaDropout, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU,
    nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid,
    nn.Tanhshrink, nn.Hardshrink, nn.Softshrink, nn.Threshold,
]  # fmt: skip


def incoming(dim: int, size: int, slots: Slots) -> Symbol:
    """Return the symbol of a size that dimension `dim` of the input must have."""
    return Symbol(cl_type=_IN, elastic_dims={dim}, slots=slots, size=size)


def outgoing(dim: int, size: int, slots: Slots) -> Symbol:
    """Return the symbol of a size that may be chosen and that dimension `dim` of the output has."""
    return Symbol(is_searchable=True, cl_type=_OUT, elastic_dims={dim}, slots=slots, size=size)


@SymMap.register(nn.Linear, is_explicit_leaf=False)
def linear(module: nn.Linear) -> SymInfo:
    """y = x W^T + b with W [out, in]."""
    return SymInfo(
        in_features=incoming(-1, module.in_features, (("weight", 1),)),
        out_features=outgoing(-1, module.out_features, (("weight", 0), ("bias", 0))),
    )


@SymMap.register(_CONVS, is_explicit_leaf=False)
def conv(module: Any) -> SymInfo:
    """W [out, in / groups, *kernel]. A depthwise convolution hands its channels on; other groups keep their sizes in a graph."""
    slots: Slots = (("weight", 0), ("bias", 0))
    if module.groups == 1:
        return SymInfo(
            in_channels=incoming(1, module.in_channels, (("weight", 1),)), out_channels=outgoing(1, module.out_channels, slots)
        )
    if module.groups == module.in_channels == module.out_channels:
        into = incoming(1, module.in_channels, slots)
        out = Symbol(cl_type=_OUT, elastic_dims={1}, slots=slots, size=module.out_channels)
        out.link_to(into)
        return SymInfo(is_shape_preserving=True, in_channels=into, out_channels=out)
    return SymInfo(
        in_channels=Symbol(is_sortable=False, cl_type=_IN, elastic_dims={1}, slots=(("weight", 1),), size=module.in_channels),
        out_channels=Symbol(is_sortable=False, cl_type=_OUT, elastic_dims={1}, slots=slots, size=module.out_channels),
    )


@SymMap.register(_TRANSPOSED, is_explicit_leaf=False)
def conv_transposed(module: Any) -> SymInfo:
    """W [in, out / groups, *kernel]."""
    into, out = incoming(1, module.in_channels, (("weight", 0),)), outgoing(1, module.out_channels, (("weight", 1), ("bias", 0)))
    if module.groups != 1:
        out = Symbol(is_sortable=False, cl_type=_OUT, elastic_dims={1}, slots=out.slots, size=module.out_channels)
        into = Symbol(is_sortable=False, cl_type=_IN, elastic_dims={1}, slots=into.slots, size=module.in_channels)
    return SymInfo(in_channels=into, out_channels=out)


@SymMap.register(_CHANNEL_NORMS, is_explicit_leaf=False)
def channel_norm(module: Any) -> SymInfo:
    """One mean, variance, weight and bias for each channel."""
    names = ("weight", "bias", "running_mean", "running_var")
    return SymInfo(is_shape_preserving=True, num_features=incoming(1, module.num_features, tuple((n, 0) for n in names)))


@SymMap.register([nn.LayerNorm, nn.RMSNorm], is_explicit_leaf=False)
def layer_norm(module: Any) -> SymInfo:
    """Weight and bias over the last dimension (the last of several)."""
    size = int(module.normalized_shape[-1])
    return SymInfo(is_shape_preserving=True, normalized_shape=incoming(-1, size, (("weight", -1), ("bias", -1))))


@SymMap.register(nn.GroupNorm, is_explicit_leaf=False)
def group_norm(module: nn.GroupNorm) -> SymInfo:
    """Channels in `num_groups` groups of neighbours: they cannot be put in any order."""
    symbol = incoming(1, module.num_channels, (("weight", 0), ("bias", 0)))
    symbol._sortable = module.num_groups in (1, module.num_channels)
    symbol.step = 1 if symbol._sortable else module.num_groups
    return SymInfo(is_shape_preserving=True, num_channels=symbol)


@SymMap.register(nn.Embedding, is_explicit_leaf=False)
def embedding(module: nn.Embedding) -> SymInfo:
    """One row for each id."""
    return SymInfo(
        num_embeddings=Symbol(slots=(("weight", 0),), size=module.num_embeddings),
        embedding_dim=outgoing(-1, module.embedding_dim, (("weight", 1),)),
    )


@SymMap.register(nn.MultiheadAttention, is_explicit_leaf=False)
def multihead_attention(module: nn.MultiheadAttention) -> SymInfo:
    """What comes in, the values of all heads together, and what goes out."""
    into: Slots = (("in_proj_weight", 1),) if module._qkv_same_embed_dim else (("q_proj_weight", 1),)
    return SymInfo(
        embed_dim=incoming(-1, module.embed_dim, into),
        value_dim=Symbol(is_searchable=True, slots=(("out_proj.weight", 1),), size=module.embed_dim),
        out_dim=outgoing(-1, module.embed_dim, (("out_proj.weight", 0), ("out_proj.bias", 0))),
    )


@SymMap.register([nn.LSTM, nn.GRU, nn.RNN], is_explicit_leaf=False)
def recurrent(module: nn.RNNBase) -> SymInfo:
    """The first layer reads `input_size`, every state has `hidden_size`."""
    return SymInfo(
        input_size=incoming(-1, module.input_size, (("weight_ih_l0", 1),)),
        hidden_size=outgoing(-1, module.hidden_size, (("weight_hh_l0", 1),)),
    )


@SymMap.register(_CHANNEL_PASS, is_explicit_leaf=False)
def channel_pass(module: nn.Module) -> SymInfo:
    """Every channel by itself."""
    return SymInfo(is_shape_preserving=True)


@SymMap.register(_ANY_PASS, is_explicit_leaf=False)
def any_pass(module: nn.Module) -> SymInfo:
    """Every element by itself."""
    return SymInfo(is_shape_preserving=True)
