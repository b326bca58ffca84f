"""Running a model that has no weights: floats live on the meta device, integers and booleans are always real.

Position ids, masks and lengths come out right, so that Python can branch on them. What weights would decide is made up: indices
(of a router's top experts, of a sort) go round the choices, and comparisons of floats are false.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_BY_SHAPE = ("new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like", "empty_like")
_INDEXING = ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_")


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _real(tensor: Tensor) -> Tensor:
    """Return integers without values as zeros on the CPU."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta and not _is_float(tensor) else tensor


def _round_robin(name: str, args: Any, like: Tensor) -> Tensor:
    """Return indices of the shape of `like` that go round the choices along the dimension that was searched."""
    source = args[0]
    dim = next((a for a in args[1:] if isinstance(a, int)), -1) if name not in ("topk", "multinomial") else -1
    if name == "topk" and len(args) > 2:
        dim = args[2]
    choices = source.shape[dim] if source.dim() else 1
    if like.dim() == source.dim() and source.dim():
        moved = like.movedim(dim, -1).shape
        order = torch.arange(like.numel(), dtype=like.dtype).reshape(moved) % choices
        return order.movedim(-1, dim).contiguous()
    return (torch.arange(max(1, like.numel()), dtype=like.dtype)[: like.numel()] % choices).reshape(like.shape)


class RealIntegers(TorchDispatchMode):
    """Inside, a model on the meta device runs its own forward, data-dependent branches included. Enter it after other modes.

    >>> with torch.device("meta"):
    ...     router = torch.nn.Linear(8, 4)
    >>> with RealIntegers(), torch.no_grad():
    ...     print(router(torch.empty(1, 8, device="meta")).topk(2).indices.tolist())
    [[0, 1]]
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        args, kwargs = tree_map_only(Tensor, _real, (args, kwargs))
        found: list[Tensor] = []
        tree_map_only(Tensor, found.append, (args, kwargs))
        on_meta = any(t.is_meta for t in found)
        name = func.overloadpacket.__name__
        if not on_meta:
            if name == "histc" and not _is_float(args[0]):  # models count tokens per expert so, except on the CPU
                return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
            return self._without_floats(func, args, kwargs)
        if name in _INDEXING:
            args = (args[0], [_positions(i) for i in args[1]], *args[2:])
            args = (args[0], [j for i in args[1] for j in i], *args[2:])
        if name in _BY_SHAPE:
            dtype = kwargs.get("dtype")
            if dtype is not None and not dtype.is_floating_point and not dtype.is_complex:
                like = torch.empty((), dtype=args[0].dtype).expand(args[0].shape)
                return func(like, *args[1:], **{**kwargs, "device": "cpu"})
        moved = tree_map_only(Tensor, lambda t: t.to("meta") if t.dim() and not t.is_meta else t, (args, kwargs))
        if name == "_grouped_mm" and moved[0][0].dtype != torch.bfloat16:  # knows one dtype only where there are no values
            halves = [t.to(torch.bfloat16) if isinstance(t, Tensor) and _is_float(t) else t for t in moved[0]]
            return func(*halves, **moved[1]).to(moved[0][0].dtype)
        return self._made_up(name, args, func(*moved[0], **moved[1]))

    def _without_floats(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "meta":
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and not _is_float(result):
            return func(*args, **{**kwargs, "device": torch.device("cpu")})
        return result

    def _made_up(self, name: str, args: Any, result: Any) -> Any:
        def value(tensor: Tensor) -> Tensor:
            if not tensor.is_meta or _is_float(tensor):
                return tensor
            searched = args and isinstance(args[0], Tensor) and _is_float(args[0]) and tensor.dtype == torch.int64
            return _round_robin(name, args, tensor) if searched else torch.zeros(tensor.shape, dtype=tensor.dtype)

        return tree_map_only(Tensor, value, result)


def _positions(index: Tensor | None) -> list[Tensor | None]:
    """Return a mask as the positions where it is true, one index for each of its dimensions."""
    if index is not None and not index.is_meta and index.dtype in (torch.bool, torch.uint8):
        return list(index.nonzero(as_tuple=True))
    return [index]
