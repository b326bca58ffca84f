"""A quantized model is one graph with one node for each enabled quantizer."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import modelopt.torch.quantization as mtq

SCHEMES = {
    "INT8": mtq.INT8_DEFAULT_CFG,
    "INT4": mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG,
    "FP8": mtq.FP8_DEFAULT_CFG,
    "FP8 per channel and token": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
    "NVFP4": mtq.NVFP4_DEFAULT_CFG,
    "MXFP8": mtq.MXFP8_DEFAULT_CFG,
    "W4A8": {
        "quant_cfg": [
            {"quantizer_name": "*weight_quantizer", "cfg": [{"num_bits": 4, "block_sizes": {-1: 32}}, {"num_bits": (4, 3)}]},
            {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": (4, 3)}},
        ]
    },
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 32, 3, padding=1)
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x).transpose(1, 2))
        return x + self.down(torch.nn.functional.silu(self.up(x)))


X = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))


def quantized(scheme: str) -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    model = mtq.quantize(Net().eval(), SCHEMES[scheme], forward_loop=[X])
    leaves = [q for q in model.modules() if isinstance(q, mtq.TensorQuantizer) and q.is_enabled]
    return model, len(leaves)


def nodes(graph: torch.fx.Graph) -> Counter[str]:
    return Counter(str(n.target) for n in graph.nodes if n.op == "call_function" and "modelopt" in str(n.target))


@pytest.fixture(autouse=True)
def _reset():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("grad", [False, True])
def test_compile_is_one_graph(scheme: str, grad: bool) -> None:
    model, count = quantized(scheme)
    graphs: list[torch.fx.Graph] = []

    def backend(module: torch.fx.GraphModule, inputs):
        graphs.append(module.graph)
        return module.forward

    with torch.set_grad_enabled(grad):
        expected = model(X)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        assert torch.allclose(compiled(X), expected, atol=1e-5)
    assert len(graphs) == 1 and sum(nodes(graphs[0]).values()) == count > 0
    assert set(nodes(graphs[0])) == {"modelopt.fake_quantize"} or set(nodes(graphs[0])) == {"modelopt.fake_quantize.default"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_export_is_one_node_for_each_quantizer(scheme: str) -> None:
    model, count = quantized(scheme)
    with torch.no_grad():
        program = torch.export.export(model, (X,), strict=False)
        assert nodes(program.graph) == {"modelopt.fake_quantize.default": count}
        assert torch.allclose(program.module()(X), model(X), atol=1e-5)


def test_export_with_dynamic_batch_and_strict() -> None:
    model, count = quantized("NVFP4")
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (X,), dynamic_shapes=({0: batch},), strict=False)
    other = torch.randn(5, 8, 16)
    assert torch.allclose(program.module()(other), model(other), atol=1e-5)
    assert nodes(torch.export.export(model, (X,), strict=True).graph) == {"modelopt.fake_quantize.default": count}


def test_training_compiles_through_aot_autograd() -> None:
    model, _ = quantized("INT8")
    model(X).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, backend="aot_eager", fullgraph=True)(X).square().sum().backward()
    assert all(torch.allclose(p.grad, expected[n], rtol=1e-4, atol=1e-5) for n, p in model.named_parameters())


def test_a_packed_model_compiles_and_exports() -> None:
    model, _ = quantized("INT4")
    mtq.compress(model)
    with torch.no_grad():
        expected = model(X)
        assert torch.allclose(torch.compile(model, backend="eager", fullgraph=True)(X), expected, atol=1e-5)
        program = torch.export.export(model, (X,), strict=False)
        assert nodes(program.graph)["modelopt.dequantize.default"] == 3
        assert torch.allclose(program.module()(X), expected, atol=1e-5)


def test_switching_a_quantizer_recompiles() -> None:
    model, _ = quantized("INT8")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        first = compiled(X)
        mtq.disable_quantizer(model, "*")
        assert torch.allclose(compiled(X), model(X), atol=1e-6) and not torch.allclose(first, model(X), atol=1e-6)
