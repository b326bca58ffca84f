"""What the figure shows: boxes within boxes, and which reads which; operations that join several tensors, and repeats as one.

An operation with one visible source is drawn as part of the line (views, casts, activations as functions); one that joins several
(a sum, a product, attention, a concatenation) is a small circle. Neighbours of one structure become one box with a count.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from modelopt.torch.trace.tracer import GraphCollection

SIGNS = {
    "add": "+", "iadd": "+", "add_": "+", "sub": "−", "mul": "×", "imul": "×", "mul_": "×", "matmul": "@", "bmm": "@",
    "cat": "cat", "scaled_dot_product_attention": "attention", "truediv": "÷", "div": "÷", "where": "where", "stack": "stack",
    "einsum": "einsum",
}  # fmt: skip
MAX_PERIOD = 8
TRANSPARENT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)  # nothing happens in them in eval mode


@dataclass(eq=False)
class Item:
    """One box: a module, an operation, or an end of the graph."""

    kind: str  # "module", "op", "input", "output"
    title: str
    subtitle: str = ""
    name: str = ""
    inside: Scene | None = None
    count: int = 1
    beside: bool = False
    last: str = ""
    signature: Any = None

    @property
    def has_weights(self) -> bool:
        """Whether the module, or one in it, has parameters."""
        return any(shapes for _, shapes in self.signature or ())


@dataclass
class Scene:
    """The boxes of one level in the order of execution, and pairs of indices: who reads whom."""

    items: list[Item] = field(default_factory=list)
    edges: list[tuple[int, int]] = field(default_factory=list)


def build(graphs: GraphCollection, name: str = "", depth: int = 8) -> Scene:
    """Return the scene of a module and of what is in it, `depth` levels deep."""
    names = {id(m): n for n, m in graphs.root.named_modules()}
    return _Builder(graphs, names).scene(graphs.module(name), depth, top=True)


class _Builder:
    def __init__(self, graphs: GraphCollection, names: dict[int, str]) -> None:
        self.graphs, self.names = graphs, names
        self.recorded = graphs.recording.graphs

    def scene(self, module: nn.Module, depth: int, top: bool = False) -> Scene:
        graph = self.recorded.get(module) or self.graphs[module]
        children = dict(module.named_modules(remove_duplicate=False))
        scene = Scene()
        seen: dict[fx.Node, list[int]] = {}
        for node in graph.nodes:
            sources = sorted({i for n in _main_inputs(node) for i in seen.get(n, ())})
            item = self._item(node, children, sources, depth, top)
            if item is None:  # a part of the line; modules that only make positions and masks are left out with what they make
                through = node.op != "call_module" or isinstance(children.get(str(node.target)), TRANSPARENT)
                seen[node] = sources if through else []
                continue
            scene.items.append(item)
            index = len(scene.items) - 1
            seen[node] = [index]
            scene.edges += [(s, index) for s in sources]
        return collapse(_without_dead(scene))

    def _item(self, node: fx.Node, children: dict[str, nn.Module], sources: list[int], depth: int, top: bool) -> Item | None:
        if node.op == "placeholder":
            dtype = str(node.meta.get("dtype", "")).removeprefix("torch.")
            shape = f"{dtype}{list(node.meta['shape'])}" if "shape" in node.meta else ""
            return Item("input", node.name, shape if top else "") if _carries_activations(node, top) else None
        if node.op == "output":
            return Item("output", "output")
        if node.op == "call_module":
            child = children.get(str(node.target))
            return None if child is None or isinstance(child, TRANSPARENT) else self._module(child, node, depth)
        if node.op in ("call_function", "call_method") and len(sources) > 1:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            sign = SIGNS.get(str(name))
            return Item("op", sign or str(name).strip("_"), signature=str(name)) if _is_activation(node) else None
        return None

    def _module(self, child: nn.Module, node: fx.Node, depth: int) -> Item | None:
        name = self.names.get(id(child), str(node.target))
        weights = [tuple(p.shape) for p in child.parameters()]
        before = [n for n in node.all_input_nodes if _is_activation(n)]
        if not weights and (not before or node.meta.get("shape") not in {n.meta.get("shape") for n in before}):
            shape = node.meta.get("shape", ())
            if len(shape) < 2 or type(child).__name__.find("Rotary") >= 0:
                return None
        inner = [m for m in child.children() if m in self.recorded or isinstance(m, nn.ModuleList | nn.ModuleDict)]
        inside = self.scene(child, depth - 1) if inner and depth > 1 and child in self.recorded else None
        if inside is not None and not any(i.has_weights for i in inside.items if i.kind == "module"):
            inside = None
        kinds = tuple(
            (type(m).__name__, tuple(tuple(p.shape) for p in m._parameters.values() if p is not None)) for m in child.modules()
        )
        return Item("module", str(node.target), _class(child), name, inside, signature=kinds)


def _main_inputs(node: fx.Node) -> list[fx.Node]:
    """Return what a node reads, without what travels along: later results of a module with more dimensions than the first."""
    given = node.all_input_nodes
    ranks = [len(n.meta["shape"]) for n in given if "shape" in n.meta]
    if node.op == "output" and ranks:
        return [n for n in given if len(n.meta.get("shape", ())) <= ranks[0]]
    if node.op == "call_function" and node.target is operator.getitem and given and given[0].op == "call_module":
        aside = node.args[1] != 0 and len(node.meta.get("shape", ())) > len(given[0].meta.get("shape", ()))
        return [] if aside else given
    return given


def _class(module: nn.Module) -> str:
    """Return the class of a module, with its two sizes where it is a matrix: `Linear 64 → 128`."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() < 2:
        return type(module).__name__
    sizes = [getattr(module, n, None) for n in ("in_features", "out_features", "in_channels", "out_channels")]
    known = [s for s in sizes if isinstance(s, int)] or [int(n) for n in weight.shape[:2]]
    kernel = getattr(module, "kernel_size", None)
    shape = f" {'×'.join(map(str, kernel))}" if isinstance(kernel, tuple) and max(kernel) > 1 else ""
    return f"{type(module).__name__}{shape} {known[0]} → {known[1]}"


def _is_activation(node: fx.Node) -> bool:
    dtype = node.meta.get("dtype")
    return dtype is not None and dtype.is_floating_point


def _carries_activations(node: fx.Node, top: bool) -> bool:
    side = ("position_embeddings", "cos", "sin", "mask", "attention_mask", "position_ids", "position_bias", "rotary")
    return (top or _is_activation(node)) and bool(node.users) and not node.name.startswith(side)


def _without_dead(scene: Scene) -> Scene:
    """Drop what leads nowhere (masks, positions) and inputs that nobody visible reads."""
    alive = {i for i, item in enumerate(scene.items) if item.kind == "output" or (item.kind == "module" and item.signature)}
    for source, target in sorted(scene.edges, key=lambda e: -e[1]):
        if target in alive:
            alive.add(source)
    return _keep(scene, sorted(alive))


def _keep(scene: Scene, kept: Sequence[int]) -> Scene:
    new = {old: i for i, old in enumerate(kept)}
    edges = [(new[a], new[b]) for a, b in scene.edges if a in new and b in new]
    return Scene([scene.items[i] for i in kept], edges)


def collapse(scene: Scene) -> Scene:
    """Make one box of neighbours of one structure, one behind the other (also in alternation) or side by side."""
    return _collapse_beside(_collapse_behind(scene))


def _collapse_behind(scene: Scene) -> Scene:
    start = 0
    while start < len(scene.items):
        period, count = _run(scene, start)
        if count > 1:
            scene = _merge(scene, list(range(start, start + period * count)), period, count)
        start += 1
    return scene


def _run(scene: Scene, start: int) -> tuple[int, int]:
    best = (1, 1)
    reads = set(scene.edges)
    signs = [i.signature if i.kind == "module" else None for i in scene.items]
    if signs[start] is None:
        return best
    for period in range(1, MAX_PERIOD + 1):
        end = start + period
        while end < len(signs) and signs[end] is not None and signs[end] == signs[end - period] and (end - 1, end) in reads:
            end += 1
        count = (end - start) // period
        chained = all((i - 1, i) in reads for i in range(start + 1, start + period * count))
        if count > 1 and chained and period * count > best[0] * best[1]:
            best = (period, count)
    return best


def _merge(scene: Scene, members: list[int], period: int, count: int, beside: bool = False) -> Scene:
    first, last = scene.items[members[0]], scene.items[members[-1]]
    if period == 1:
        made = Item("module", first.title, first.subtitle, first.name, first.inside, count, beside, last.title, first.signature)
    else:
        inside = Scene(scene.items[members[0] : members[0] + period], [(i, i + 1) for i in range(period - 1)])
        inside = Scene([Item("input", ""), *inside.items, Item("output", "")], [(i, i + 1) for i in range(period + 1)])
        made = Item("module", first.title, f"{period} in turn", first.name, inside, count, False, last.title)
    inner = set(members)
    where = {i: i if i not in inner else members[0] for i in range(len(scene.items))}
    edges = dict.fromkeys((where[a], where[b]) for a, b in scene.edges if where[a] != where[b])
    scene = Scene([made if i == members[0] else item for i, item in enumerate(scene.items)], list(edges))
    return _keep(scene, [i for i in range(len(scene.items)) if i not in inner or i == members[0]])


def _collapse_beside(scene: Scene) -> Scene:
    done = False
    while not done:
        done = True
        groups: dict[Any, list[int]] = {}
        for i, item in enumerate(scene.items):
            if item.kind == "module" and item.count == 1:
                before = tuple(a for a, b in scene.edges if b == i)
                groups.setdefault((item.signature, before), []).append(i)
        for members in groups.values():
            if len(members) > 3:
                scene, done = _merge(scene, members, 1, len(members), beside=True), False
                break
    return scene
