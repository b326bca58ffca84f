"""Views and rearrangements: each output element is one input element; labels are permuted, merged (product), split (factor)."""

from __future__ import annotations

import torch

from modelopt.torch.trace.axes import algebra
from modelopt.torch.trace.axes.labels import Axis
from modelopt.torch.trace.axes.rules.registry import Axes, Call, dims_of, register_rule

BY_POSITION = "elements are chosen by their position in memory"


@register_rule("aten::view", "aten::_unsafe_view", "aten::reshape", "aten::_reshape_alias", "aten::flatten", "aten::unflatten")
def view(call: Call) -> Axes:
    source = call.args[0]
    return algebra.reshape(call.store, call.axes(source), source.shape, call.out.shape)


@register_rule("aten::t", "aten::numpy_T", "aten::mT", "aten::adjoint")
def t(call: Call) -> Axes:
    return call.axes(call.args[0])[::-1]


@register_rule("aten::transpose")
def transpose(call: Call) -> Axes:
    axes = list(call.axes(call.args[0]))
    a, b = call.arg(1, "dim0"), call.arg(2, "dim1")
    axes[a], axes[b] = axes[b], axes[a]
    return axes


@register_rule("aten::permute")
def permute(call: Call) -> Axes:
    axes = call.axes(call.args[0])
    return [axes[d] for d in call.arg(1, "dims")]


@register_rule("aten::movedim")
def movedim(call: Call) -> Axes:
    axes = list(call.axes(call.args[0]))
    source, target = dims_of(call.args[1], len(axes)), dims_of(call.args[2], len(axes))
    rest = iter(d for d in range(len(axes)) if d not in source)
    return [axes[source[target.index(k)]] if k in target else axes[next(rest)] for k in range(len(axes))]


@register_rule("aten::unsqueeze")
def unsqueeze(call: Call) -> Axes:
    axes = list(call.axes(call.args[0]))
    axes.insert(call.arg(1, "dim") % call.out.dim(), None)
    return axes


@register_rule("aten::squeeze")
def squeeze(call: Call) -> Axes:
    source = call.args[0]
    gone = dims_of(call.arg(1, "dim"), source.dim())
    axes, shape = call.axes(source), tuple(call.out.shape)
    if source is call.out:  # in place: the shape has changed already
        labelled = [a for a in axes if a is not None]
        if len(labelled) != sum(n > 1 for n in shape):
            call.freeze_all(labelled, "squeezed in place")
            return [None] * len(shape)
        left = iter(labelled)
        return [next(left) if n > 1 else None for n in shape]
    return [a for k, a in enumerate(axes) if not (k in gone and source.shape[k] == 1)]


@register_rule("aten::expand")
def expand(call: Call) -> Axes:
    """A dimension of size one is repeated as often as the code asks: that count is a new dimension of its own."""
    source, axes = call.args[0], call.axes(call.args[0])
    shift = call.out.dim() - source.dim()
    out = []
    for k, n in enumerate(call.out.shape):
        old = source.shape[k - shift] if k >= shift else 1
        out.append(axes[k - shift] if old == n and k >= shift else call.store.fresh(n) if n > 1 else None)
    return out


@register_rule("aten::repeat")
def repeat(call: Call) -> Axes:
    source, times = call.args[0], call.arg(1, "repeats")
    shift = len(times) - source.dim()
    axes = [None] * shift + list(call.axes(source))
    shape = [1] * shift + list(source.shape)
    return [algebra.tile(call.store, a, n, r) for a, n, r in zip(axes, shape, times, strict=True)]


@register_rule("aten::repeat_interleave.self_int")
def repeat_interleave(call: Call) -> Axes | None:
    source, times, dim = call.args[0], call.args[1], call.arg(2, "dim")
    axes = list(call.axes(source))
    if dim is None:
        call.freeze_all(axes, BY_POSITION)
        return [None]
    if times > 1:
        axes[dim] = call.product((axes[dim], source.shape[dim]), (call.store.fresh(times), times))
    return axes


@register_rule("aten::flip")
def flip(call: Call) -> Axes:
    axes = list(call.axes(call.args[0]))
    for d in dims_of(call.arg(1, "dims"), len(axes)):
        axes[d] = algebra.take(call.store, axes[d], slice(None, None, -1))
    return axes


@register_rule("aten::roll")
def roll(call: Call) -> Axes:
    axes = list(call.axes(call.args[0]))
    for d in dims_of(call.arg(2, "dims"), len(axes)):
        call.freeze(axes[d], "rolled by a fixed number of places")
    return axes


@register_rule("aten::as_strided")
def as_strided(call: Call) -> Axes:
    """A dimension of the same size and stride is the same dimension if no other stride can carry into it; the rest is frozen."""
    source, out = call.args[0], call.out
    axes: list[Axis | None] = [None] * out.dim()
    for k, axis in enumerate(call.axes(source)):
        if axis is None:
            continue
        same = [j for j in range(out.dim()) if out.shape[j] == source.shape[k] and out.stride(j) == source.stride(k)]
        if len(same) == 1 and source.storage_offset() == out.storage_offset() and _carries_nothing(out, same[0]):
            axes[same[0]] = axis
        else:
            call.freeze(axis, BY_POSITION)
    return axes


def _carries_nothing(out: torch.Tensor, dim: int) -> bool:
    """Whether the other dimensions never move along this one: whole multiples of it, or together less than one step of it."""
    step, whole = out.stride(dim), out.stride(dim) * out.shape[dim]
    others = [(out.shape[j], out.stride(j)) for j in range(out.dim()) if j != dim and out.shape[j] > 1]
    inner = sum((n - 1) * s for n, s in others if s < step)
    return step > 0 and inner < step and all(s < step or s % whole == 0 for _, s in others)


@register_rule("aten::diagonal", "aten::diag_embed", "aten::diag")
def diagonal(call: Call) -> Axes:
    source, out = call.args[0], call.out
    axes = list(call.axes(source))
    offset = call.arg(1, "offset", 0)
    if call.name != "aten::diagonal" or offset or source.dim() < 2:
        call.freeze_all(axes, BY_POSITION)
        return [None] * out.dim()
    a, b = (d % source.dim() for d in (call.arg(2, "dim1", 0), call.arg(3, "dim2", 1)))
    if source.shape[a] != source.shape[b]:
        call.freeze_all([axes[a], axes[b]], BY_POSITION)
        both = None
    else:
        call.unify(axes[a], axes[b])
        both = axes[a]
    return [x for k, x in enumerate(axes) if k not in (a, b)] + [both]


@register_rule("aten::unfold", "aten::im2col", "aten::col2im")
def unfold(call: Call) -> Axes | None:
    """Tensor.unfold takes windows of one dimension; im2col and col2im merge channels with the window."""
    source, out = call.args[0], call.out
    axes = list(call.axes(source))
    if call.name == "aten::unfold":
        dim = call.arg(1, "dimension")
        call.freeze(axes[dim], "windows are taken over this dimension")
        axes[dim] = None
        return [*axes, None]
    call.freeze_all(axes[-2:] if call.name == "aten::im2col" else axes[-1:], "windows are taken over this dimension")
    lead: list[object] = list(axes[: source.dim() - (3 if call.name == "aten::im2col" else 2)])
    channels = axes[-3] if call.name == "aten::im2col" else axes[-2]
    if call.name == "aten::im2col":
        size, window = source.shape[-3], out.shape[-2] // source.shape[-3]
        return [*lead, call.product((channels, size), (None, window)), None]  # type: ignore[list-item]
    size = out.shape[-3]
    window = source.shape[-2] // size
    kept, place = call.factor(channels, (size, window))
    call.freeze(place, "windows are folded over this dimension")
    return [*lead, kept, None, None]  # type: ignore[list-item]


@register_rule("aten::pixel_shuffle")
def pixel_shuffle(call: Call) -> Axes:
    source, r = call.args[0], call.args[1]
    *lead, channels, _, _ = call.axes(source)
    kept, place = call.factor(channels, (source.shape[-3] // (r * r), r * r))
    call.freeze(place, "channels become pixels")
    call.freeze_all(call.axes(source)[-2:], "channels become pixels")
    return [*lead, kept, None, None]


@register_rule("aten::pixel_unshuffle")
def pixel_unshuffle(call: Call) -> Axes:
    source, r = call.args[0], call.args[1]
    *lead, channels, height, width = call.axes(source)
    call.freeze_all([height, width], "pixels become channels")
    return [*lead, call.product((channels, source.shape[-3]), (None, r * r)), None, None]


@register_rule("aten::channel_shuffle", "aten::native_channel_shuffle")
def channel_shuffle(call: Call) -> Axes:
    source, groups = call.args[0], call.args[1]
    axes = list(call.axes(source))
    size = source.shape[1] // groups
    group, member = call.factor(axes[1], (groups, size))
    axes[1] = call.product((member, size), (group, groups))
    call.freeze(group, "the number of groups of a channel shuffle")
    return axes


@register_rule("aten::cat", "aten::concat", "aten::concatenate")
def cat(call: Call) -> Axes:
    parts = [p for p in call.args[0] if p.dim() > 1 or p.numel() or call.out.dim() == 1]
    dim = call.arg(1, "dim", 0) % call.out.dim()
    known = [call.axes(p) for p in parts]
    out = list(known[0])
    for k in range(call.out.dim()):
        if k == dim:
            out[k] = algebra.concat(call.store, [(a[k], p.shape[k]) for a, p in zip(known, parts, strict=True)])
            continue
        for axes in known[1:]:
            call.unify(out[k], axes[k])
    return out


@register_rule("aten::stack")
def stack(call: Call) -> Axes:
    known = [call.axes(p) for p in call.args[0]]
    for axes in known[1:]:
        for a, b in zip(known[0], axes, strict=True):
            call.unify(a, b)
    out = list(known[0])
    out.insert(call.arg(1, "dim", 0) % call.out.dim(), None)
    return out


@register_rule("aten::constant_pad_nd", "aten::reflection_pad1d", "aten::reflection_pad2d", "aten::reflection_pad3d",
               "aten::replication_pad1d", "aten::replication_pad2d", "aten::replication_pad3d")  # fmt: skip
def pad(call: Call) -> Axes:
    """Constant padding adds slices that always stay; reflected or cut slices are frozen."""
    source, widths = call.args[0], call.args[1]
    axes = list(call.axes(source))
    for k in range(len(widths) // 2):
        d, low, high = -1 - k, widths[2 * k], widths[2 * k + 1]
        if axes[d] is None or (low == 0 and high == 0):
            continue
        if call.name == "aten::constant_pad_nd" and low >= 0 and high >= 0:
            axes[d] = algebra.concat(call.store, [(None, low), (axes[d], source.shape[d]), (None, high)])
        else:
            call.freeze(axes[d], "padded by reflection or cut by negative padding")
    return axes


@register_rule("aten::set", "aten::resize", "aten::resize_as", "aten::set_data")
def reallocate(call: Call) -> Axes | None:
    call.freeze_all((a for x in call.inputs() for a in call.axes(x)), "memory is reassigned")
    return [None] * call.out.dim() if isinstance(call.out, torch.Tensor) else None
