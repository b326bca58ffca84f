"""Rotations: spaces in which a model may be turned by any orthogonal matrix and stays the same function.

    W_out -> Q W_out,  W_in -> W_in Q^T        residual stream under RMSNorm (its weight folded into the readers first)
    the same per head                          values and output projection, block by block

A space is the last dimension of some tensors, made by some parameters and read by others, with nothing in between that prefers a
basis. QuaRot (arXiv 2404.00456), SpinQuant (arXiv 2405.16406), SliceGPT (arXiv 2401.15024) use them by tables per model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from modelopt.core.errors import ShapeError
from modelopt.torch.trace.flow import MOVES, Slot, View
from modelopt.torch.trace.inputs import resolve_inputs, run
from modelopt.torch.trace.record_graph import leaves
from modelopt.torch.utils import unwrap_model

KEEPS = frozenset(("neg", "dropout", "native_dropout", "clone", "detach", "alias", "contiguous", "_to_copy", "lift_fresh"))
SUMS, SCALES = frozenset(("add", "add_", "sub", "sub_")), frozenset(("mul", "mul_", "div", "div_"))
BY_SHAPE = frozenset(
    ("zeros_like", "zeros", "new_zeros", "empty_like", "ones_like", "full_like", "new_ones", "new_empty", "new_full")
)
NORMS = frozenset(("native_layer_norm", "_fused_rms_norm"))


@dataclass(frozen=True, eq=False)
class RotationAxis:
    """One space: parameter dimensions to turn, and what must be folded first.

    Attributes:
        size: of the rotation matrix: of the whole space, or of one block (head) of it.
        producers: parameter dimensions whose indices are the space's basis, written: W -> Q W along them (all blocks alike).
        consumers: the same, read.
        norms: norm weight -> the parameter dimensions that read its output; fold the weight into them first.
        centered: layer norms subtract the mean in this space: fold the mean into the producers too.
    """

    size: int
    producers: tuple[Slot, ...]
    consumers: tuple[Slot, ...]
    norms: dict[str, tuple[Slot, ...]]
    centered: bool = False

    @property
    def name(self) -> str:
        """The first producer: `model.embed_tokens.weight.1`."""
        return f"{self.producers[0][0]}.{self.producers[0][1]}"

    def apply(self, model: nn.Module, rotation: Tensor) -> None:
        """Fold the norms and turn the space by an orthogonal `rotation` [size, size], in place. Raises ShapeError.

        Only for spaces that are not `centered`.
        """
        if tuple(rotation.shape) != (self.size, self.size) or self.centered:
            raise ShapeError(f"{self.name} takes a [{self.size}, {self.size}] rotation and no layer norms that center.")
        parameters: dict[str, Tensor] = dict(unwrap_model(model).named_parameters())
        with torch.no_grad():
            for norm, readers in self.norms.items():
                for name, dim in readers:
                    _along(parameters, name, dim, lambda w, scale=parameters[norm]: w * scale.to(w.dtype))
                parameters[norm].fill_(1)
            for name, dim in dict.fromkeys((*self.producers, *self.consumers)):
                _along(parameters, name, dim, self._turn(rotation))

    def _turn(self, rotation: Tensor) -> Any:
        def turned(w: Tensor) -> Any:
            return (w.unflatten(-1, (-1, self.size)) @ rotation.T.to(w.device, w.dtype)).flatten(-2)

        return turned


def _along(parameters: dict[str, Tensor], name: str, dim: int, change: Any) -> None:
    whole, _, index = name.partition("[")
    tensor = parameters[whole]
    if index:
        tensor, dim = tensor[int(index[:-1])], dim - 1
    moved = tensor.movedim(dim, -1)
    moved.copy_(change(moved.clone()))


@dataclass
class _Space:
    size: int
    producers: list[Slot] = field(default_factory=list)
    consumers: list[Slot] = field(default_factory=list)
    norms: dict[str, list[Slot]] = field(default_factory=dict)
    centered: bool = False
    dead: bool = False


@dataclass(frozen=True)
class _Mark:
    """What is known of a tensor: the number of its space, the dimension, the norm weight still to be folded, whether squared."""

    space: int
    dim: int
    fold: str = ""
    squared: bool = False


class _Spaces(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.views = {id(p): View(n, tuple(range(p.dim()))) for n, p in model.named_parameters()}
        self.marks: dict[int, _Mark] = {}
        self.spaces: list[_Space] = []
        self.leader: list[int] = []
        self.kept: list[Any] = []
        self.folds: dict[Slot, set[str]] = {}
        self.zeros: set[int] = set()

    def find(self, number: int) -> int:
        while self.leader[number] != number:
            number = self.leader[number]
        return number

    def kill(self, tensor: Any) -> None:
        mark = self.marks.get(id(tensor))
        if mark is not None:
            self.spaces[self.find(mark.space)].dead = True

    def join(self, a: int, b: int) -> None:
        a, b = sorted((self.find(a), self.find(b)))
        if a == b:
            return
        one, two = self.spaces[a], self.spaces[b]
        self.leader[b] = a
        one.producers += two.producers
        one.consumers += two.consumers
        one.norms.update({n: one.norms.get(n, []) + r for n, r in two.norms.items()})
        one.dead = one.dead or two.dead or one.size != two.size
        one.centered = one.centered or two.centered

    def make(self, out: Tensor, slot: Slot) -> None:
        self.spaces.append(_Space(out.shape[-1], [slot]))
        self.leader.append(len(self.leader))
        self.marks[id(out)] = _Mark(len(self.leader) - 1, out.dim() - 1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        self.kept.append((args, kwargs, out))
        given = [t for _, t in leaves((args, kwargs))]
        if name in BY_SHAPE or name == "zero_":
            self.zeros |= {id(out)} if "zero" in name else set()
        elif name in ("detach", "alias", "view") and id(args[0]) in self.zeros and id(args[0]) not in self.marks:
            self.zeros.add(id(out))
        elif any(id(t) in self.marks or id(t) in self.views for t in given):
            outs = [t for _, t in leaves(out)]
            if not outs or not self._rule(name, args, outs, given):
                for tensor in given:
                    self.kill(tensor)
        return out

    def _rule(self, name: str, args: Any, outs: list[Tensor], given: list[Tensor]) -> bool:
        out = outs[0]
        if name == "embedding":
            view = self.views.get(id(args[0]))
            if view is not None:
                self.make(out, (view.name, 1))
            return view is not None
        if name in ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm") or "scaled_dot_product" in name:
            return self._product(name, args, out)
        mark = self.marks.get(id(args[0])) if args else None
        if name in SUMS:
            return self._sum(args, out)
        if name in ("index_add_", "index_add"):
            return self._add_rows(args, out)
        if name in SCALES:
            return self._scale(name, args, out)
        if name in NORMS and mark is not None:
            return self._norm(args, out, mark)
        if id(args[0]) in self.views:
            return self._view(name, args, out)
        if mark is None:
            return not any(id(t) in self.marks for t in given)
        if name == "pow" and args[1] == 2 and not mark.fold:
            self.marks[id(out)] = _Mark(mark.space, mark.dim, squared=True)
            return True
        if name == "mean" and mark.squared:
            dims = args[1] if len(args) > 1 else None
            return bool(dims is not None and [d % args[0].dim() for d in dims] == [mark.dim] and self._whole(args[0], mark))
        if mark.squared:
            return False
        if name == "sum" and len(args) > 1 and not mark.fold:
            gone = [d % args[0].dim() for d in args[1]]
            keep = len(args) > 2 and args[2]
            self.marks[id(out)] = _Mark(mark.space, mark.dim - (0 if keep else sum(d < mark.dim for d in gone)))
            return mark.dim not in gone
        if name in KEEPS:
            self.marks[id(out)] = mark
            return True
        return name in MOVES and self._move(name, args, outs, mark)

    def _add_rows(self, args: Any, out: Tensor) -> bool:
        """Rows are added to a tensor of zeros: the results of experts."""
        before, added = self.marks.get(id(args[0])), self.marks.get(id(args[3]))
        if added is None or added.fold or added.squared or args[1] % out.dim() == added.dim:
            return False
        if before is not None:
            self.join(before.space, added.space)
        elif id(args[0]) not in self.zeros:
            return False
        self.marks[id(out)] = added
        return True

    def _whole(self, tensor: Tensor, mark: _Mark) -> bool:
        return tensor.shape[mark.dim] == self.spaces[self.find(mark.space)].size

    def _view(self, name: str, args: Any, out: Tensor) -> bool:
        view = self.views[id(args[0])]
        if name == "t":
            self.views[id(out)] = View(view.name, view.dims[::-1])
        elif name == "transpose" and len(view.dims) > 1:
            dims = list(view.dims)
            a, b = args[1] % len(dims), args[2] % len(dims)
            dims[a], dims[b] = dims[b], dims[a]
            self.views[id(out)] = View(view.name, tuple(dims))
        elif name in KEEPS or (name == "expand" and out.dim() == len(view.dims)):
            self.views[id(out)] = view
        elif name == "select" and args[1] == 0 and view.dims[0] == 0:
            self.views[id(out)] = View(f"{view.name}[{args[2]}]", view.dims[1:])
        return True

    def _product(self, name: str, args: Any, out: Tensor) -> bool:
        if "scaled_dot_product" in name:
            self.kill(args[0])
            self.kill(args[1])
            return self._hand_on(args[2], out)
        x, weight = args[:2] if name in ("mm", "bmm", "_grouped_mm") else args[1:3]
        view, mark = self.views.get(id(weight)), self.marks.get(id(x))
        if view is None:
            self.kill(x)
            return self._hand_on(weight, out)
        if mark is not None:
            slot = (view.name, view.dims[-2])
            if mark.dim != x.dim() - 1 or mark.squared:
                return False
            space = self.spaces[self.find(mark.space)]
            space.consumers.append(slot)
            self.folds.setdefault(slot, set()).add(mark.fold)
            if mark.fold:
                space.norms[mark.fold].append(slot)
        self.make(out, (view.name, view.dims[-1]))
        if name in ("addmm", "baddbmm"):
            bias = self.views.get(id(args[0]))
            if bias is None:
                self.kill(out)
            else:
                self.spaces[-1].producers.append((bias.name, bias.dims[-1]))
        return True

    def _hand_on(self, source: Tensor, out: Tensor) -> bool:
        mark = self.marks.get(id(source))
        if mark is None:
            return True
        if mark.dim != source.dim() - 1 or mark.squared or mark.fold:
            return False
        self.marks[id(out)] = _Mark(mark.space, out.dim() - 1)
        return True

    def _sum(self, args: Any, out: Tensor) -> bool:
        a, b = args[0], args[1]
        one, two = self.marks.get(id(a)), self.marks.get(id(b)) if isinstance(b, Tensor) else None
        for mark, other in ((one, b), (two, a)):
            view = self.views.get(id(other))
            if mark is not None and view is not None and other.shape[-1] == out.shape[-1] and mark.dim == out.dim() - 1:
                self.spaces[self.find(mark.space)].producers.append((view.name, view.dims[-1]))
                self.marks[id(out)] = mark
                return not (mark.fold or mark.squared)
        if one is None and two is None:
            return True
        if one is None or two is None or one.dim != two.dim or one.fold or two.fold or one.squared or two.squared:
            return False
        self.join(one.space, two.space)
        self.marks[id(out)] = one
        return a.shape[one.dim] == b.shape[two.dim]

    def _scale(self, name: str, args: Any, out: Tensor) -> bool:
        a, b = args[0], args[1]
        for x, other in ((a, b), (b, a)):
            mark = self.marks.get(id(x)) if isinstance(x, Tensor) else None
            if mark is None or (name.startswith("div") and x is b):
                continue
            if mark.squared or (isinstance(other, Tensor) and id(other) in self.marks):
                return False
            view = self.views.get(id(other))
            if view is not None and other.dim() == 1 and other.numel() == out.shape[-1] > 1:
                self.spaces[self.find(mark.space)].norms.setdefault(view.name, [])
                self.marks[id(out)] = _Mark(mark.space, mark.dim, fold=view.name)
                return not mark.fold and mark.dim == out.dim() - 1
            if isinstance(other, Tensor) and other.dim() and other.shape[mark.dim - out.dim()] != 1:
                return False
            self.marks[id(out)] = mark
            return True
        return not any(isinstance(t, Tensor) and id(t) in self.marks for t in (a, b))

    def _norm(self, args: Any, out: Tensor, mark: _Mark) -> bool:
        weight, bias = args[2], args[3] if len(args) > 3 and isinstance(args[3], Tensor) else None
        space = self.spaces[self.find(mark.space)]
        if mark.fold or mark.squared or not self._whole(args[0], mark) or id(weight) not in self.views:
            return False
        space.centered = space.centered or bias is not None
        name = self.views[id(weight)].name
        space.norms.setdefault(name, [])
        self.marks[id(out)] = _Mark(mark.space, mark.dim, fold=name)
        return True

    def _move(self, name: str, args: Any, outs: list[Tensor], mark: _Mark) -> bool:
        x, out = args[0], outs[0]
        size = x.shape[mark.dim]
        dim: int | None = mark.dim
        if name in ("transpose", "permute", "t"):
            n = x.dim()
            order = list(range(n))
            if name == "permute":
                order = [d % n for d in args[1]]
            else:
                a, b = (0, 1) if name == "t" else (args[1] % n, args[2] % n)
                order[a], order[b] = order[b], order[a]
            dim = order.index(mark.dim)
        elif name in ("view", "_unsafe_view", "reshape"):
            return self._reshape(x, out, mark)
        elif name in ("unsqueeze", "select", "squeeze", "unbind"):
            at = args[1] % (x.dim() + (name == "unsqueeze")) if len(args) > 1 and isinstance(args[1], int) else -1
            dim = (
                None
                if at < 0 or (at == mark.dim and name != "unsqueeze")
                else mark.dim + ((at <= mark.dim) if name == "unsqueeze" else -(at < mark.dim))
            )
        elif name == "expand":
            dim = mark.dim + out.dim() - x.dim()
        if dim is None or any(o.dim() <= dim or o.shape[dim] != size for o in outs):
            return False
        for tensor in outs:
            self.marks[id(tensor)] = _Mark(mark.space, dim, mark.fold)
        return True

    def _reshape(self, x: Tensor, out: Tensor, mark: _Mark) -> bool:
        """Other dimensions may change; the space itself may be cut into heads and put together again."""
        if mark.dim != x.dim() - 1:
            return False
        space = self.spaces[self.find(mark.space)]
        before, after = x.shape[-1], out.shape[-1]
        if after != before and mark.fold:
            return False
        if after < before:
            if before % after or space.size % after:
                return False
            space.size = min(space.size, after)
        elif after % before or space.size > before:
            return False
        self.marks[id(out)] = _Mark(mark.space, out.dim() - 1, mark.fold)
        return True


def rotation_axes(model: nn.Module, dummy_input: Any = None) -> tuple[RotationAxis, ...]:
    """Return the spaces of a model that may be rotated, the residual stream first if it is one, found in one forward pass.

    Args:
        model: any module, on any device, "meta" included; it is not changed.
        dummy_input: inputs (tensor, tuple, dict or `(args, kwargs)`); None guesses them.

    Raises TraceError if the model does not run.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    >>> [(axis.name, axis.size) for axis in rotation_axes(model)]
    [('0.weight.0', 8)]
    """
    model = unwrap_model(model)
    mode = _Spaces(model)
    result = run(model, resolve_inputs(model, dummy_input), lambda: mode)
    for _, tensor in leaves(result):
        mode.kill(tensor)
    found = []
    for number, space in enumerate(mode.spaces):
        if mode.find(number) != number or space.dead or not space.consumers or space.size < 2:
            continue
        makes, reads = tuple(dict.fromkeys(space.producers)), tuple(dict.fromkeys(space.consumers))
        twice = [s for s in reads if len(mode.folds[s]) > 1 or (s in makes and mode.folds[s] != {""})]
        if twice:  # a weight that reads two things cannot take up the norm of one of them
            continue
        norms = {name: tuple(dict.fromkeys(readers)) for name, readers in space.norms.items()}
        found.append(RotationAxis(space.size, makes, reads, norms, space.centered))
    return tuple(found)
