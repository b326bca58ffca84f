"""Writes by index: the indexed dimensions are frozen, the others of target and source are the same."""

from __future__ import annotations

import torch

from modelopt.torch.trace.axes.rules.indexing import BY_DATA
from modelopt.torch.trace.axes.rules.registry import Axes, Call, register_rule


@register_rule("aten::index_put", "aten::_unsafe_index_put", "aten::_index_put_impl")
def index_put(call: Call) -> Axes:
    target, indices, values = call.args[0], call.args[1], call.args[2]
    axes, known = list(call.axes(target)), call.axes(values)
    indexed: list[int] = []
    k = 0
    for tensor in indices:
        width = tensor.dim() if tensor is not None and tensor.dtype in (torch.bool, torch.uint8) else 1
        if tensor is not None:
            indexed += range(k, k + width)
        k += width
    for d in indexed:
        call.freeze(axes[d], BY_DATA)
    kept = [d for d in range(target.dim()) if d not in indexed]
    if indexed == list(range(len(indexed))):
        for r, d in enumerate(reversed(kept), 1):
            if values.dim() >= r and values.shape[-r] != 1:
                call.unify(axes[d], known[-r])
        call.freeze_all(known[: max(len(known) - len(kept), 0)], BY_DATA)
    else:
        call.freeze_all([*axes, *known], BY_DATA)
    return axes


@register_rule("aten::index_add", "aten::index_copy", "aten::index_reduce")
def index_add(call: Call) -> Axes:
    target, dim, values = call.args[0], call.args[1], call.args[3]
    axes, known = list(call.axes(target)), call.axes(values)
    dim %= max(target.dim(), 1)
    for k in range(target.dim()):
        if k == dim:
            call.freeze(axes[k], BY_DATA)
            call.freeze(known[k], BY_DATA)
        else:
            call.unify(axes[k], known[k])
    return axes


@register_rule("aten::index_fill")
def index_fill(call: Call) -> Axes:
    axes = list(call.axes(call.args[0]))
    call.freeze(axes[call.args[1]], BY_DATA)
    return axes


@register_rule("aten::scatter", "aten::scatter_add", "aten::scatter_reduce")
def scatter(call: Call) -> Axes:
    target, dim, chosen, values = call.args[0], call.args[1], call.args[2], call.args[3]
    axes = list(call.axes(target))
    dim %= max(target.dim(), 1)
    others = [chosen, values] if isinstance(values, torch.Tensor) and values.dim() else [chosen]
    for k in range(target.dim()):
        for other in others:
            known = call.axes(other)[k]
            if k != dim and other.shape[k] == target.shape[k]:
                call.unify(axes[k], known)
            else:
                call.freeze(axes[k], BY_DATA)
                call.freeze(known, BY_DATA)
    return axes


@register_rule("aten::masked_scatter")
def masked_scatter(call: Call) -> Axes:
    """Elements go where the mask is true, in order: every dimension that is not the same throughout is frozen."""
    axes = call.axes(call.args[0])
    call.freeze_all([*axes, *call.axes(call.args[1]), *call.axes(call.args[2])], BY_DATA)
    return axes


@register_rule("aten::slice_scatter", "aten::select_scatter")
def slice_scatter(call: Call) -> Axes:
    target, values, dim = call.args[0], call.args[1], call.arg(2, "dim", 0)
    axes, known = list(call.axes(target)), list(call.axes(values))
    dim %= target.dim()
    if call.name == "aten::select_scatter":
        known.insert(dim, None)
    call.freeze(axes[dim], "written at fixed places")
    call.freeze(known[dim], "written at fixed places")
    for k in range(target.dim()):
        if k != dim:
            call.unify(axes[k], known[k])
    return axes
