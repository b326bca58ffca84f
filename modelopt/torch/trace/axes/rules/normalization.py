"""Normalizations: statistics are over the live slices, the affine parameters share the normalized dimension."""

from __future__ import annotations

import torch

from modelopt.torch.trace.axes.rules.registry import Axes, Call, register_rule


def _rest(call: Call) -> None:
    for out in call.outputs()[1:]:
        call.set(out, [None] * out.dim())


@register_rule("aten::native_batch_norm", "aten::_native_batch_norm_legit", "aten::_native_batch_norm_legit_no_training",
               "aten::cudnn_batch_norm", "aten::miopen_batch_norm", "aten::batch_norm", "aten::_batch_norm_with_update",
               "aten::_batch_norm_no_update", "aten::_batch_norm_impl_index")  # fmt: skip
def batch_norm(call: Call) -> Axes:
    axes = call.axes(call.args[0])
    for affine in call.args[1:5]:
        if isinstance(affine, torch.Tensor) and affine.dim() == 1:
            call.unify(axes[1], call.axes(affine)[0])
    _rest(call)
    return axes


@register_rule("aten::native_layer_norm", "aten::layer_norm", "aten::_fused_rms_norm", "aten::rms_norm")
def layer_norm(call: Call) -> Axes:
    axes = call.axes(call.args[0])
    for affine in call.args[2:4]:
        if isinstance(affine, torch.Tensor):
            for k, axis in enumerate(reversed(call.axes(affine)), 1):
                call.unify(axes[-k], axis)
    _rest(call)
    return axes


@register_rule("aten::native_group_norm", "aten::group_norm")
def group_norm(call: Call) -> Axes:
    source = call.args[0]
    if call.name == "aten::group_norm":
        groups, weight, bias, channels = call.args[1], call.arg(2, "weight"), call.arg(3, "bias"), source.shape[1]
    else:
        weight, bias, channels, groups = call.args[1], call.args[2], call.args[4], call.args[6]
    axes = call.axes(source)
    for affine in (weight, bias):
        if affine is not None:
            call.unify(axes[1], call.axes(affine)[0])
    if groups > 1:
        group, _ = call.factor(axes[1], (groups, channels // groups))
        call.recorder.last_groups = group
        call.role("groups", group)
        name = call.recorder.parameter_names.get(id(weight)) if weight is not None else None
        if name is not None:
            call.recorder.groups[name] = (groups, group)
    _rest(call)
    return axes


@register_rule("aten::_weight_norm_interface", "aten::_weight_norm")
def weight_norm(call: Call) -> Axes:
    """w = g v / |v|: the norm runs over every dimension but one, over the live slices."""
    direction, scale = call.args[0], call.args[1]
    axes = call.axes(direction)
    for k, (a, b) in enumerate(zip(axes, call.axes(scale), strict=False)):
        if scale.shape[k] == direction.shape[k]:
            call.unify(a, b)
    _rest(call)
    return axes
