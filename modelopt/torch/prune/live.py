"""Runs a model some of whose entries are dead (removed by a pruner) as if those did not exist, without shrinking a tensor.

Beside each storage that holds dead elements lives a mask of the same layout, so that views need no rule. A dead element is always
zero; what an op makes of dead elements follows from the meaning of the op, never from the pruner:

    pointwise      dead where an operand is dead          movement       the op itself, applied to the mask
    contraction    alive where one product is alive       reduction      over live elements: mean(x) = sum(x) / number of live x
    normalization  statistics over live elements          softmax, topk  a dead element is -inf

An op without a rule keeps its values; its mask is that of a dead input of the same shape, and its name goes to `unknown`.
Everything is computed in float64: a cast of the model to a narrower float is widened, or two orders of summation would differ.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

NARROW = (torch.float32, torch.float16, torch.bfloat16)
ALIASES = {
    "_unsafe_view",
    "unsafe_split",
    "unsafe_split_with_sizes",
    "lift_fresh",
    "_reshape_alias",
    "detach",
    "alias",
    "as_strided",
}
COPIES = {
    "clone", "_to_copy", "cumsum", "tril", "triu", "bernoulli", "native_dropout", "cumprod", "log_sigmoid_forward", "masked_fill",
    "_prelu_kernel", "hardswish", "linalg_solve_triangular",
}  # fmt: skip
LIKE = {"zeros_like", "ones_like", "empty_like", "rand_like", "randn_like", "full_like"}
NO_DATA = {"new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided", "_local_scalar_dense", "equal", "nonzero"}
MOVEMENT = re.compile(
    r"cat|stack|index|index_(select|fill|copy|add|put)|_unsafe_index|_index_put_impl|gather|take|embedding|masked_(scatter|select)|"
    r"scatter|scatter_add|(slice|select)_scatter|(constant|reflection|replication)_pad\w*|roll|flip|repeat|diag_embed|im2col|col2im|"
    r"(pixel|channel)_(un)?shuffle|_?upsample_\w+|(_?adaptive_)?(avg|max)_pool[123]d(_with_indices)?|grid_sampler_[23]d|\w+_copy"
)
CONTRACTIONS = {"mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "_grouped_mm", "linear", "matmul"}
BIASED = {"addmm", "baddbmm", "addbmm", "addmv"}
SMOOTH = {  # strictly monotone, and positive where the original is
    "aten::relu": torch.ops.aten.softplus.default, "aten::hardtanh": torch.ops.aten.softplus.default,
    "aten::threshold": torch.ops.aten.softplus.default, "aten::hardsigmoid": torch.ops.aten.sigmoid.default,
    "aten::hardswish": torch.ops.aten.silu.default,
}  # fmt: skip
LARGEST = {"amax", "argmax", "max", "topk", "sort", "_softmax", "_log_softmax", "_safe_softmax", "logsumexp", "argsort"}
SMALLEST = {"amin", "argmin", "min", "kthvalue"}
SUMS = {"sum", "linalg_vector_norm", "norm", "any", "count_nonzero", "nansum"}


def widen(kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Return the keyword arguments of an op with a narrow float dtype replaced by float64."""
    kwargs = dict(kwargs or {})
    if kwargs.get("dtype") in NARROW:
        kwargs["dtype"] = torch.float64
    return kwargs


def tensors_in(value: object) -> list[Tensor]:
    """Return the tensors among the arguments of an op, one level of lists deep."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [t for item in value for t in tensors_in(item)]
    return []


class Float64Mode(TorchDispatchMode):
    """Widens every narrow float that a model asks for; `smooth` replaces activations that switch units off."""

    def __init__(self, smooth: bool = False) -> None:
        super().__init__()
        self.smooth = smooth

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if self.smooth and name.rstrip("_") in SMOOTH:
            out = self.run(SMOOTH[name.rstrip("_")], args[:1], {})
            return self.run(torch.ops.aten.copy_.default, (args[0], out), {}) if name.endswith("_") else out
        return self.run(func, args, widen(kwargs))

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run one op."""
        return func(*args, **kwargs)


class LiveMode(Float64Mode):
    """The dispatch mode of the module docstring: `mark` the dead entries of parameters, then run the model inside it."""

    def __init__(self, smooth: bool = False) -> None:
        super().__init__(smooth)
        self._masks: dict[tuple[int, int], tuple[StorageWeakRef, Tensor]] = {}
        self.unknown: Counter[str] = Counter()

    def mark(self, tensor: Tensor, dead: Tensor | None) -> None:
        """Declare the elements of `tensor` where `dead` (bool, broadcastable) to be dead; they must be zero already."""
        storage = tensor.untyped_storage()
        size = tensor.element_size()
        key = (storage._cdata, size)
        entry = self._masks.get(key)
        if dead is None or not bool(dead.any()):
            if entry is None or entry[0].expired():
                return
            dead = torch.zeros((), dtype=torch.bool)
        if entry is None or entry[0].expired():
            flat = torch.zeros(storage.nbytes() // size, dtype=torch.bool)
            entry = self._masks[key] = (StorageWeakRef(storage), flat)
        view = entry[1].as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
        view.copy_(dead.expand(tensor.shape))

    def dead(self, tensor: Tensor) -> Tensor | None:
        """Return the mask of the dead elements of `tensor`, or None when all of it is alive."""
        entry = self._masks.get((tensor.untyped_storage()._cdata, tensor.element_size()))
        if entry is None or entry[0].expired():
            return None
        view = entry[1].as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
        return view if bool(view.any()) else None

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run one op on live and dead elements."""
        inputs = tensors_in(args) + tensors_in(list(kwargs.values()))
        if not self._masks or all(t.layout is not torch.strided or self.dead(t) is None for t in inputs):
            return func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if (func.is_view or name in ALIASES) and name not in ("view_as_real", "view_as_complex"):
            return func(*args, **kwargs)  # the storage, and with it the mask, is shared
        result, dead = self._apply(name.rstrip("_") if func._schema.is_mutable else name, func, args, kwargs)
        for tensor, mask in zip(tensors_in(result), dead, strict=False):
            if mask is not None and not func.is_view and tensor.dtype != torch.bool:
                tensor.masked_fill_(mask, 0)
            self.mark(tensor, mask)
        return result

    # ---- one method per family of ops: (result, masks of its tensors)

    def _apply(self, name: str, func: Any, args: Any, kwargs: Any) -> tuple[Any, list[Tensor | None]]:
        rule = RULES.get(name)
        if rule is None and name not in COPIES and MOVEMENT.fullmatch(name):
            rule = LiveMode._movement
        if rule is not None:
            return rule(self, func, args, kwargs)
        if torch.Tag.pointwise in func.tags or name in COPIES or name in LIKE:
            return self._pointwise(func, args, kwargs)
        result = func(*args, **kwargs)
        self.unknown[name] += 1
        masks = [(t.shape, self.dead(t)) for t in tensors_in(args)]
        return result, [
            next((m for shape, m in masks if m is not None and shape == out.shape), None) for out in tensors_in(result)
        ]

    def _pointwise(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, list[Tensor | None]]:
        masks = [m for m in map(self.dead, tensors_in(args)) if m is not None]
        dead = masks[0]
        for mask in masks[1:]:
            dead = dead | mask
        dead = dead.clone()  # the op may write where the mask is read
        result = func(*args, **kwargs)
        return result, [dead.expand(out.shape) if _fits(dead, out) else None for out in tensors_in(result)]

    def _copy(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, list[Tensor | None]]:
        dead = self.dead(args[1]) if isinstance(args[1], Tensor) else None
        dead = None if dead is None else dead.clone()
        return func(*args, **kwargs), [dead]

    def _movement(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, list[Tensor | None]]:
        def swap(value: Any) -> Any:
            if isinstance(value, Tensor):
                if not (value.is_floating_point() or value.is_complex() or self.dead(value) is not None):
                    return value
                mask = self.dead(value)
                return torch.zeros(value.shape, dtype=torch.float64) if mask is None else mask.to(torch.float64)
            if isinstance(value, list | tuple):
                return type(value)(swap(v) for v in value)
            return value

        masks_args = [swap(a) for a in args]
        for i, argument in enumerate(func._schema.arguments[: len(args)]):
            if argument.name == "value" and not isinstance(args[i], Tensor):
                masks_args[i] = 0  # what is filled in is alive
        moved = func(*masks_args, **{k: 0 if k == "value" else swap(v) for k, v in kwargs.items()})
        result = func(*args, **kwargs)
        pairs = zip(tensors_in(result), tensors_in(moved), strict=True)
        return result, [m > 0 if out.is_floating_point() or out.is_complex() else None for out, m in pairs]

    def _alive(self, tensor: Tensor) -> Tensor:
        dead = self.dead(tensor)
        return torch.ones(tensor.shape, dtype=torch.float64) if dead is None else (~dead).to(torch.float64)

    def _contraction(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, list[Tensor | None]]:
        result = func(*args, **kwargs)
        biased = func._schema.name.split("::")[1].rstrip("_") in BIASED
        operands = [self._alive(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        if biased:
            operands[0] = torch.zeros((), dtype=torch.float64).expand(args[0].shape).contiguous()
        clean = {k: v for k, v in kwargs.items() if k not in ("beta", "alpha", "out_dtype", "bias")}
        return result, [func(*operands, **clean) <= 0.5]

    def _convolution(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, list[Tensor | None]]:
        result = func(*args, **kwargs)
        reach = func(self._alive(args[0]), self._alive(args[1]), None, *args[3:], **kwargs)
        spatial = tuple(range(2, reach.dim()))
        return result, [(reach.amax(spatial, keepdim=True) <= 0.5).expand(result.shape)]

    def _complex_view(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, list[Tensor | None]]:
        result, dead = func(*args, **kwargs), self.dead(args[0])
        if dead is None:
            return result, [None]
        return result, [dead.unsqueeze(-1).expand(result.shape) if result.is_floating_point() else dead.any(-1)]

    def _mean(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, list[Tensor | None]]:
        x, dims, keep = _reduction(func, args, kwargs)
        live = self._alive(x)
        count = live.sum(dims, keepdim=keep)
        return x.sum(dims, keepdim=keep, dtype=kwargs.get("dtype")) / count.clamp(min=1), [count == 0]

    def _variance(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, list[Tensor | None]]:
        x, dims, keep = _reduction(func, args, kwargs)
        correction = kwargs.get("correction", 1)
        live = self._alive(x)
        count = live.sum(dims, keepdim=True)
        mean = x.sum(dims, keepdim=True) / count.clamp(min=1)
        out = ((x - mean) * live).square().sum(dims, keepdim=True) / (count - (1 if correction is None else correction)).clamp(
            min=0
        )
        name = func._schema.name.split("::")[1]
        out = out.sqrt() if name.startswith("std") else out
        if not keep:
            shape = [s for d, s in enumerate(x.shape) if d not in dims]
            out, mean, count = out.reshape(shape), mean.reshape(shape), count.reshape(shape)
        dead = count == 0
        return ((out, mean), [dead, dead]) if name.endswith("_mean") else (out, [dead])

    def _reduce(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, list[Tensor | None]]:
        """Sums, extrema, softmax, sorting: a dead element takes the value that does not count."""
        name, x, dead = func._schema.name.split("::")[1], args[0], self.dead(args[0])
        if len(args) > 1 and isinstance(args[1], Tensor):  # max(x, y)
            return self._pointwise(func, args, kwargs)
        given = _given(func, args, kwargs)
        lowest = name in SMALLEST or (name == "topk" and not given.get("largest", True))
        lowest = lowest or (name in ("sort", "argsort") and not given.get("descending", False))
        if name in LARGEST | SMALLEST and x.is_floating_point():
            x = x.masked_fill(dead, math.inf if lowest else -math.inf)
        else:
            x = x.masked_fill(dead, 1 if name in ("prod", "all") else 0)
        result = func(x, *args[1:], **kwargs)
        outs = tensors_in(result)
        if "softmax" in name:  # a row of dead and masked elements alone is not a number
            return result.masked_fill(result.isnan() & dead.any(args[1], keepdim=True), 0), [dead]
        if name in ("topk", "sort"):
            return result, [dead.gather(given.get("dim", -1), outs[1]), None]
        _, dims, keep = _reduction(func, args, kwargs)
        for d in sorted(dims, reverse=True):
            dead = dead.all(d, keepdim=keep)
        return result, [dead if out.is_floating_point() and dead.shape == out.shape else None for out in outs]

    def _glu(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, list[Tensor | None]]:
        first, second = self.dead(args[0]).chunk(2, args[1] if len(args) > 1 else -1)
        return func(*args, **kwargs), [first | second]

    def _weight_norm(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, list[Tensor | None]]:
        return func(*args, **kwargs), [self._with_weight(self.dead(args[0]), args[1]), None]

    def _fft(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, list[Tensor | None]]:
        result, dead = func(*args, **kwargs), self.dead(args[0])
        for d in args[1]:
            dead = dead.all(d, keepdim=True)
        return result, [dead.expand(result.shape)]

    def _no_data(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, list[Tensor | None]]:
        return func(*args, **kwargs), [None]

    def _layer_norm(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, list[Tensor | None]]:
        x, shape, weight, bias = args[:4]
        dims = tuple(range(x.dim() - len(shape), x.dim()))
        out, mean, rstd, dead = self._standardize(x, dims, args[4])
        return (self._affine(out, weight, bias), mean, rstd), [self._with_weight(dead, weight), None, None]

    def _rms_norm(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, list[Tensor | None]]:
        x, shape, weight = args[:3]
        eps = args[3] if len(args) > 3 and args[3] is not None else torch.finfo(x.dtype).eps
        dims = tuple(range(x.dim() - len(shape), x.dim()))
        live = self._alive(x)
        rstd = (x.square().sum(dims, keepdim=True) / live.sum(dims, keepdim=True).clamp(min=1) + eps).rsqrt()
        return (self._affine(x * rstd, weight, None), rstd), [self._with_weight(self.dead(x), weight), None]

    def _group_norm(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, list[Tensor | None]]:
        x, weight, bias, n, channels, _, groups, eps = args
        live = self._alive(x).reshape(n, groups, -1)
        out, mean, rstd, _ = self._standardize(x.reshape(n, groups, -1), (2,), eps, live)
        shape = (1, channels, *[1] * (x.dim() - 2))
        weight, bias = (None if t is None else t.reshape(shape) for t in (weight, bias))
        dead = self._with_weight(self.dead(x), weight)
        return (self._affine(out.reshape(x.shape), weight, bias), mean.view(n, groups), rstd.view(n, groups)), [dead, None, None]

    def _batch_norm(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, list[Tensor | None]]:
        named = _given(func, args, kwargs)
        x, shape = named["input"], (1, -1, *[1] * (named["input"].dim() - 2))
        weight, bias = (None if named.get(k) is None else named[k].reshape(shape) for k in ("weight", "bias"))
        mean, var = named.get("running_mean"), named.get("running_var")
        training = named.get("training", named.get("train", "no_training" not in func._schema.name))
        if training or mean is None:
            dims = tuple(d for d in range(x.dim()) if d != 1)
            out, _, _, dead = self._standardize(x, dims, named["eps"])
        else:
            out = (x - mean.reshape(shape)) / (var.reshape(shape) + named["eps"]).sqrt()
            dead = self._with_weight(self.dead(x), mean.reshape(shape))
        empty = x.new_empty(0)
        return (self._affine(out, weight, bias), empty, empty.clone()), [self._with_weight(dead, weight), None, None]

    def _standardize(
        self, x: Tensor, dims: tuple[int, ...], eps: float, live: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        live = self._alive(x) if live is None else live
        count = live.sum(dims, keepdim=True).clamp(min=1)
        mean = x.sum(dims, keepdim=True) / count
        rstd = (((x - mean) * live).square().sum(dims, keepdim=True) / count + eps).rsqrt()
        return (x - mean) * rstd * live, mean, rstd, live == 0

    @staticmethod
    def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        x = x if weight is None else x * weight
        return x if bias is None else x + bias

    def _with_weight(self, dead: Tensor | None, weight: Tensor | None) -> Tensor | None:
        other = None if weight is None else self.dead(weight)
        if dead is None or other is None:
            return other if dead is None else dead
        return dead | other


def _fits(mask: Tensor, out: Tensor) -> bool:
    return mask.dim() <= out.dim() and all(m in (1, o) for m, o in zip(reversed(mask.shape), reversed(out.shape), strict=False))


def _given(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    return dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | kwargs


def _reduction(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, tuple[int, ...], bool]:
    """Return the input, the reduced dims and keepdim of a reduction, whatever its overload."""
    given = _given(func, args, kwargs)
    x = args[0]
    dim = given.get("dim")
    dims = list(range(x.dim())) if dim is None or dim == [] else [dim] if isinstance(dim, int) else list(dim)
    return x, tuple(d % x.dim() for d in dims), bool(given.get("keepdim", False))


Rule = Callable[[LiveMode, Any, Any, Any], tuple[Any, list[Tensor | None]]]
RULES: dict[str, Rule] = dict.fromkeys(CONTRACTIONS, LiveMode._contraction)
RULES |= dict.fromkeys(LARGEST | SMALLEST | SUMS | {"prod", "all"}, LiveMode._reduce)
RULES |= dict.fromkeys(("var", "std", "var_mean", "std_mean"), LiveMode._variance)
RULES |= dict.fromkeys(("convolution", "_convolution"), LiveMode._convolution)
RULES |= dict.fromkeys(
    ("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"), LiveMode._batch_norm
)
RULES |= {
    "view_as_real": LiveMode._complex_view,
    "view_as_complex": LiveMode._complex_view,
    "copy": LiveMode._copy,
    "fill": LiveMode._copy,
}
RULES |= {"mean": LiveMode._mean, "native_layer_norm": LiveMode._layer_norm, "native_group_norm": LiveMode._group_norm}
RULES |= {"_fused_rms_norm": LiveMode._rms_norm}
RULES |= dict.fromkeys(("_fft_r2c", "_fft_c2r", "_fft_c2c"), LiveMode._fft) | {
    "glu": LiveMode._glu,
    "_weight_norm_interface": LiveMode._weight_norm,
}
RULES |= dict.fromkeys(NO_DATA, LiveMode._no_data)
