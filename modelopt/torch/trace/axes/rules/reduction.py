"""Reductions. Means and norms are taken over what is alive, so a labelled dimension may go; sums, extrema and softmax keep it."""

from __future__ import annotations

from modelopt.torch.trace.axes.rules.registry import Axes, Call, dims_of, reduced, register_rule


@register_rule("aten::mean", "aten::var", "aten::std", "aten::var_mean", "aten::std_mean")
def mean(call: Call) -> Axes:
    return _mean(call, 1)


@register_rule("aten::linalg_vector_norm", "aten::norm")
def norm(call: Call) -> Axes:
    return _mean(call, 2)


def _mean(call: Call, position: int) -> Axes:
    source = call.args[0]
    axes = call.axes(source)
    dims = dims_of(call.arg(position, "dim"), source.dim())
    if len(dims) == source.dim() > 1:
        call.freeze_all(axes, "averaged over every dimension")
    out = reduced(axes, dims, call.outputs()[0].dim() == source.dim())
    for other in call.outputs()[1:]:
        call.set(other, out)
    return out


@register_rule("aten::sum", "aten::amax", "aten::amin", "aten::prod", "aten::any", "aten::all", "aten::logsumexp", "aten::nansum",
               "aten::argmax", "aten::argmin", "aten::max", "aten::min", "aten::aminmax", "aten::count_nonzero", "aten::median",
               "aten::nanmean", "aten::trace")  # fmt: skip
def fold(call: Call) -> Axes:
    source = call.args[0]
    axes = call.axes(source)
    given = call.arg(1, "dim")
    dims = dims_of(None if isinstance(given, bool) or given is None else given, source.dim())
    for d in dims:
        call.freeze(axes[d], f"{call.name.removeprefix('aten::')} over this dimension")
    out = reduced(axes, dims, call.outputs()[0].dim() == source.dim())
    for other in call.outputs()[1:]:
        call.set(other, out)
    return out


@register_rule("aten::_softmax", "aten::_log_softmax", "aten::softmax", "aten::log_softmax", "aten::_safe_softmax",
               "aten::softmin")  # fmt: skip
def softmax(call: Call) -> Axes:
    axes = call.axes(call.args[0])
    if axes:
        call.choose(axes[call.arg(1, "dim")], "softmax over this dimension")
    return axes
