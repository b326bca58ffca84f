"""Sees every size that a model's code reads from a tensor or passes to an operation, while the model runs.

A `TorchFunctionMode`: `x.shape`, `x.size()`, `len(x)` and `x.numel()` give tainted ints for labelled dimensions, and each size
argument (view, expand, split, slice bounds, new tensors, normalized shapes, groups) becomes an equation
"what the code computes = what survives of that dimension". A literal is an equation too: it pins the dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode

from modelopt.torch.trace.axes.attention import multi_head_attention
from modelopt.torch.trace.axes.expr import Expr, Misplaced, Recording, Size, Tainted, as_number, expr_of, number


class Recorder(Protocol):
    """What is needed of the recorder of labels."""

    last_groups: Any

    def axes(self, tensor: torch.Tensor) -> Sequence[Any]:
        """Return the labelled axis of each dim of a live tensor, or None."""


Handler = Callable[["SizeMode", tuple[Any, ...], dict[str, Any], Any], Any]
HANDLERS: dict[Any, Handler] = {}
AROUND: dict[Any, Callable[..., Any]] = {F.multi_head_attention_forward: multi_head_attention}


def handles(*functions: Any) -> Callable[[Handler], Handler]:
    """Register a function to be called with (mode, args, kwargs, result) after any of `functions`; it returns the result."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update({f: handler for f in functions if f is not None})
        return handler

    return register


def _both(name: str) -> tuple[Any, ...]:
    """The function and the method of one name, where they exist."""
    return tuple(getattr(space, name, None) for space in (torch, torch.Tensor))


_ARITHMETIC = frozenset(
    {"add", "sub", "mul", "div", "truediv", "floordiv", "floor_divide", "true_divide", "divide", "multiply", "pow"}
)


_VALUES = frozenset({"alpha", "beta", "value", "fill_value", "min", "max", "negative_slope", "other", "weight", "scale", "p"})
_VALUE_ARGUMENTS = {
    "full": 1, "full_like": 1, "new_full": 2, "fill": 1, "clamp": 1, "clamp_min": 1, "clamp_max": 1, "masked_fill": 2,
}  # fmt: skip


def _is_arithmetic(func: Any) -> bool:
    name = getattr(func, "__name__", "").strip("_")
    return name in _ARITHMETIC or name[1:] in _ARITHMETIC  # radd, imul, ...


class SizeMode(TorchFunctionMode):
    """Turns sizes into tainted ints and size arguments into equations of `recording`."""

    def __init__(self, recorder: Recorder, recording: Recording):
        super().__init__()
        self.recorder, self.recording = recorder, recording

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        around = AROUND.get(func)
        if around is not None:
            with self:
                result = around(*args, **kwargs)
            if result is not None:
                return result
        result = func(*args, **kwargs)
        self._values(func, args, kwargs)
        handler = HANDLERS.get(func)
        if handler is not None:
            return handler(self, args, kwargs, result)
        for value in args:
            if type(value) is Tainted and _is_arithmetic(func):
                as_number(value)
        return result

    def _values(self, func: Any, args: Any, kwargs: Any) -> None:
        """A size that enters an op as a value (a factor, a bound, what a tensor is filled with) must stay what it is."""
        name = getattr(func, "__name__", "").rstrip("_")
        given = [v for k, v in kwargs.items() if k in _VALUES and name != "histc"]  # its bounds follow its number of bins
        first = _VALUE_ARGUMENTS.get(name)
        for value in (*given, *(args[first:] if first is not None else ())):
            if type(value) is Tainted:
                as_number(value)

    # ---- what the handlers use
    def axes(self, tensor: torch.Tensor) -> Sequence[Any]:
        """The labelled axes of a tensor, None for a dimension that is never pruned."""
        if is_functorch_wrapped_tensor(tensor):  # inside vmap: what is labelled is the tensor below
            return (None,) * tensor.dim()
        return self.recorder.axes(tensor)

    def length(self, given: Any, axis: Any, size: int, what: str) -> None:
        """Record that `given`, as the code computed it, is the length of a dim with this axis and present size."""
        if isinstance(given, np.integer) or (isinstance(given, torch.Tensor) and given.device.type != "meta"):
            given = int(given)  # the code computed it where it cannot be followed: a literal
        if isinstance(given, bool) or not isinstance(given, int) or given < 0:
            return
        expr = expr_of(given)
        if axis is not None and size > 1:
            self.recording.add(expr, "==", Size(axis), what)
        elif expr != size:
            self.recording.add(expr, "==", size, what)

    def lengths(self, given: Sequence[Any], tensor: torch.Tensor, what: str) -> None:
        """The same for all dims of a tensor; -1 says nothing."""
        if len(given) == tensor.dim():
            for size, axis, now in zip(given, self.axes(tensor), tensor.shape, strict=True):
                if not (type(size) is int and size == -1):
                    self.length(size, axis, now, what)

    def size(self, tensor: torch.Tensor, dim: int) -> Expr:
        """The expression of a tensor's size in one dim."""
        axis = self.axes(tensor)[dim] if tensor.dim() else None
        return tensor.shape[dim] if axis is None or tensor.shape[dim] < 2 else Size(axis)

    def taint(self, expr: Expr, value: int) -> int:
        """An int that remembers `expr`; a constant stays plain."""
        return value if isinstance(expr, int) else Tainted(value, expr, self.recording)


# ---- sizes that the code reads
@handles(torch.Tensor.size, torch.Tensor.shape.__get__)  # type: ignore[attr-defined]
def _read_size(mode: SizeMode, args: Any, kwargs: Any, result: Any) -> Any:
    if isinstance(result, torch.Size):
        axes = mode.axes(args[0])
        if all(a is None for a in axes):
            return result
        return torch.Size([mode.taint(mode.size(args[0], k), n) for k, n in enumerate(result)])
    dim = args[1] if len(args) > 1 else kwargs["dim"]
    return mode.taint(mode.size(args[0], dim), result)


@handles(torch.Tensor.__len__)
def _read_len(mode: SizeMode, args: Any, kwargs: Any, result: Any) -> Any:
    return mode.taint(mode.size(args[0], 0), result)  # the interpreter makes len() plain again; t.__len__() keeps it


@handles(torch.Tensor.numel, torch.Tensor.nelement, torch.numel)
def _read_numel(mode: SizeMode, args: Any, kwargs: Any, result: Any) -> Any:
    expr: Expr = 1
    for k in range(args[0].dim()):
        size = mode.size(args[0], k)
        expr = expr * size if isinstance(expr, int) and isinstance(size, int) else ("*", expr, size)
    return mode.taint(expr, result)


# ---- sizes that the code passes
def _flat(given: Sequence[Any]) -> Sequence[Any]:
    return given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given


def _name_of_size(kwargs: dict[str, Any]) -> Any:
    return kwargs.get("size", kwargs.get("shape", ()))


@handles(*_both("reshape"), torch.Tensor.view, torch.Tensor.expand, *_both("broadcast_to"), torch.Tensor.new_zeros,
         torch.Tensor.new_ones, torch.Tensor.new_empty, torch.Tensor.new_full, torch.Tensor.resize_)  # fmt: skip
def _shaped(mode: SizeMode, args: Any, kwargs: Any, result: Any) -> Any:
    given = args[1:] if len(args) > 1 else (_name_of_size(kwargs),)
    given = given[0] if isinstance(given[0], (tuple, list)) else given
    if not (given and isinstance(given[0], torch.dtype)):
        mode.lengths(given, result, "size argument")
    return result


@handles(torch.zeros, torch.ones, torch.empty, torch.full, torch.rand, torch.randn)
def _factory(mode: SizeMode, args: Any, kwargs: Any, result: Any) -> Any:
    given = args or (_name_of_size(kwargs),)
    mode.lengths(given[0] if isinstance(given[0], (tuple, list)) else given, result, "size of a new tensor")
    return result


@handles(torch.eye)
def _eye(mode: SizeMode, args: Any, kwargs: Any, result: Any) -> Any:
    mode.lengths(args if len(args) == 2 else args[:1] * 2, result, "size of a new tensor")
    return result


@handles(torch.arange)
def _arange(mode: SizeMode, args: Any, kwargs: Any, result: Any) -> Any:
    start, end = (args[0], args[1]) if len(args) > 1 else (kwargs.get("start", 0), args[0] if args else kwargs["end"])
    step = args[2] if len(args) > 2 else kwargs.get("step", 1)
    if all(isinstance(v, int) for v in (start, end, step)) and step > 0:
        span = end - start if start != 0 else end
        mode.length(span if step == 1 else (span + step - 1) // step, mode.axes(result)[0], result.shape[0], "torch.arange")
    return result


@handles(torch.Tensor.view_as, torch.Tensor.reshape_as, torch.Tensor.expand_as)
def _shaped_as(mode: SizeMode, args: Any, kwargs: Any, result: Any) -> Any:
    other = args[1]
    mode.lengths([mode.taint(mode.size(other, k), n) for k, n in enumerate(other.shape)], result, "shape of another tensor")
    return result


@handles(torch.Tensor.repeat, *_both("tile"))
def _repeat(mode: SizeMode, args: Any, kwargs: Any, result: Any) -> Any:
    times = _flat(args[1:]) if len(args) > 1 else kwargs.get("repeats", kwargs.get("dims", ()))
    x, lead = args[0], len(times) - args[0].dim()
    if lead < 0:
        return result
    for k, n in enumerate(times):
        inner = mode.size(x, k - lead) if k >= lead else 1
        _times(mode, n, inner, x.shape[k - lead] if k >= lead else 1, result, k)
    return result


def _times(mode: SizeMode, n: Any, inner: Expr, size: int, result: torch.Tensor, dim: int) -> None:
    axis = mode.axes(result)[dim]
    if not isinstance(n, int) or (axis is None and isinstance(expr_of(n), int)):
        return
    # where the repeated dim has labels of its own, its copies survive together and the number of copies must stay
    if isinstance(inner, int) and size == 1:
        mode.length(n, axis, result.shape[dim], "repeat")
    else:
        mode.length(n, None, number(n), "repeat")
        if axis is not None:
            mode.recording.add(("*", number(n), inner), "==", Size(axis), "repeat")


@handles(*_both("repeat_interleave"))
def _repeat_interleave(mode: SizeMode, args: Any, kwargs: Any, result: Any) -> Any:
    n = args[1] if len(args) > 1 else kwargs.get("repeats")
    dim = args[2] if len(args) > 2 else kwargs.get("dim")
    if isinstance(n, int) and dim is not None:
        axis = mode.axes(result)[dim]
        left = ("*", expr_of(n), mode.size(args[0], dim))
        mode.recording.add(left, "==", result.shape[dim] if axis is None else Size(axis), "repeat_interleave")
    return result


@handles(torch.Tensor.unflatten, torch.unflatten)
def _unflatten(mode: SizeMode, args: Any, kwargs: Any, result: Any) -> Any:
    dim = args[1] if len(args) > 1 else kwargs["dim"]
    sizes = args[2] if len(args) > 2 else kwargs["sizes"]
    first = dim % args[0].dim()
    axes = mode.axes(result)
    for k, size in enumerate(sizes):
        if size != -1:
            mode.length(size, axes[first + k], result.shape[first + k], "unflatten")
    return result


@handles(*_both("split"), *_both("split_with_sizes"), *_both("unsafe_split"))
def _split(mode: SizeMode, args: Any, kwargs: Any, result: Any) -> Any:
    given = args[1] if len(args) > 1 else next((kwargs[k] for k in kwargs if k.startswith("split_size")), None)
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    if isinstance(given, int):
        given = [given if part.shape[dim] == given else -1 for part in result]
    for size, part in zip(given or (), result, strict=False):
        if size != -1:
            mode.length(size, mode.axes(part)[dim], part.shape[dim], "split")
    return result


@handles(*_both("chunk"), *_both("unsafe_chunk"), *_both("tensor_split"))
def _chunk(mode: SizeMode, args: Any, kwargs: Any, result: Any) -> Any:
    n = args[1] if len(args) > 1 else kwargs.get("chunks", kwargs.get("sections"))
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    if not isinstance(n, int) or not result:
        return result
    first = mode.size(result[0], dim)
    for part in result[1:]:
        other = mode.size(part, dim)
        if part.shape[dim] == result[0].shape[dim]:
            mode.recording.add(first, "==", other, "chunk into equal parts")
        elif not isinstance(first, int) or not isinstance(other, int):  # an uneven chunk: its sizes are pinned
            mode.recording.add(first, "==", result[0].shape[dim], "chunk")
            mode.recording.add(other, "==", part.shape[dim], "chunk")
    if not isinstance(expr_of(n), int):
        mode.recording.add(expr_of(n), "==", len(result), "number of chunks")
    return result


@handles(*_both("narrow"))
def _narrow(mode: SizeMode, args: Any, kwargs: Any, result: Any) -> Any:
    names = ("dim", "start", "length")
    dim, start, length = (args[k + 1] if len(args) > k + 1 else kwargs[n] for k, n in enumerate(names))
    if isinstance(start, int) and isinstance(length, int):
        _bounds(mode, args[0], dim, slice(start, start + length if start != 0 else length))
    return result


@handles(torch.Tensor.__getitem__, torch.Tensor.__setitem__)
def _getitem(mode: SizeMode, args: Any, kwargs: Any, result: Any) -> Any:
    x, index = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
    if not any(isinstance(i, slice) and i != slice(None) for i in index):
        return result
    taken = sum(_dims_of(i) for i in index if i is not Ellipsis)
    dim = 0
    for i in index:
        if i is Ellipsis:
            dim += x.dim() - taken
        elif isinstance(i, slice):
            _bounds(mode, x, dim, i)
            dim += 1
        else:
            dim += _dims_of(i)
    return result


def _dims_of(index: Any) -> int:
    """How many dims one index uses up."""
    if isinstance(index, torch.Tensor) and index.dtype == torch.bool:
        return index.dim()
    return 0 if index is None else 1


def _bounds(mode: SizeMode, x: torch.Tensor, dim: int, part: slice) -> None:
    axis, n = mode.axes(x)[dim], x.shape[dim]
    step = 1 if part.step is None else part.step
    if step != 1 and axis is not None:
        mode.recording.add(Misplaced(axis, number(part.start or 0), number(step)), "==", 0, "slice with a step")
    for bound in (part.start, part.stop):
        if not isinstance(bound, int) or bound == 0:
            continue
        expr = expr_of(bound)
        if axis is None:
            continue  # nothing is cut from this dim, and a bound beyond what is there is no error
        if step != 1:
            mode.recording.add(expr, "==", number(bound), "slice with a step")
        elif bound < 0:
            mode.recording.add(("-", 0, expr), "==", Size(axis, max(n + bound, 0), n), "slice")
        elif bound >= n:
            mode.recording.add(expr, ">=", Size(axis), "slice")
        else:
            mode.recording.add(expr, "==", Size(axis, 0, number(bound)), "slice")


# ---- layers that take a size or a number of groups
@handles(F.layer_norm, F.rms_norm)
def _normalized(mode: SizeMode, args: Any, kwargs: Any, result: Any) -> Any:
    shape = tuple(args[1] if len(args) > 1 else kwargs["normalized_shape"])
    axes = mode.axes(result)
    for k, size in enumerate(reversed(shape)):
        mode.length(size, axes[-1 - k], result.shape[-1 - k], "normalized_shape")
    return result


def _groups(mode: SizeMode, groups: Any, result: torch.Tensor, what: str) -> torch.Tensor:
    if isinstance(groups, int) and groups > 1:
        mode.length(groups, mode.recorder.last_groups, number(groups), what)
    return result


@handles(F.group_norm)
def _group_norm(mode: SizeMode, args: Any, kwargs: Any, result: Any) -> Any:
    return _groups(mode, args[1] if len(args) > 1 else kwargs["num_groups"], result, "number of groups")


@handles(F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d)
def _conv(mode: SizeMode, args: Any, kwargs: Any, result: Any) -> Any:
    return _groups(mode, args[6] if len(args) > 6 else kwargs.get("groups", 1), result, "groups of a convolution")


@handles(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def _conv_transpose(mode: SizeMode, args: Any, kwargs: Any, result: Any) -> Any:
    return _groups(mode, args[6] if len(args) > 6 else kwargs.get("groups", 1), result, "groups of a convolution")
