"""Slices, splits and lookups. A part that is used on its own becomes a family of its own; what data selects is frozen."""

from __future__ import annotations

import torch

from modelopt.torch.trace.axes import algebra
from modelopt.torch.trace.axes.rules.registry import Axes, Call, register_rule

BY_DATA = "slices are chosen by data"


@register_rule("aten::slice")
def slice_(call: Call) -> Axes:
    source, out = call.args[0], call.out
    dim = call.arg(1, "dim", 0) % source.dim()
    axes = list(call.axes(source))
    if axes[dim] is not None and source.shape[dim] != out.shape[dim]:
        part = slice(call.arg(2, "start"), call.arg(3, "end"), call.arg(4, "step", 1))
        call.store.segment(axes[dim], part)
        axes[dim] = algebra.take(call.store, axes[dim], part)
    return axes


@register_rule("aten::narrow")
def narrow(call: Call) -> Axes:
    axes = list(call.axes(call.args[0]))
    dim, start, length = call.args[1] % len(axes), int(call.args[2]), call.args[3]
    start = start % call.args[0].shape[dim] if start < 0 else start
    call.store.segment(axes[dim], slice(start, start + length))
    axes[dim] = algebra.take(call.store, axes[dim], slice(start, start + length))
    return axes


@register_rule("aten::select")
def select(call: Call) -> Axes:
    """One slice by a fixed number: it stays, and so does everything that it is counted from."""
    source = call.args[0]
    dim, index = call.arg(1, "dim") % source.dim(), int(call.arg(2, "index"))
    axes = list(call.axes(source))
    if axes[dim] is not None:
        counted = slice(index, None) if index < 0 else slice(0, index + 1)
        text = "one slice is selected by a fixed number"
        if call.static(source):
            call.choose(axes[dim], text, stacked=True)
        else:
            call.freeze(algebra.take(call.store, axes[dim], counted), text)
    del axes[dim]
    return axes


@register_rule("aten::split", "aten::split_with_sizes", "aten::chunk", "aten::unsafe_split", "aten::unsafe_chunk",
               "aten::unsafe_split_with_sizes", "aten::tensor_split", "aten::hsplit", "aten::vsplit")  # fmt: skip
def split(call: Call) -> None:
    source = call.args[0]
    dim = call.arg(2, "dim", 0) % source.dim()
    axes, start = list(call.axes(source)), 0
    whole = axes[dim]
    for out in call.out:
        part = slice(start, start + out.shape[dim])
        start += out.shape[dim]
        if whole is not None:
            call.store.segment(whole, part)
            axes[dim] = algebra.take(call.store, whole, part)
        call.set(out, axes)


@register_rule("aten::unbind")
def unbind(call: Call) -> None:
    source = call.args[0]
    dim = call.arg(1, "dim", 0) % source.dim()
    axes = list(call.axes(source))
    if call.static(source):
        call.choose(axes[dim], "unbound into a fixed number of tensors", stacked=True)
    else:
        call.freeze(axes[dim], "unbound into a fixed number of tensors")
    del axes[dim]
    for out in call.out:
        call.set(out, axes)


@register_rule("aten::embedding")
def embedding(call: Call) -> Axes:
    weight, index = call.axes(call.args[0]), call.axes(call.args[1])
    call.freeze(weight[0], BY_DATA)
    call.role("embedded", weight[1])
    return [*index, weight[1]]


@register_rule("aten::embedding_bag", "aten::_embedding_bag", "aten::_embedding_bag_forward_only")
def embedding_bag(call: Call) -> None:
    weight = call.axes(call.args[0])
    call.freeze(weight[0], BY_DATA)
    for out in call.outputs():
        call.set(out, [None] * out.dim())
    call.set(call.outputs()[0], [None, weight[1]])


@register_rule("aten::index_select")
def index_select(call: Call) -> Axes:
    axes = list(call.axes(call.args[0]))
    dim = call.arg(1, "dim") % max(len(axes), 1)
    if axes:
        call.choose(axes[dim], BY_DATA, stacked=call.static(call.args[0]))
        axes[dim] = call.axes(call.args[2])[0] if call.args[2].dim() else None
    return axes


@register_rule("aten::index", "aten::_unsafe_index")
def index(call: Call) -> Axes:
    """x[i, :, j]: the indexed dimensions are frozen, the indices' own dimensions come in their place (first, if apart)."""
    source, indices = call.args[0], list(call.args[1])
    axes = list(call.axes(source))
    indexed: list[int] = []
    replaced, mask_rank, k = [], 0, 0
    for tensor in indices:
        if tensor is None:
            k += 1
            continue
        width = tensor.dim() if tensor.dtype in (torch.bool, torch.uint8) else 1
        if tensor.dtype in (torch.bool, torch.uint8):
            for axis in call.axes(tensor):
                call.freeze(axis, BY_DATA)
            mask_rank = max(mask_rank, 1)
        else:
            replaced.append(tensor)
        indexed += range(k, k + width)
        k += width
    for d in indexed:
        call.choose(axes[d], BY_DATA, stacked=call.static(source))
    rest = call.out.dim() - (len(axes) - len(indexed))
    new: list[object] = [None] * rest
    for tensor in replaced:
        known = call.axes(tensor)
        for d in range(1, tensor.dim() + 1):
            if tensor.shape[-d] > 1:
                if new[-d] is None:
                    new[-d] = known[-d]
                else:
                    call.unify(new[-d], known[-d])  # type: ignore[arg-type]
    apart = indexed != list(range(indexed[0], indexed[0] + len(indexed))) if indexed else False
    first = 0 if apart or not indexed else indexed[0]
    kept = [a for d, a in enumerate(axes) if d not in indexed]
    return [*kept[:first], *new, *kept[first:]]  # type: ignore[list-item]


@register_rule("aten::take_along_dim", "aten::gather")
def gather(call: Call) -> Axes:
    source, dim, chosen = call.args[0], call.arg(1, "dim"), call.arg(2, "index")
    if call.name == "aten::take_along_dim":
        dim, chosen = call.arg(2, "dim"), call.args[1]
    axes, index_axes = list(call.axes(source)), call.axes(chosen)
    dim %= max(len(axes), 1)
    for k in range(len(axes)):
        if k == dim:
            call.choose(axes[k], BY_DATA, stacked=call.static(source))
            axes[k] = index_axes[k]
        elif chosen.shape[k] == source.shape[k]:
            call.unify(axes[k], index_axes[k])
        else:
            call.freeze(axes[k], BY_DATA)
            call.freeze(index_axes[k], BY_DATA)
    return axes


@register_rule("aten::topk", "aten::sort", "aten::argsort", "aten::kthvalue", "aten::msort", "aten::mode", "aten::median.dim")
def order(call: Call) -> None:
    source = call.args[0]
    position = 2 if call.name in ("aten::topk", "aten::kthvalue") else 1
    dim = call.arg(position, "dim", -1)
    if isinstance(dim, bool):  # sort.stable(stable, dim)
        dim = call.arg(2, "dim", -1)
    if not source.dim():
        for out in call.outputs():
            call.set(out, [])
        return
    axes = list(call.axes(source))
    if call.name == "aten::topk":
        call.choose(axes[dim], "ordered by value", least=int(call.args[1]))
    else:
        call.freeze(axes[dim], "ordered by value")
    axes[dim] = None
    for out in call.outputs():
        call.set(out, axes if out.dim() == len(axes) else [a for k, a in enumerate(axes) if k != dim % len(axes)])


@register_rule("aten::masked_select", "aten::nonzero", "aten::unique", "aten::_unique2", "aten::unique_dim",
               "aten::unique_consecutive", "aten::bincount", "aten::histc", "aten::one_hot", "aten::searchsorted",
               "aten::bucketize", "aten::take", "aten::multinomial", "aten::item", "aten::_local_scalar_dense", "aten::equal",
               "aten::nonzero_static", "aten::nonzero_numpy", "aten::argwhere", "aten::is_nonzero",
               "aten::_assert_async")  # fmt: skip
def by_data(call: Call) -> None:
    for source in call.inputs():
        call.freeze_all(call.axes(source), "read by value")
    for out in call.outputs():
        call.set(out, [None] * out.dim())
