"""Matrix products: the contracted dimension of both operands is one dimension; the others pass.

The width of a product of two activations (q.k of attention) decides the scale of the scores, so it is kept unless "qk" is lifted.
"""

from __future__ import annotations

import torch

from modelopt.torch.trace.axes.labels import Axis
from modelopt.torch.trace.axes.rules.registry import Axes, Call, register_rule

QK = "the width of a product of two activations (queries and keys)"


def contract(
    call: Call, a: Axis | None, b: Axis | None, left: torch.Tensor, right: torch.Tensor, rows: Axis | None, columns: Axis | None
) -> None:
    """The contracted dimension (what stays are rows of left, columns of right); soft-frozen where both are activations."""
    call.unify(a, b)
    fixed_left, fixed_right = call.static(left), call.static(right)
    if not fixed_left and not fixed_right:
        call.freeze(a, QK, soft="qk")
    elif fixed_left != fixed_right:
        call.role("consumed", a)
        call.role("produced", rows if fixed_left else columns)


def add_bias(call: Call, bias: torch.Tensor, axes: Axes) -> None:
    """The addend of addmm and the like: aligned from the right."""
    known = call.axes(bias)
    for k in range(1, bias.dim() + 1):
        if bias.shape[-k] != 1:
            call.unify(axes[-k], known[-k])


@register_rule("aten::mm", "aten::mkldnn_linear", "aten::_int_mm")
def mm(call: Call) -> Axes:
    left, right = call.args[0], call.args[1]
    a, b = call.axes(left), call.axes(right)
    contract(call, a[1], b[0], left, right, a[0], b[1])
    return [a[0], b[1]]


@register_rule("aten::mv", "aten::dot", "aten::vdot")
def mv(call: Call) -> Axes:
    left, right = call.args[0], call.args[1]
    a, b = call.axes(left), call.axes(right)
    contract(call, a[-1], b[0], left, right, a[0] if len(a) > 1 else None, None)
    return a[:-1]


@register_rule("aten::ger", "aten::outer")
def outer(call: Call) -> Axes:
    return [call.axes(call.args[0])[0], call.axes(call.args[1])[0]]


@register_rule("aten::bmm")
def bmm(call: Call) -> Axes:
    left, right = call.args[0], call.args[1]
    a, b = call.axes(left), call.axes(right)
    contract(call, a[2], b[1], left, right, a[1], b[2])
    call.unify(a[0], b[0])
    return [a[0], a[1], b[2]]


@register_rule("aten::addmm", "aten::_addmm_activation")
def addmm(call: Call) -> Axes:
    bias, left, right = call.args[:3]
    a, b = call.axes(left), call.axes(right)
    contract(call, a[1], b[0], left, right, a[0], b[1])
    axes = [a[0], b[1]]
    add_bias(call, bias, axes)
    return axes


@register_rule("aten::addmv")
def addmv(call: Call) -> Axes:
    bias, left, right = call.args[:3]
    a, b = call.axes(left), call.axes(right)
    contract(call, a[1], b[0], left, right, a[0], None)
    add_bias(call, bias, [a[0]])
    return [a[0]]


@register_rule("aten::baddbmm")
def baddbmm(call: Call) -> Axes:
    bias, left, right = call.args[:3]
    a, b = call.axes(left), call.axes(right)
    contract(call, a[2], b[1], left, right, a[1], b[2])
    call.unify(a[0], b[0])
    axes = [a[0], a[1], b[2]]
    add_bias(call, bias, axes)
    return axes


@register_rule("aten::linear")
def linear(call: Call) -> Axes:
    source, weight, bias = call.args[0], call.args[1], call.arg(2, "bias")
    x, w = call.axes(source), call.axes(weight)
    contract(call, x[-1], w[-1], source, weight, None, w[0])
    axes = [*x[:-1], *w[:-1]]
    if bias is not None:
        add_bias(call, bias, axes)
    return axes


@register_rule("aten::matmul")
def matmul(call: Call) -> Axes:
    left, right = call.args[0], call.args[1]
    a, b = call.axes(left), call.axes(right)
    contract(call, a[-1], b[-2] if len(b) > 1 else b[-1], left, right, None, b[-1] if len(b) > 1 else None)
    batch: list[Axis | None] = [None] * max(len(a) - 2, len(b) - 2, 0)
    for axes in (a[:-2], b[:-2]):
        for k in range(1, len(axes) + 1):
            if batch[-k] is None:
                batch[-k] = axes[-k]
            else:
                call.unify(batch[-k], axes[-k])
    return [*batch, *(a[-2:-1] if len(a) > 1 else []), *(b[-1:] if len(b) > 1 else [])]


@register_rule("aten::_grouped_mm")
def grouped_mm(call: Call) -> Axes | None:
    """Rows of a 2-D operand times one matrix per group; the groups are runs of rows that `offs` names."""
    left, right = call.args[0], call.args[1]
    a, b = call.axes(left), call.axes(right)
    contract(call, a[-1], b[-2], left, right, None, b[-1])
    call.freeze(a[0], "rows are grouped by data")
    if right.dim() == 3:
        call.choose(b[0], "one matrix per group of rows", stacked=True)
    if left.dim() == 2 and right.dim() == 3:
        axes: list[Axis | None] = [None, b[2]]
    elif left.dim() == 3 and right.dim() == 3:
        axes = [None, a[1], b[2]]
    else:
        call.freeze_all([*a, *b], "a grouped product of this form")
        axes = [None] * call.out.dim()
    bias = call.arg(3, "bias")
    if bias is not None:
        call.unify(axes[-1], call.axes(bias)[-1])
    return axes


@register_rule("aten::cdist", "aten::_cdist_forward", "aten::_euclidean_dist")
def distance(call: Call) -> Axes:
    left, right = call.args[0], call.args[1]
    a, b = call.axes(left), call.axes(right)
    call.freeze_all([a[-1], b[-1]], "a distance over this dimension")
    for k in range(3, min(len(a), len(b)) + 1):
        call.unify(a[-k], b[-k])
    return [*a[:-1], b[-2]]
