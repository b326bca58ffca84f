"""Node processors of torch's own modules and operations (concatenation has its own file)."""

from __future__ import annotations

import math
from typing import Any

from torch import fx, nn

from modelopt.torch.trace.dependencies import GraphDependencyProcessor, NodeProcessor, Place, connect

POINTWISE = frozenset(
    (
        "add", "sub", "mul", "truediv", "div", "rsub", "pow", "neg", "abs", "exp", "log", "sqrt", "rsqrt", "square",
        "clamp", "clip", "where", "maximum", "minimum", "lerp", "iadd", "isub", "imul", "itruediv", "add_", "sub_",
        "mul_", "div_", "clamp_", "relu", "relu_", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish",
        "sigmoid", "sigmoid_", "tanh", "softplus", "softsign", "hardtanh", "hardtanh_", "hardswish", "hardsigmoid",
        "logsigmoid", "dropout", "alpha_dropout", "contiguous", "clone", "detach", "to", "type", "float", "half",
        "bfloat16", "type_as",
    )
)  # fmt: skip
CHANNEL_WISE = frozenset(
    (
        "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
        "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
        "boolean_dispatch", "interpolate", "dropout1d", "dropout2d", "dropout3d", "feature_dropout",
    )
)  # fmt: skip
NO_TENSOR = frozenset(("size", "dim", "ndimension", "numel", "stride", "is_floating_point", "getattr"))
POOLING = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)


def _ones(size: Any) -> bool:
    return size == 1 or (isinstance(size, tuple | list) and all(s == 1 for s in size))


@GraphDependencyProcessor.register_node_processor
class Boundary(NodeProcessor):
    """Arguments and results of the graph, and tensors of the module itself, keep their sizes."""

    def matches(self, node: fx.Node, graph: GraphDependencyProcessor) -> bool:
        return node.op in ("placeholder", "get_attr", "output")

    def process(self, node: fx.Node, graph: GraphDependencyProcessor) -> None:
        tensor = graph.attribute(node) if node.op == "get_attr" else None
        scalar = tensor is not None and tensor.numel() == 1
        if scalar or (node.op == "placeholder" and not node.users):
            graph.not_a_tensor(node)
        else:
            graph.stop(node, "it is an output of the graph")


@GraphDependencyProcessor.register_node_processor
class Module(NodeProcessor):
    """A module with symbols: what comes in matches its incoming symbol; its outgoing one starts a class, or the input goes on."""

    def matches(self, node: fx.Node, graph: GraphDependencyProcessor) -> bool:
        return graph.info(node) is not None

    def process(self, node: fx.Node, graph: GraphDependencyProcessor) -> None:
        info = graph.info(node)
        sources = graph.inputs(node)
        if info is None or (len(sources) != 1 and any(True for _ in info.named_in_symbols())):
            self._close(node, graph, "it is called with several tensors")
            return
        place = graph.places.get(sources[0]) if sources else None
        for name, symbol in info.named_in_symbols():
            self._enter(name, symbol, sources[0], graph)
            place = place or Place(next(iter(symbol.elastic_dims or {1})))
        if info.is_shape_preserving and sources:
            module = graph.modules[str(node.target)]
            if isinstance(module, POOLING) and place is not None and _ones(module.output_size):
                place = Place(place.dim, place.rank, pooled=True)
            graph.follow(node, sources[0], place)
            return
        out = next(info.named_out_symbols(), None)
        if out is None:
            graph.stop(node, f"{node.target} hides it")
            return
        name, symbol = out
        dim = next(iter(symbol.elastic_dims or {-1}))
        rank = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}.get(type(graph.modules[str(node.target)]))
        graph.start(node, symbol, name, Place(dim, rank))
        twin = graph.first_call.setdefault(graph.modules[str(node.target)], node)
        if twin is not node:
            graph.map.link_nodes(node, twin)

    def _enter(self, name: str, symbol: Any, source: fx.Node, graph: GraphDependencyProcessor) -> None:
        known, place = graph.symbol(source), graph.places.get(source)
        wanted = Place(next(iter(symbol.elastic_dims or {-1})))
        fits = place is not None and (place.same(Place(wanted.dim, place.rank)))
        if known is None or not fits or not connect(symbol, known):
            reason = "the input has this size" if known is None else "the input has its channels elsewhere, or in another number"
            symbol.disable(reason)
            graph.map.close(source, reason)

    def _close(self, node: fx.Node, graph: GraphDependencyProcessor, reason: str) -> None:
        info = graph.info(node)
        for _, symbol in info.named_symbols() if info is not None else ():
            symbol.disable(reason)
        graph.stop(node, reason)


@GraphDependencyProcessor.register_node_processor
class Pointwise(NodeProcessor):
    """Every element by itself: all tensors that go in have the same elastic dimension."""

    def matches(self, node: fx.Node, graph: GraphDependencyProcessor) -> bool:
        return graph.name(node) in POINTWISE

    def process(self, node: fx.Node, graph: GraphDependencyProcessor) -> None:
        sources = graph.inputs(node)
        sizes = [n for n in node.all_input_nodes if n in graph.plain and n.op != "get_attr"]
        if not sources:
            graph.not_a_tensor(node)
        elif sizes:
            graph.stop(node, "its size is computed with")
        else:
            graph.join(node, sources)


@GraphDependencyProcessor.register_node_processor
class ChannelWise(NodeProcessor):
    """Pooling, resizing and dropping of whole channels: channels stay where they are."""

    def matches(self, node: fx.Node, graph: GraphDependencyProcessor) -> bool:
        return graph.name(node) in CHANNEL_WISE and bool(graph.inputs(node))

    def process(self, node: fx.Node, graph: GraphDependencyProcessor) -> None:
        source = graph.inputs(node)[0]
        place = graph.places.get(source)
        if place is None or place.dim != 1:
            graph.stop(node, f"{graph.name(node)} works on dimension 1")
            return
        one = "adaptive" in graph.name(node) and _ones(graph.argument(node, 1, "output_size"))
        graph.follow(node, source, Place(1, place.rank, place.pooled or one))


@GraphDependencyProcessor.register_node_processor
class NoTensor(NodeProcessor):
    """Questions about a tensor."""

    def matches(self, node: fx.Node, graph: GraphDependencyProcessor) -> bool:
        return graph.name(node) in NO_TENSOR or (graph.name(node) != "" and bool(node.all_input_nodes) and not graph.inputs(node))

    def process(self, node: fx.Node, graph: GraphDependencyProcessor) -> None:
        graph.not_a_tensor(node)


@GraphDependencyProcessor.register_node_processor
class Moved(NodeProcessor):
    """permute, transpose: the elastic dimension is elsewhere."""

    def matches(self, node: fx.Node, graph: GraphDependencyProcessor) -> bool:
        return graph.name(node) in ("permute", "transpose") and graph.inputs(node)[0] in graph.places

    def process(self, node: fx.Node, graph: GraphDependencyProcessor) -> None:
        source = graph.inputs(node)[0]
        place = graph.places[source]
        order: list[Any] = list(node.args[1:])
        if graph.name(node) == "permute":
            order = list(order[0]) if order and isinstance(order[0], tuple | list) else order
            if not order:
                order = list(graph.argument(node, 1, "dims", ()))
            rank = len(order)
            new = [d % rank for d in order].index(place.dim % rank) if rank else None
        else:
            rank = place.rank or 0
            swap = [d % rank if rank else d for d in order]
            here = place.dim % rank if rank else place.dim
            known = rank or (all(d >= 0 for d in swap) == (here >= 0))
            new = None if len(swap) != 2 or not known else swap[1 - swap.index(here)] if here in swap else here
        if new is None:
            graph.stop(node, f"{graph.name(node)} of a tensor of unknown rank")
            return
        graph.follow(node, source, Place(new, rank or None, False))


@GraphDependencyProcessor.register_node_processor
class Mean(NodeProcessor):
    """A mean over other dimensions."""

    def matches(self, node: fx.Node, graph: GraphDependencyProcessor) -> bool:
        return graph.name(node) == "mean" and graph.inputs(node)[0] in graph.places

    def process(self, node: fx.Node, graph: GraphDependencyProcessor) -> None:
        source = graph.inputs(node)[0]
        place = graph.places[source]
        dims = graph.argument(node, 1, "dim")
        dims = [dims] if isinstance(dims, int) else dims
        keep = graph.argument(node, 2, "keepdim", False)
        if not dims or (place.rank is None and any((d < 0) != (place.dim < 0) for d in dims)):
            graph.stop(node, "a mean over everything")
            return
        gone = {d % place.rank if place.rank else d for d in dims}
        here = place.dim % place.rank if place.rank else place.dim
        if here in gone:
            graph.stop(node, "a mean over it")
            return
        behind = place.rank is not None and all(d in gone for d in range(here + 1, place.rank))
        if keep:
            graph.follow(node, source, Place(here, place.rank, behind))
        elif here >= 0:
            rank = None if place.rank is None else place.rank - len(gone)
            graph.follow(node, source, Place(here - sum(d < here for d in gone), rank))
        else:
            graph.stop(node, "a mean of a tensor of unknown rank")


@GraphDependencyProcessor.register_node_processor
class Flatten(NodeProcessor):
    """flatten(1) after global pooling; other reshapes end the class."""

    def matches(self, node: fx.Node, graph: GraphDependencyProcessor) -> bool:
        module = graph.modules.get(str(node.target)) if node.op == "call_module" else None
        return graph.name(node) == "flatten" or isinstance(module, nn.Flatten)

    def process(self, node: fx.Node, graph: GraphDependencyProcessor) -> None:
        source = graph.inputs(node)[0]
        place = graph.places.get(source)
        shape = source.meta.get("shape")
        module = graph.modules.get(str(node.target)) if node.op == "call_module" else None
        first = module.start_dim if isinstance(module, nn.Flatten) else graph.argument(node, 1, "start_dim", 0)
        alone = place is not None and (place.pooled or (shape is not None and math.prod(shape[2:]) == 1) or place.rank == 2)
        if place is not None and place.dim == 1 and first == 1 and alone:
            graph.follow(node, source, Place(1, 2))
        else:
            graph.stop(node, "it is flattened together with other dimensions")
