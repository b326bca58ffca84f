"""Linear, activation, Linear in an fx graph:  second(act(first(x)))  or  second(act(first(x)) * up(x)).

Layers are calls of `nn.Linear` modules (quantized or not). Activations and the multiplication are known under the names that
modules, functions, methods and aten operators give them; identities and dropout in evaluation mode are looked through.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

_aten = torch.ops.aten
_MODULES: dict[type, str] = {nn.ReLU: "relu", nn.SiLU: "silu", nn.GELU: "gelu"}
_FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys([F.relu, F.relu_, torch.relu, torch.relu_, _aten.relu.default, _aten.relu_.default], "relu"),
    **dict.fromkeys([F.silu, _aten.silu.default, _aten.silu_.default], "silu"),
    **dict.fromkeys([F.gelu, _aten.gelu.default], "gelu"),
}
_METHODS = {"relu": "relu", "relu_": "relu"}
_PRODUCTS = {
    operator.mul,
    operator.imul,
    torch.mul,
    torch.multiply,
    _aten.mul.Tensor,
    _aten.mul_.Tensor,
    "mul",
    "mul_",
    "multiply",
}


@dataclass(frozen=True)
class Match:
    """Layers that follow one another: names of modules, and the nodes that a kernel replaces, in their order."""

    first: str
    up: str | None
    second: str
    activation: str
    source: fx.Node
    nodes: tuple[fx.Node, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The layers' names."""
        return tuple(n for n in (self.first, self.up, self.second) if n is not None)


@dataclass(frozen=True)
class Miss:
    """Layers that look like a chain and are not one, and why."""

    names: tuple[str, ...]
    reason: str


def find_chains(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> tuple[list[Match], list[Miss]]:
    """Return the chains in `graph`, and what was nearly one. `modules` are those that the graph calls, by name.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> found, missed = find_chains(fx.symbolic_trace(model).graph, dict(model.named_modules()))
    >>> [m.names for m in found], missed
    ([('0', '2')], [])
    """
    found: list[Match] = []
    missed: list[Miss] = []
    for node in graph.nodes:
        if is_linear(node, modules):
            at = _chain_to(node, modules)
            if isinstance(at, Match):
                found.append(at)
            elif at is not None:
                missed.append(at)
    known = {n for m in found for n in m.names} | {n for m in missed for n in m.names}
    for node in graph.nodes:
        if activation_of(node, modules) is None:
            continue
        source, _ = _through(_input(node), modules)
        if source is not None and is_linear(source, modules) and str(source.target) not in known:
            users = ", ".join(u.name for u in node.users) or "nothing"
            missed.append(Miss((str(source.target),), f"its activation goes to {users}, not straight to a linear layer"))
    return found, missed


def is_linear(node: fx.Node | None, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether the node calls an nn.Linear with one tensor."""
    if node is None or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    return isinstance(modules.get(str(node.target)), nn.Linear)


def activation_of(node: fx.Node | None, modules: Mapping[str, nn.Module]) -> str | None:
    """Return "relu", "gelu", "gelu_tanh" or "silu" where the node is that activation, or None."""
    if node is None:
        return None
    approximate: Any = node.kwargs.get("approximate", "none")
    if node.op == "call_module":
        module = modules.get(str(node.target))
        name = _MODULES.get(type(module))
        approximate = getattr(module, "approximate", "none")
    elif node.op == "call_function":
        name = _FUNCTIONS.get(node.target)
        approximate = node.args[1] if name == "gelu" and len(node.args) > 1 else approximate
    else:
        name = _METHODS.get(str(node.target)) if node.op == "call_method" else None
    return "gelu_tanh" if name == "gelu" and approximate == "tanh" else name


def _chain_to(second: fx.Node, modules: Mapping[str, nn.Module]) -> Match | Miss | None:
    """Return the chain that ends in `second`, why it is none, or None where nothing like one leads there."""
    last, between = _through(_input(second), modules)
    if last is None:
        return None
    if _is_product(last):
        sides = [_through(a if isinstance(a, fx.Node) else None, modules) for a in last.args[:2]]
        order = [s for s in (sides, sides[::-1]) if activation_of(s[0][0], modules) is not None]
        if not order:
            return None
        (act, one), (up, other) = order[0]
        between = [last, *between, *one, *other]
    else:
        act, up = last, None
    kind = activation_of(act, modules)
    if act is None or kind is None:
        return None
    first, rest = _through(_input(act), modules)
    if first is None or not is_linear(first, modules):
        return None
    names = (str(first.target), str(second.target))
    if _is_product(last):
        if up is None or not is_linear(up, modules):
            return Miss(names, "the activation is multiplied by something that is not the output of a linear layer")
        if up.args[0] is not first.args[0]:
            return Miss((names[0], str(up.target), names[1]), "the layers that are multiplied read different tensors")
    inner = [first, *([up] if up is not None else []), act, *between, *rest]
    shared = {n.name: [u.name for u in n.users] for n in inner if len(n.users) > 1}
    if shared:
        which, users = next(iter(shared.items()))
        return Miss(names, f"{which} is read by {' and '.join(users)}, so it has to exist")
    source = first.args[0]
    if not isinstance(source, fx.Node):
        return Miss(names, "the first layer reads a constant")
    place = {n: i for i, n in enumerate(second.graph.nodes)}
    nodes = tuple(sorted([*inner, second], key=place.__getitem__))
    return Match(names[0], None if up is None else str(up.target), names[1], kind, source, nodes)


def _input(node: fx.Node) -> fx.Node | None:
    """Return the first argument of a node where it is a tensor of the graph."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if isinstance(first, fx.Node) else None


def _is_product(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and node.target in _PRODUCTS and len(node.args) == 2


def _through(node: fx.Node | None, modules: Mapping[str, nn.Module]) -> tuple[fx.Node | None, list[fx.Node]]:
    """Return the node behind identities, and the identities."""
    passed: list[fx.Node] = []
    while node is not None and _is_identity(node, modules):
        passed.append(node)
        node = _input(node)
    return node, passed


def _is_identity(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        module = modules.get(str(node.target))
        return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and not module.training)
    if node.op == "call_function" and node.target is F.dropout:
        return (node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)) is False
    return False
