"""Chains of linear layers found in graphs, and fused: what matches, what does not and why, and the same numbers after."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import modelopt.torch.quantization as mtq
from modelopt.core.errors import ConfigError
from modelopt.torch.quantization.backends import Chain, GEMMRegistry, explain, find_chain, fuse, register_kernel
from modelopt.torch.quantization.backends.fp8_mlp import fp8_mlp
from modelopt.torch.quantization.backends.fusion import FusedLayers
from modelopt.torch.quantization.backends.gemm_registry import unregister_kernel
from modelopt.torch.quantization.backends.graph_match import find_chains
from modelopt.torch.trace import recursive_trace

E4M3 = "e4m3[...]*f32"


class Gated(nn.Module):
    """down(act(gate(x)) * up(x)), in one order or the other."""

    def __init__(self, act=None, swapped: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(64, 96, bias=bias), nn.Linear(64, 96, bias=bias)
        self.down_proj, self.act_fn, self.swapped = nn.Linear(96, 64, bias=bias), act or nn.SiLU(), swapped

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.act_fn(self.gate_proj(x)), self.up_proj(x)
        return self.down_proj(up * gate if self.swapped else gate * up)


class Net(nn.Module):
    """Blocks whose own forward cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(64), Gated(bias=True)
        self.ff = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Dropout(0.1), nn.Linear(128, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.abs().sum() > 1e9:
            return x
        x = x + self.mlp(self.norm(x))
        return x + self.ff(x)


class Two(nn.Module):
    """second(function(first(x)))."""

    def __init__(self, function) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(64, 96), nn.Linear(96, 64), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def compressed(model: nn.Module, config="FP8_DEFAULT_CFG", width: int = 64) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = model.to(torch.bfloat16).eval(), torch.randn(2, 5, width, dtype=torch.bfloat16)
    return mtq.compress(mtq.quantize(model, getattr(mtq, config), [x])), x


ALIASES = {
    "relu": [
        F.relu,
        torch.relu,
        lambda a: F.relu(a, inplace=True),
        lambda a: a.relu(),
        lambda a: a.relu_(),
        torch.ops.aten.relu.default,
    ],
    "gelu": [F.gelu, lambda a: F.gelu(a, approximate="none"), torch.ops.aten.gelu.default],
    "gelu_tanh": [lambda a: F.gelu(a, approximate="tanh"), lambda a: F.gelu(input=a, approximate="tanh")],
    "silu": [F.silu, lambda a: F.silu(a, inplace=True), torch.ops.aten.silu.default],
}


@pytest.mark.parametrize(("name", "act"), [(name, act) for name, acts in ALIASES.items() for act in acts])
def test_every_alias_of_an_activation(name, act):
    model = Two(lambda m, x: m.second(act(m.first(x))))
    found, missed = find_chains(fx.symbolic_trace(model).graph, dict(model.named_modules()))
    assert [(m.names, m.activation) for m in found] == [(("first", "second"), name)] and not missed


@pytest.mark.parametrize(
    ("module", "name"),
    [(nn.ReLU(), "relu"), (nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.SiLU(inplace=True), "silu")],
)
@pytest.mark.parametrize("product", [operator.mul, torch.mul, lambda a, b: a.mul(b), torch.ops.aten.mul.Tensor])
def test_gates(module, name, product):
    class Net(Gated):
        def forward(self, x):
            return self.down_proj(product(self.up_proj(x), self.act_fn(self.gate_proj(x))))

    model = Net(module)
    found, missed = find_chains(fx.symbolic_trace(model).graph, dict(model.named_modules()))
    assert [(m.names, m.activation) for m in found] == [(("gate_proj", "up_proj", "down_proj"), name)] and not missed


def test_what_is_nearly_a_chain_is_named_with_the_reason():
    def reason(function):
        model = Two(function)
        graph = fx.symbolic_trace(model).graph
        found, missed = find_chains(graph, dict(model.named_modules()))
        return [m.reason for m in missed] if not found else found

    def residual(m, x):
        h = F.relu(m.first(x))
        return m.second(h) + h.sum()

    assert "read by second and sum" in reason(residual)[0]
    assert "goes to add" in reason(lambda m, x: m.second(F.relu(m.first(x)) + 1))[0]
    assert "not the output of a linear layer" in reason(lambda m, x: m.second(F.silu(m.first(x)) * x.sum()))[0]
    assert reason(lambda m, x: m.second(m.first(x))) == []
    assert "goes to output" in reason(lambda m, x: F.gelu(m.first(x)))[0]
    assert reason(lambda m, x: m.second(torch.tanh(m.first(x)))) == []


@pytest.mark.parametrize("swapped", [False, True])
def test_a_model_is_fused_where_it_can_be_traced(swapped):
    net = Net()
    net.mlp.swapped = swapped
    model, x = compressed(net)
    with torch.no_grad():
        expected, keys = model(x), list(model.state_dict())
        done = fuse(model)
        assert [(f.names, f.activation, f.kernel) for f in done.fused] == [
            (("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), "silu", "fp8_mlp"),
            (("ff.0", "ff.3"), "gelu", "fp8_mlp"),
        ]
        assert done.refused == () and done.model is model and "mlp.gate_proj + mlp.up_proj" in str(done)
        assert torch.equal(model(x), expected)  # the law is that of the modules
    assert list(model.state_dict()) == keys and model.mlp.swapped == swapped
    assert sum(isinstance(m, FusedLayers) for m in model.modules()) == 2
    twin = copy.deepcopy(model)
    assert twin.mlp.fused_0.chain[0].first is twin.mlp.gate_proj and torch.equal(twin(x), expected)
    assert fuse(model).fused == ()


def test_the_root_itself_and_a_gradient():
    model, x = compressed(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)))
    done = fuse(model)
    assert done.model is not model and done.fused[0].names == ("0", "2")
    given = x.clone().requires_grad_()
    done.model(given).float().sum().backward()
    again = x.clone().requires_grad_()
    model(again).float().sum().backward()
    assert torch.equal(given.grad, again.grad) and given.grad.any()


def test_a_given_graph_may_span_modules():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.ModuleDict({"dense": nn.Linear(64, 96)}), nn.ModuleDict({"dense": nn.Linear(96, 64)})

        def forward(self, x):
            return x + self.outer["dense"](F.gelu(self.inner["dense"](x)))

    block = Block()
    graph = fx.symbolic_trace(block).graph  # before quantization; its calls name the modules
    model, x = compressed(block)
    before = len(graph.nodes)
    done = fuse(model, graph)
    assert done.fused[0].names == ("inner.dense", "outer.dense") and len(graph.nodes) == before
    with torch.no_grad():
        assert torch.equal(done.model(x), model(x)) and isinstance(done.model, fx.GraphModule)
        same = fuse(fx.GraphModule(model, graph))
        assert same.fused == done.fused and torch.equal(same.model(x), model(x))


class Branching(Gated):
    """A gated block whose code looks at values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.abs().sum() > 1e9 else super().forward(x)


def test_the_recorded_graph_of_a_module_that_torch_fx_cannot_trace():
    net = Net()
    net.mlp = Branching(bias=True)
    model, x = compressed(net)
    wanted = model(x)
    assert not [f for f in fuse(copy.deepcopy(model)).fused if f.names[0].startswith("mlp")]
    graphs = recursive_trace(copy.deepcopy(model), dummy_input=x)
    assert graphs.source("mlp") == "recorded"
    done = fuse(model.mlp, graphs["mlp"])
    assert [f.names for f in done.fused] == [("gate_proj", "up_proj", "down_proj")]
    model.mlp = done.model
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))


def test_reasons_of_the_layers():
    def refused(model):
        (names, reason), *_ = fuse(model).refused
        return reason

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).to(torch.bfloat16).eval()
    assert refused(plain) == "0 is not quantized"
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    quantized = mtq.quantize(copy.deepcopy(plain), mtq.FP8_DEFAULT_CFG, [x])
    assert "compress the model first" in refused(quantized)
    model = mtq.compress(copy.deepcopy(quantized))
    model[2].input_quantizer.pre_quant_scale = torch.ones(96)
    assert "2 does not quantize its input, or does more" in refused(model)
    model = mtq.compress(copy.deepcopy(quantized))
    model[0].register_forward_hook(lambda *a: None)
    assert refused(model) == "hooks watch these layers"
    model = mtq.compress(copy.deepcopy(quantized))
    model[2].input_quantizer.amax = None
    assert refused(model) == "2 was not calibrated"
    int8 = mtq.compress(mtq.quantize(copy.deepcopy(plain), mtq.INT8_DEFAULT_CFG, [x]))
    assert "no kernel is registered for Chain" in refused(int8)
    with pytest.raises(ConfigError, match="training mode"):
        fuse(nn.Sequential(nn.Linear(4, 4)))
    gated, _ = compressed(Gated())
    gated.up_proj.input_quantizer.amax = 17.0
    assert "quantize their input differently" in refused(gated)


def test_models_that_cannot_be_traced_say_so():
    class Branch(Gated):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    model, _ = compressed(Branch())
    assert "cannot be traced" in fuse(model).refused[0][1]

    class Optional(Gated):
        def forward(self, x, mask=None):
            return super().forward(x if mask is None else x * mask)

    model, x = compressed(Optional())
    before = model(x)
    done = fuse(model)  # torch.fx would take the branch of a mask that is given
    assert "optional arguments" in done.refused[0][1] and torch.equal(done.model(x), before)
    model, _ = compressed(Gated())
    model.forward = lambda x: x
    assert "intercepted" in fuse(model).refused[0][1]


def test_a_registered_chain_wins():
    calls = []

    def kernel(x, layers):
        calls.append(layers.activation)
        return layers.apart(x)

    register_kernel(Chain(activation="relu", weight="i8*"), kernel)
    try:
        model, x = compressed(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)), "INT8_DEFAULT_CFG")
        expected = model(x)
        done = fuse(model)
        assert done.fused[0].kernel == "kernel" and torch.equal(done.model(x), expected) and calls == ["relu"]
    finally:
        unregister_kernel(kernel)
    found = Chain("relu", "no", E4M3, E4M3, E4M3, "bfloat16")
    assert find_chain(found) is fp8_mlp
    assert find_chain(Chain("relu", "no", E4M3, E4M3, E4M3, "float32")) is None
    assert GEMMRegistry().find_chain(found) is None
    with pytest.raises(ConfigError, match="callable"):
        GEMMRegistry().register_kernel(Chain(), "no colon")


def test_compiled_in_one_graph():
    model, x = compressed(Gated())
    fused = fuse(model).model
    with torch.no_grad():
        assert torch.equal(torch.compile(fused, fullgraph=True, backend="eager")(x), model(x))


def test_explain():
    model, x = compressed(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)))
    assert explain(model[0], x) == "reference: the tensor is on cpu"
    assert explain(model[0], x.float()).startswith("dequantized: no kernel is registered for e4m3")
    assert "compress the model" in explain(nn.Linear(4, 4), torch.ones(1, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("config", ["FP8_DEFAULT_CFG", "FP8_PER_CHANNEL_PER_TOKEN_CFG"])
def test_on_a_gpu(config):
    class Wide(Gated):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(512, 1024, bias=False), nn.Linear(512, 1024, bias=False)
            self.down_proj = nn.Linear(1024, 512, bias=False)

    torch.manual_seed(0)
    model = Wide().to("cuda", torch.bfloat16).eval()
    x = torch.randn(300, 512, device="cuda", dtype=torch.bfloat16)
    mtq.compress(mtq.quantize(model, getattr(mtq, config), [x]))
    with torch.no_grad():
        expected = model(x).float()
        done = fuse(model)
        if config != "FP8_DEFAULT_CFG":  # the second layer's scales are of its own tokens: there is no one scale to write with
            assert "no kernel is registered" in done.refused[0][1]
            return
        got = done.model(x).float()
    assert done.fused and ((got - expected).norm() / expected.norm()).item() < 5e-3
