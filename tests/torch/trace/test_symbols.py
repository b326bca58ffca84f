"""Symbols: their states, the rules of modules and nodes, and the two ways to link them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modelopt.core.errors import ConfigError, TraceError, UnknownNameError
from modelopt.torch.trace import (
    Analyzer,
    GraphDependencyProcessor,
    Map,
    NodeProcessor,
    Symbol,
    SymInfo,
    SymMap,
    analyze_symbols,
    recursive_trace,
)
from tests.torch.trace.models import Classic, tiny_llama

IN, OUT, NONE = Symbol.CLType.INCOMING, Symbol.CLType.OUTGOING, Symbol.CLType.NONE


def structure(analyzer: Analyzer) -> dict[str, list[str] | str]:
    """Every symbol with the names of the symbols that decide it, or why it is constant is left out: "constant"."""
    return {
        name: "constant" if s.is_constant else [analyzer.name_of(source) for source in s.sources]
        for name, s in analyzer.named_symbols()
    }


def free() -> Symbol:
    return Symbol(is_searchable=True, cl_type=OUT, size=8)


def test_states():
    a, b, c = free(), Symbol(cl_type=IN, size=8), Symbol(size=8)
    assert a.is_free and a.is_searchable and a.is_dangling and a.is_cross_layer and not c.is_cross_layer
    b.link_to(a)
    c.link_to(b)
    assert b.is_dynamic and b.parent is a and c.root is a and c.sources == (a,) and not b.is_dangling
    assert a.choices == range(1, 9, 1)
    c.disable("why not")
    assert a.is_constant and b.is_constant and not a.is_searchable and a.reason == "why not"
    assert list(a.choices) == [8]
    d = free()
    d.link_to(a)
    assert d.is_constant


def test_links_of_whole_chains():
    a, b, c = free(), free(), free()
    b.link_to(a)
    c.link_to(b)
    assert c.root is a
    b.link_to(c)  # nothing new
    d = free()
    c.link_to(d)
    assert all(s.root is d for s in (a, b, c))
    with pytest.raises(TraceError, match="4 entries against 8"):
        Symbol(size=4).link_to(a)


def test_concatenations():
    a, b, whole, other = free(), Symbol(size=4, is_searchable=True), Symbol(size=12), Symbol(size=12)
    whole.link_to_parts([a, b])
    assert whole.is_dynamic and whole.is_concat and whole.parent is None and whole.parents == (a, b)
    other.link_to(whole)
    assert other.sources == (a, b) and other.is_dynamic
    half = Symbol(size=12)
    half.link_to_parts([a, None])
    assert half.sources == (a,) and half.is_dynamic
    with pytest.raises(TraceError, match="decided already"):
        half.link_to_parts([a, b])
    third = Symbol(size=12)
    c, d = free(), Symbol(size=4)
    third.link_to_parts([c, d])
    third.link_to(whole)
    assert c.root is a and d.root is b
    with pytest.raises(TraceError, match="made of it"):
        looped = Symbol(size=None)
        inner = Symbol(size=None)
        looped.link_to_parts([inner, b])
        inner.link_to(looped)
    whole.disable()
    assert a.is_constant and b.is_constant


def test_concatenations_that_are_cut_differently_are_constant():
    parts = [Symbol(size=n, is_searchable=True) for n in (4, 8, 8, 4)]
    one, two = Symbol(size=12), Symbol(size=12)
    one.link_to_parts(parts[:2])
    two.link_to_parts(parts[2:])
    two.link_to(one)
    assert all(p.is_constant for p in parts)


def test_map_of_nodes():
    graph = torch.fx.Graph()
    a, b, c, d = (graph.placeholder(n) for n in "abcd")
    classes = Map()
    classes.create_root(a, free(), "a")
    classes.create_root(b, free(), "b", priority=1)
    classes.link_nodes(c, a)
    classes.link_nodes(c, b)
    assert classes.root(a) is b and classes.root(c) is b and classes.entry(a).id == "b"
    assert c in classes and d not in classes
    with pytest.raises(TraceError, match='"d" belongs to no class'):
        classes.root(d)
    classes.create_root(d, None, is_free=False)
    classes.link_nodes(d, c)
    assert not classes.entry(a).is_free and classes.entry(a).target.is_constant


def test_both_ways_agree_on_a_classical_network():
    model = Classic().eval()
    graph, axes = (analyze_symbols(model, method=m) for m in ("graph", "axes"))
    assert structure(graph) == structure(axes)
    assert structure(graph)["conv4.in_channels"] == ["conv1.out_channels", "conv3.out_channels"]
    assert [n for n, _ in graph.named_dangling_symbols()] == ["conv1.out_channels", "conv3.out_channels", "conv4.out_channels"]
    assert structure(graph)["fc.out_features"] == "constant" == structure(graph)["conv1.in_channels"]


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(), nn.Linear(8, 3)),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(8, 8), nn.MaxPool2d(2), nn.ConvTranspose2d(8, 6, 2), nn.Conv2d(6, 2, 1)),
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)),
    ],
    ids=["mlp", "conv", "flatten"],
)
def test_both_ways_agree(model):
    assert structure(analyze_symbols(model, method="graph")) == structure(analyze_symbols(model, method="axes"))


def test_what_a_graph_cannot_see_is_constant():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(4, 8)

        def forward(self, x):
            return self.b(self.a(x).reshape(-1, 4))

    model = Views()
    found = analyze_symbols(model, method="graph")
    assert list(found.named_dangling_symbols()) == []
    assert "reshape" in found.get_symbol("a", "out_features").reason


def test_permute_mean_and_scalars():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 1), nn.LayerNorm(8), nn.Linear(8, 5)
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            x = self.conv(x).permute(0, 2, 3, 1)
            return self.fc((self.norm(x) * self.scale * 2).permute(0, 3, 1, 2).mean((2, 3)))

    model = Mixed()
    graph = analyze_symbols(model, method="graph")
    assert structure(graph)["fc.in_features"] == ["conv.out_channels"] == structure(graph)["norm.normalized_shape"]
    assert structure(analyze_symbols(model, method="axes"))["fc.in_features"] == ["conv.out_channels"]


def test_shared_module_in_a_graph():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.shared, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.last(self.shared(self.shared(self.first(x))))

    found = structure(analyze_symbols(Shared(), method="graph"))
    assert found["shared.in_features"] == found["shared.out_features"] == found["last.in_features"] == ["first.out_features"]


def test_symbols_of_a_transformers_model_are_a_view_of_axes():
    model = tiny_llama()
    found = analyze_symbols(model)
    assert found.method == "axes" and len(found.families) == len(found.axes.families)
    names = structure(found)
    assert names["lm_head.in_features"] == ["model.embed_tokens.embedding_dim"]
    assert names["model.layers.0.mlp.down_proj.in_features"] == ["model.layers.0.mlp.gate_proj.out_features"]
    assert names["lm_head.out_features"] == "constant" and found.get_symbol("lm_head", "out_features").reason
    q = found.get_symbol("model.layers.0.self_attn.q_proj", "out_features")
    assert q.is_dynamic and q.how == "product"
    assert len(list(found.named_dangling_symbols())) == len(found.families)
    assert found.get_symbol("model.norm", "weight.0").parent.is_searchable


def test_users_own_module():
    class Scale(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.size = size

        def forward(self, x):
            return x.reshape(-1, self.size).reshape(x.shape)

    model = nn.Sequential(nn.Linear(4, 8), Scale(8), nn.Linear(8, 2))
    assert not list(analyze_symbols(model, method="graph").named_dangling_symbols())

    @SymMap.register(Scale)
    def scale(module):
        return SymInfo(is_shape_preserving=True, size=Symbol(cl_type=IN, elastic_dims={-1}, size=module.size))

    try:
        found = analyze_symbols(model)
        assert found.method == "graph" and "rules were registered" in found.note
        assert structure(found)["1.size"] == ["0.out_features"] == structure(found)["2.in_features"]
        with pytest.raises(ConfigError, match="registered already"):
            SymMap.register(Scale)(scale)
    finally:
        SymMap.unregister(Scale)


def test_users_own_node():
    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(torch.cumsum(self.a(x), 0))

    model = Uses()
    assert not list(analyze_symbols(model, method="graph").named_dangling_symbols())

    @GraphDependencyProcessor.register_node_processor
    class Cumsum(NodeProcessor):
        def matches(self, node, graph):
            return graph.name(node) == "cumsum"

        def process(self, node, graph):
            graph.follow(node, graph.inputs(node)[0])

    try:
        found = analyze_symbols(model)
        assert found.method == "graph" and structure(found)["b.in_features"] == ["a.out_features"]
    finally:
        GraphDependencyProcessor.unregister_node_processor(Cumsum)
    with pytest.raises(TraceError, match="not registered"):
        GraphDependencyProcessor.unregister_node_processor(Cumsum)


def test_processing_one_graph_directly():
    model = Classic()
    sym_map = SymMap(model)
    GraphDependencyProcessor(recursive_trace(model)[model], sym_map, model).process()
    assert sym_map.get_symbol("conv2", "out_channels").parent is sym_map.get_symbol(model.conv1, "out_channels")


def test_arguments_of_analyze_symbols():
    model = Classic()
    graphs = recursive_trace(model)
    assert analyze_symbols(model, graphs).graphs is graphs

    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x, flag=None):
            return self.b(self.a(x).relu() if flag else self.a(x))

    assert structure(analyze_symbols(Switch(), {"flag": True}))["b.in_features"] == ["a.out_features"]
    with pytest.raises(ConfigError, match="axes, graph"):
        analyze_symbols(model, method="magic")
    with pytest.raises(UnknownNameError, match='Did you mean "in_channels"'):
        analyze_symbols(model).get_symbol("conv1", "in_chanels")


def test_a_model_that_does_not_run_falls_back_to_graphs():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

        def forward(self, x):
            raise RuntimeError("no luck")

    found = analyze_symbols(Broken(), dummy_input=torch.ones(1, 4))
    assert found.method == "graph" and "no luck" in found.note
    assert [n for n, _ in found.named_dangling_symbols()] == ["part.0.out_features"]
    with pytest.raises(TraceError, match="no luck"):
        analyze_symbols(Broken(), dummy_input=torch.ones(1, 4), method="axes")


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (nn.Linear(2, 3), {"in_features": (IN, 2), "out_features": (OUT, 3)}),
        (nn.Conv1d(2, 3, 1), {"in_channels": (IN, 2), "out_channels": (OUT, 3)}),
        (nn.ConvTranspose3d(2, 3, 1), {"in_channels": (IN, 2), "out_channels": (OUT, 3)}),
        (nn.BatchNorm2d(4), {"num_features": (IN, 4)}),
        (nn.RMSNorm(4), {"normalized_shape": (IN, 4)}),
        (nn.Embedding(5, 4), {"num_embeddings": (NONE, 5), "embedding_dim": (OUT, 4)}),
        (nn.MultiheadAttention(8, 2), {"embed_dim": (IN, 8), "value_dim": (NONE, 8), "out_dim": (OUT, 8)}),
        (nn.GRU(3, 5), {"input_size": (IN, 3), "hidden_size": (OUT, 5)}),
        (nn.ReLU(), {}),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_symbols_of_modules(module, names):
    info = SymMap(module).get_sym_info(module)
    assert {n: (s.cl_type, s.size) for n, s in info.named_symbols()} == names
    for _, symbol in info.named_symbols():
        for parameter, dim in symbol.slots:
            tensor = dict(module.named_parameters()).get(parameter)
            assert tensor is None or tensor.shape[dim] in (symbol.size, 3 * symbol.size)
