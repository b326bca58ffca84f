"""Graphs: by torch.fx where it can follow, recorded where it cannot; every module that ran has one."""

from __future__ import annotations

import time

import pytest
import torch
from torch import fx, nn

from modelopt.core.errors import ConfigError, TraceError, UnknownNameError
from modelopt.torch.trace import GraphCollection, RobustTracer, recursive_trace
from modelopt.torch.trace.record_graph import record, side_output
from tests.torch.trace.models import Branch, Classic, tiny_llama


def ops(graph: fx.Graph) -> list[str]:
    return [f"{n.op}:{n.target if isinstance(n.target, str) else n.target.__name__}" for n in graph.nodes]


def test_fx_where_it_can():
    model = Classic().eval()
    graphs = recursive_trace(model)
    assert graphs.source(model) == "fx" and graphs.failure_msg(model) is None
    assert next(iter(graphs)) is model
    assert set(graphs) == set(model.modules())
    assert fx.GraphModule(model, graphs[model])(torch.ones(1, 3, 8, 8)).allclose(model(torch.ones(1, 3, 8, 8)))
    assert graphs["conv1"] is graphs[model.conv1]


def test_leaf_fallback_keeps_the_rest():
    model = nn.Sequential(nn.Linear(4, 4), Branch(), nn.ReLU())
    graphs = recursive_trace(model)
    assert ops(graphs[model]) == ["placeholder:input", "call_module:0", "call_module:1", "call_module:2", "output:output"]
    assert "TraceError" in graphs.failure_msg(model[1])
    assert not graphs.is_failed(model[1]) and graphs.source(model[1]) == "recorded"
    assert ops(graphs[model[1]]) == [
        "placeholder:x", "call_method:sum", "call_method:gt", "call_module:linear", "call_method:add", "output:output",
    ]  # fmt: skip
    assert not graphs.is_unvisited(model[1].linear)


def test_registered_leaf():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x).relu()

    model = nn.Sequential(Block(), Block())
    assert len(RobustTracer().trace(model).nodes) == 6
    RobustTracer.register_leaf(Block)
    try:
        assert RobustTracer.is_registered_leaf(model[0]) and not RobustTracer.is_registered_leaf(nn.Linear)
        assert ops(RobustTracer().trace(model)) == ["placeholder:input", "call_module:0", "call_module:1", "output:output"]
        with pytest.raises(ConfigError, match="registered already"):
            RobustTracer.register_leaf(Block)
    finally:
        RobustTracer.unregister_leaf(Block)
    with pytest.raises(UnknownNameError):
        RobustTracer.unregister_leaf(Block)


def test_concrete_args():
    class Switch(nn.Module):
        def forward(self, x, flag=None):
            return x + 1 if flag else x - 1

    model = Switch()
    graphs = recursive_trace(model, {"flag": True})
    assert "call_function:add" in ops(graphs[model])
    assert GraphCollection().recursive_trace(model, {"flag": True}).source(model) == "fx"


def test_transformers_root_is_recorded_and_runs():
    model = tiny_llama()
    graphs = recursive_trace(model)
    assert graphs.source(model) == "recorded" and not graphs.is_failed(model)
    assert "was not tried" in graphs.failure_msg(model)
    ran = [m for m in model.modules() if not isinstance(m, nn.ModuleList)]
    assert list(graphs) == ran
    assert graphs.is_unvisited(model.model.layers)
    mlp = model.model.layers[0].mlp
    assert "call_module:gate_proj" in ops(graphs[mlp])
    x = torch.randn(1, 3, 64)
    torch.testing.assert_close(fx.GraphModule(mlp, graphs[mlp])(x), mlp(x))
    assert graphs["model.layers.0.mlp"] is graphs[mlp]
    assert [n.name for n in graphs[model.model.layers[0]].nodes if n.op == "call_module"] == [
        "input_layernorm", "self_attn", "post_attention_layernorm", "mlp",
    ]  # fmt: skip
    assert str(graphs[model]).count("\n") > 3


def test_tiny_transformers_model_takes_under_300_ms():
    model = tiny_llama()
    recursive_trace(model)
    start = time.process_time()
    recursive_trace(model)
    assert time.process_time() - start < 0.3


def test_aten_level():
    model = tiny_llama()
    graphs = recursive_trace(model)
    graph = graphs.aten(model.model.layers[0].mlp)
    names = [str(n.target) for n in graph.nodes if n.op == "call_function"]
    assert names.count("aten.mm.default") == 3 and "aten.silu.default" in names
    assert {n.meta["scope"] for n in graph.nodes if str(n.target) == "aten.mm.default"} == {
        f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up", "down")
    }
    x = torch.randn(1, 16, 64)
    torch.testing.assert_close(fx.GraphModule(model.model.layers[0].mlp, graph)(x), model.model.layers[0].mlp(x))
    with pytest.raises(TraceError, match="did not run"):
        graphs.aten(model.model.layers)


def test_meta_model_without_weights_runs_its_own_forward():
    with torch.device("meta"):
        model = tiny_llama(num_hidden_layers=1)
    graphs = recursive_trace(model)
    assert model in graphs and model.model.layers[0].mlp.down_proj in graphs


def test_meta_mixture_of_experts():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, num_local_experts=4,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(config).eval()
    graphs = recursive_trace(model)
    assert model in graphs and not graphs.is_failed(model)


def test_side_outputs_and_captured_tensors_are_visible():
    class Maker(nn.Module):
        def forward(self, x, store):
            store.append(x * 2)
            return x + 1

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.maker = Maker()
            self.constant = torch.ones(3)

        def forward(self, x):
            store = []
            y = self.maker(x, store)
            return y + store[0] * self.constant + (0 if x.sum() > 1e9 else 1)

    model = Outer()
    graph = record(model, ((torch.ones(3),), {})).graphs[model]
    assert any(n.target is side_output for n in graph.nodes)
    assert any(n.name.startswith("captured") for n in graph.nodes)


def test_in_place_changes_are_followed():
    class Inplace(nn.Module):
        def forward(self, x):
            y = torch.zeros_like(x)
            y[:, 0] = x[:, 1]
            y.add_(x)
            return y if x.sum() > 1e9 else y * 2

    model = Inplace()
    graph = recursive_trace(model, dummy_input=torch.randn(2, 3))[model]
    assert [n.name for n in graph.nodes if n.op.startswith("call")] == [
        "zeros_like", "getitem", "setitem", "add_", "sum_1", "gt", "mul",
    ]  # fmt: skip
    mul = next(n for n in graph.nodes if n.name == "mul")
    assert mul.args[0].name == "add_" and mul.args[0].args[0].name == "setitem"


def test_the_model_is_left_as_it_was():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = None
            self.drop = nn.Dropout()

        def forward(self, x):
            self.last, self.count = x, getattr(self, "count", 0) + 1
            return self.drop(x)

    model = Remembers().train()
    seed = torch.random.get_rng_state()
    recursive_trace(model, dummy_input=torch.ones(2)).recording
    assert model.last is None and not hasattr(model, "count") and model.drop.training
    assert torch.equal(seed, torch.random.get_rng_state())
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_wrapped_models():
    model = Classic().eval()
    assert nn.DataParallel(model) in recursive_trace(nn.DataParallel(model))
    compiled = torch.compile(model)
    assert recursive_trace(compiled)[compiled] is not None


def test_failing_model_says_why_and_parts_are_traced():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def forward(self, x):
            raise RuntimeError("no luck")

    model = Broken()
    graphs = recursive_trace(model, dummy_input=torch.ones(1, 4))
    assert graphs.is_failed(model) and model not in list(graphs)
    assert "no luck" in graphs.failure_msg(model) and "float32[1, 4]" in graphs.failure_msg(model)
    assert graphs.source(model.part) == "fx"
    with pytest.raises(TraceError, match="no luck"):
        graphs[model]


def test_bad_input():
    graphs = recursive_trace(Classic())
    with pytest.raises(TraceError, match="not part of"):
        graphs[nn.Linear(2, 2)]
    with pytest.raises(UnknownNameError, match='Did you mean "conv1"'):
        graphs["conv11"]
    with pytest.raises(TraceError, match="nn.Module"):
        recursive_trace("resnet")
    with pytest.raises(TraceError, match="recursive_trace"):
        GraphCollection()[""]


def test_two_calls_of_one_module():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = Branch()

        def forward(self, x):
            return self.shared(self.shared(x))

    model = Twice()
    graphs = recursive_trace(model, dummy_input=torch.ones(1, 4))
    assert [n.target for n in graphs[model].nodes if n.op == "call_module"] == ["shared", "shared"]
