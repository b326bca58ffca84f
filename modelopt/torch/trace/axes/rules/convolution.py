"""Convolutions: channels contract, groups split both channel dimensions into (group, member)."""

from __future__ import annotations

from collections.abc import Sequence

from modelopt.torch.trace.axes.labels import Axis
from modelopt.torch.trace.axes.rules.registry import Axes, Call, register_rule

SPACE = "a convolution runs over this dimension"


@register_rule("aten::convolution", "aten::_convolution", "aten::convolution_overrideable")
def convolution(call: Call) -> Axes:
    transposed, groups = call.arg(6, "transposed"), call.arg(8, "groups")
    return _convolve(call, bool(transposed), int(groups), call.arg(3, "stride"))


@register_rule("aten::mkldnn_convolution")
def mkldnn_convolution(call: Call) -> Axes:
    return _convolve(call, False, int(call.args[6]), call.args[4])


def _convolve(call: Call, transposed: bool, groups: int, stride: Sequence[int]) -> Axes:
    source, weight, bias = call.args[0], call.args[1], call.arg(2, "bias")
    x, w = call.axes(source), call.axes(weight)
    space = list(x[2:])
    for k, axis in enumerate(space):
        if weight.shape[k + 2] != 1 or call.out.shape[k + 2] != source.shape[k + 2] or max(stride, default=1) > 1:
            call.freeze(axis, SPACE)
            space[k] = None
    call.freeze_all(w[2:], SPACE)
    if groups == 1:
        call.unify(x[1], w[0] if transposed else w[1])
        out = w[1] if transposed else w[0]
    else:
        out = _grouped(call, transposed, groups)
    if bias is not None:
        call.unify(out, call.axes(bias)[0])
    for role, axis in (("consumed", x[1]), ("produced", out), ("space", x[1]), ("space", out)):
        call.role(role, axis)
    return [x[0], out, *space]


def _grouped(call: Call, transposed: bool, groups: int) -> Axis | None:
    """Channels are (group, member) on both sides with one group dimension; a weight is [O, I/g] or, transposed, [I, O/g]."""
    source, weight = call.args[0], call.args[1]
    x, w = call.axes(source), call.axes(weight)
    outputs = call.out.shape[1]
    group, member = call.factor(x[1], (groups, source.shape[1] // groups))
    if transposed:
        weight_group, weight_member = call.factor(w[0], (groups, source.shape[1] // groups))
        call.unify(group, weight_group)
        call.unify(member, weight_member)
        out = call.product((group, groups), (w[1], outputs // groups))
    else:
        call.unify(member, w[1])
        out_group, _ = call.factor(w[0], (groups, outputs // groups))
        call.unify(group, out_group)
        out = w[0]
    call.recorder.last_groups = group
    if groups not in (source.shape[1], outputs):
        call.role("groups", group)
    name = call.recorder.parameter_names.get(id(weight))
    if name is not None:
        call.recorder.groups[name] = (groups, group)
    return out


@register_rule("aten::_conv_depthwise2d", "aten::conv_depthwise3d", "aten::slow_conv3d", "aten::_slow_conv2d_forward")
def conv_depthwise(call: Call) -> Axes:
    return _convolve(call, False, call.args[0].shape[1] // call.args[1].shape[1], [2])
