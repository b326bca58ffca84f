"""What operators do to scaled channels: `handler(flow, name, args, kwargs, out)` returns False where they lose their scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modelopt.torch.trace.flow import Flow

KEEPS = frozenset(
    ("relu", "relu_", "leaky_relu", "leaky_relu_", "abs", "neg", "dropout", "prelu", "_prelu_kernel", "native_dropout")
)
SUMS = frozenset(("add", "add_", "sub", "sub_", "rsub"))
PRODUCTS = frozenset(("mul", "mul_", "div", "div_"))
POOLS = frozenset(
    ("max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool2d", "max_pool1d", "avg_pool1d",
     "max_pool3d_with_indices", "avg_pool3d", "_adaptive_avg_pool3d", "upsample_nearest2d", "upsample_bilinear2d")
)  # fmt: skip
NORMS = {"native_layer_norm": (2, 3), "native_group_norm": (1, 2), "native_batch_norm": (1, 2), "cudnn_batch_norm": (1, 2),
         "_native_batch_norm_legit_no_training": (1, 2), "_fused_rms_norm": (2, 2)}  # fmt: skip
REDUCES = frozenset(("mean", "sum"))


def _keep(flow: Flow, name: str, args: Any, kwargs: Any, out: Tensor) -> bool:
    if name == "_prelu_kernel" and id(args[1]) in flow.views and args[1].numel() > 1:
        return False
    flow.set(out, flow.of(args[0]))
    return True


def _pool(flow: Flow, name: str, args: Any, kwargs: Any, out: Tensor) -> bool:
    numbers = flow._along(args[0], 1) if out.dim() > 3 else None
    if numbers is None:
        return False
    flow.set(out, numbers.reshape(1, -1, *[1] * (out.dim() - 2)).expand(out.shape))
    return True


def _sum(flow: Flow, name: str, args: Any, kwargs: Any, out: Tensor) -> bool:
    a, b = args[0], args[1]
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    for x, parameter in ((a, b), (b, a)):
        view = flow.views.get(id(parameter))
        numbers = flow.of(x)
        if view is not None and numbers is not None and parameter.dim() == 1:
            rows = flow._along(x, -1)
            if rows is None or len(rows) != len(parameter):
                return False
            flow.also_makes((view.name, view.dims[0]), rows)
            flow.set(out, numbers)
            return True
    one, two = flow.of(a), flow.of(b)
    one = torch.full(a.shape, -1) if one is None else one
    two = torch.full(b.shape, -1) if two is None else two
    one, two = one.expand(out.shape), two.expand(out.shape)
    flow.same(one, two)
    flow.set(out, torch.maximum(one, two))
    return True


def _product(flow: Flow, name: str, args: Any, kwargs: Any, out: Tensor) -> bool:
    a, b = args[0], args[1]
    if not isinstance(b, Tensor):
        flow.set(out, flow.of(a))
        return True
    for x, parameter in ((a, b), (b, a)):
        view = flow.views.get(id(parameter))
        if view is None or name.startswith("div") or flow.alive(flow.of(x)):
            continue
        if parameter.dim() == 1 and parameter.numel() == out.shape[-1] > 1:
            flow.make((view.name, view.dims[0]), out, -1)
            return True
    one, two = flow.of(a), flow.of(b)
    if two is not None and (name.startswith("div") or flow.alive(one)):
        if name.startswith("div"):
            flow.kill(two)
        else:
            flow.kill(one)
            one = None
    chosen = one if one is not None else None if name.startswith("div") else two
    flow.set(out, None if chosen is None else chosen.expand(out.shape))
    return True


def _norm(flow: Flow, name: str, args: Any, kwargs: Any, out: Tensor) -> bool:
    flow.kill(flow.of(args[0]))
    dim = -1 if name in ("native_layer_norm", "_fused_rms_norm") else 1
    slots = [flow.views.get(id(args[i])) for i in dict.fromkeys(NORMS[name]) if isinstance(args[i], Tensor)]
    if not slots or any(s is None for s in slots):
        return True
    known = [s for s in slots if s is not None]
    flow.make((known[0].name, 0), out, dim)
    numbers = flow._along(out, dim)
    for view in known[1:]:
        if numbers is not None:
            flow.also_makes((view.name, 0), numbers)
    return True


def _matrix(flow: Flow, name: str, args: Any, kwargs: Any, out: Tensor) -> bool:
    bias, x, weight = (args[0], args[1], args[2]) if name in ("addmm", "baddbmm") else (None, args[0], args[1])
    view = flow.views.get(id(weight))
    if view is None or id(x) in flow.views:
        return bias is None and _activations(flow, x, weight, out)
    flow.read((view.name, view.dims[-2]), x, -1)
    flow.make((view.name, view.dims[-1]), out, -1)
    offset = flow.views.get(id(bias)) if bias is not None else None
    numbers = flow._along(out, -1)
    if numbers is not None and bias is not None:
        if offset is None:
            flow.kill(numbers)
        else:
            flow.also_makes((offset.name, offset.dims[-1]), numbers)
    return True


def _activations(flow: Flow, a: Tensor, b: Tensor, out: Tensor) -> bool:
    """A product of two activations: the right one hands its columns on if the left one has no channels to scale."""
    numbers = flow.of(b)
    flow.kill(flow.of(a))
    if numbers is None or not bool((numbers == numbers[..., :1, :]).all()):
        flow.kill(numbers)
        return True
    flow.set(out, numbers[..., :1, :].expand(out.shape))
    return True


def _attention(flow: Flow, name: str, args: Any, kwargs: Any, out: Tensor) -> bool:
    for tensor in args[:2]:
        flow.kill(flow.of(tensor))
    numbers = flow.of(args[2])
    if numbers is None or not bool((numbers == numbers[..., :1, :]).all()):
        return False
    row = numbers[..., :1, :]
    if row.dim() == 4 and row.shape[1] != out.shape[1]:
        row = row.repeat_interleave(out.shape[1] // row.shape[1], 1)
    flow.set(out, row.expand(out.shape))
    return True


def _convolution(flow: Flow, name: str, args: Any, kwargs: Any, out: Tensor) -> bool:
    x, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
    view = flow.views.get(id(weight))
    if view is None or transposed:
        return False
    slot = (view.name, view.dims[0])
    if groups == 1:
        flow.read((view.name, view.dims[1]), x, 1)
        flow.make(slot, out, 1)
    elif groups == x.shape[1] == out.shape[1]:  # every channel by itself
        numbers = flow._along(x, 1)
        if numbers is None or bias is not None:
            flow.kill(flow.of(x))
            flow.make(slot, out, 1)
        else:
            flow.set(out, numbers.reshape(1, -1, *[1] * (out.dim() - 2)).expand(out.shape))
            return True
    else:
        return False
    offset = flow.views.get(id(bias)) if bias is not None else None
    numbers = flow._along(out, 1)
    if offset is not None and numbers is not None:
        flow.also_makes((offset.name, 0), numbers)
    return True


def _lookup(flow: Flow, name: str, args: Any, kwargs: Any, out: Tensor) -> bool:
    view = flow.views.get(id(args[0]))
    if view is None:
        return False
    flow.make((view.name, 1), out, -1)
    return True


def _reduce(flow: Flow, name: str, args: Any, kwargs: Any, out: Tensor) -> bool:
    numbers = flow.of(args[0])
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    if numbers is None or dims is None:
        return False
    for dim in sorted(((d % numbers.dim()) for d in ([dims] if isinstance(dims, int) else dims)), reverse=True):
        first = numbers.narrow(dim, 0, 1)
        if not bool((numbers == first).all()):
            return False
        numbers = first if keep else first.squeeze(dim)
    flow.set(out, numbers)
    return True


HANDLERS: dict[str, Any] = {
    **dict.fromkeys(KEEPS, _keep),
    **dict.fromkeys(SUMS, _sum),
    **dict.fromkeys(PRODUCTS, _product),
    **dict.fromkeys(POOLS, _pool),
    **dict.fromkeys(NORMS, _norm),
    **dict.fromkeys(REDUCES, _reduce),
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "_grouped_mm"), _matrix),
    "convolution": _convolution,
    "embedding": _lookup,
    **dict.fromkeys(
        ("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
         "_scaled_dot_product_efficient_attention", "_scaled_dot_product_attention_math",
         "_scaled_dot_product_fused_attention_overrideable"), _attention,
    ),
}  # fmt: skip
