"""Fused experts: each layout against the plain model with its matrices rounded one by one."""

from __future__ import annotations

import copy

import hf_zoo as zoo
import pytest
import torch
from torch.nn import functional as F

import modelopt.torch.quantization as mtq
from modelopt.core.logging import ModelOptWarning
from modelopt.torch.kernels import fake_quantize
from modelopt.torch.opt import restore, save

EXPERTS = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4", "dbrx", "jetmoe"]
OFF = {"quantizer_name": "*", "enable": False}
# parameter -> how to see it as [E, out, in]
STRAIGHT, TURNED = (lambda w: w), (lambda w: w.transpose(1, 2))
LAYOUTS = {
    "gpt_oss": {"gate_up_proj": TURNED, "down_proj": TURNED},
    "llama4": {"gate_up_proj": TURNED, "down_proj": TURNED},
    "dbrx": {
        "w1": lambda w: w.view(4, 64, 64),
        "v1": lambda w: w.view(4, 64, 64),
        "w2": lambda w: w.view(4, 64, 64).transpose(1, 2),
    },
}
PLAIN = {"gate_up_proj": STRAIGHT, "down_proj": STRAIGHT}


def config(weight=None, inputs=None):
    entries = [OFF]
    if weight:
        entries.append({"quantizer_name": "*.experts.*weight_quantizer", "cfg": {"format": weight}})
    if inputs:
        entries.append({"quantizer_name": "*.experts.*input_quantizer", "cfg": {"format": inputs}})
    return {"quant_cfg": entries, "algorithm": "max"}


def cubes(model, layout):
    for key, parameter in model.named_parameters():
        leaf = key.rsplit(".", 1)[-1]
        if leaf in layout and "experts" in key and "shared" not in key:
            yield key, layout[leaf](parameter.detach())


@pytest.mark.parametrize("fmt", ["i8[...]*f32", "i4[1,...]*f32", "e2m1[32]~*e8m0"])
@pytest.mark.parametrize("name", [name for name in EXPERTS if name != "jetmoe"])
def test_weights_are_rounded_expert_by_expert_along_their_input(name, fmt):
    batch = zoo.inputs(name)
    reference = zoo.build(name)
    model = mtq.quantize(copy.deepcopy(reference), config(weight=fmt))
    count = 0
    for _, cube in cubes(reference, LAYOUTS.get(name, PLAIN)):
        for matrix in cube if cube.dim() == 3 else ():
            matrix.copy_(fake_quantize(matrix, fmt))
            count += 1
    assert count == sum(q.is_enabled for q in model.modules() if isinstance(q, mtq.nn.TensorQuantizer)) > 0
    assert torch.allclose(zoo.logits(model, batch), zoo.logits(reference, batch), atol=1e-5)


def test_inputs_of_both_products_are_quantized():
    name, batch = "mixtral", zoo.inputs("mixtral")
    model = mtq.quantize(zoo.build(name), config(weight="i8[1,...]*f32", inputs="i8[...]*f32"), [batch])
    experts = model.model.layers[0].mlp.experts
    hidden, index = torch.randn(5, 64), torch.tensor([[0, 1], [3, 1], [1, 0], [0, 3], [1, 3]])  # expert 2 gets nothing
    weights = torch.rand(5, 2)
    first, second = experts.gate_up_proj_input_quantizer, experts.down_proj_input_quantizer
    expected = torch.zeros(5, 64)
    for t in range(5):
        for k in range(2):
            e = int(index[t, k])
            w1, w2 = (fake_quantize(w[e], "i8[1,...]*f32") for w in (experts.gate_up_proj, experts.down_proj))
            gate, up = (w1 @ fake_quantize(hidden[t], "i8[...]*f32", amax=first.amax)).chunk(2)
            y = fake_quantize(F.silu(gate) * up, "i8[...]*f32", amax=second.amax)
            expected[t] += weights[t, k] * (w2 @ y)
    assert torch.allclose(experts(hidden, index, weights), expected, atol=1e-5)
    skipped = torch.where(index == 3, 4, index)  # an index past the last expert: no expert on this rank
    assert torch.isfinite(experts(hidden, skipped, weights)).all()


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_that_no_token_reached_have_every_range(name):
    ids = torch.full((1, 1), 5)
    batch = {"input_ids": ids}
    model = mtq.quantize(zoo.build(name), mtq.get_config("fp8"), [batch])
    enabled = [q for q in model.modules() if isinstance(q, mtq.nn.TensorQuantizer) and q.is_enabled]
    assert enabled
    assert all(q.amax is not None and torch.isfinite(q.amax).all() and bool((q.amax > 0).all()) for q in enabled)
    assert torch.isfinite(zoo.logits(model, zoo.inputs(name))).all()


@pytest.mark.parametrize("name", EXPERTS)
def test_every_expert_is_listed_once_for_export(name):
    model = mtq.quantize(zoo.build(name), "int8-wo")
    fused = 0
    for module in model.modules():
        if isinstance(module, mtq.nn.QuantModule):
            items = [t for t in module.quantized_tensors() if t.expert is not None]
            fused += len(items)
            for name_of in {t.name for t in items}:
                members = [t for t in items if t.name == name_of]
                assert [t.expert for t in members] == list(range(4))
                assert module._parameters[name_of].numel() == sum(t.tensor.numel() for t in members)
                assert len({id(t.weight_quantizer) for t in members}) == 4
                assert all(t.input_quantizer is members[0].input_quantizer is not None for t in members)
                assert all(t.interleaved == (name == "gpt_oss" and name_of == "gate_up_proj") for t in members)
                assert all(t.transposed == (name in ("gpt_oss", "llama4") or name_of == "w2") for t in members)
    assert fused >= 8


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "dbrx"])
def test_folded_weights_give_the_same_values(name):
    batch = zoo.inputs(name)
    model = mtq.quantize(zoo.build(name), "int8-wo")
    expected = zoo.logits(model, batch)
    assert torch.allclose(zoo.logits(mtq.fold_weight(model), batch), expected, atol=1e-6)


def test_training_reaches_every_expert_weight():
    model = mtq.quantize(zoo.build("mixtral"), "int8", [zoo.inputs("mixtral")])
    model.train()
    model(**zoo.inputs("mixtral", 4, 16)).logits.square().mean().backward()
    gradient = model.model.layers[0].mlp.experts.gate_up_proj.grad
    assert all(bool(g.abs().sum() > 0) for g in gradient)


def test_a_parallel_layer_of_jetmoe():
    model = zoo.build("jetmoe")
    model = mtq.quantize(model, "int8-wo")
    layer = next(m for m in model.modules() if type(m).__name__.endswith("ParallelExperts"))
    weight = layer._parameters["weight"].detach()
    x, sizes = torch.randn(6, weight.shape[2]), [1, 0, 3, 2]
    rows = torch.tensor([0, 2, 2, 2, 3, 3])
    rounded = torch.stack([fake_quantize(w, "i8[1,...]*f32") for w in weight])
    assert torch.allclose(layer(x, sizes), torch.einsum("si,soi->so", x, rounded[rows]), atol=1e-5)


def restored(name, model, directory):
    """Return a model of the same kind from what `save` wrote."""
    save(model, directory)
    return restore(zoo.build(name), directory)


@pytest.mark.parametrize("weight", ["i8[1,...]*f32", "i4[32]*f32", "e2m1[16]~*e4m3[...]*f32", "u4[32]*f16+u4"])
@pytest.mark.parametrize("name", EXPERTS)
def test_packed_experts_give_the_same_values(name, weight, tmp_path):
    batch = zoo.inputs(name)
    model = mtq.quantize(zoo.build(name), config(weight=weight))
    expected = zoo.logits(model, batch)
    full = sum(p.numel() for p in model.parameters())
    values = {key: module.quantized_tensors() for key, module in model.named_modules() if hasattr(module, "packed_of")}
    values = {key: [t.weight_quantizer(t.tensor) for t in items] for key, items in values.items()}
    mtq.compress(model)
    assert torch.equal(zoo.logits(model, batch), expected)
    assert sum(p.numel() for p in model.parameters()) < 0.9 * full
    for key, before in values.items():
        module = model.get_submodule(key)
        items = list(module.quantized_tensors())
        assert before and all(torch.equal(t.tensor, b) for t, b in zip(items, before, strict=True))
        assert all((t.packed is not None) == t.weight_quantizer.is_enabled for t in items)
        for parameter in {t.name for t in items}:
            assert getattr(module, parameter).shape == module.shape_of(module, parameter)
    assert torch.equal(zoo.logits(restored(name, model, tmp_path / "out"), batch), expected)


@pytest.mark.parametrize("inputs", ["i8[...]*f32", "e4m3[-1]~*f32", "e4m3[...]~*f32", "e2m1[16]~*e4m3[...]*f32"])
@pytest.mark.parametrize("name", EXPERTS)
def test_packed_experts_round_their_inputs(name, inputs):
    batch = zoo.inputs(name)
    model = mtq.quantize(zoo.build(name), config(weight="e4m3[...]*f32", inputs=inputs), [batch])
    expected = zoo.logits(model, batch)
    assert torch.allclose(zoo.logits(mtq.compress(model), batch), expected, atol=1e-6)


def test_packed_experts_leave_out_rows_of_nobody_and_compile():
    model = mtq.compress(mtq.quantize(zoo.build("mixtral"), config(weight="i8[1,...]*f32", inputs="i8[-1]~*f32")))
    experts = model.model.layers[0].mlp.experts
    hidden, index = torch.randn(5, 64), torch.tensor([[0, 1], [4, 1], [1, 0], [0, 4], [1, 4]])
    weights = torch.rand(5, 2)
    got = experts(hidden, index, weights)
    assert torch.isfinite(got).all() and not torch.equal(got, experts(hidden, index.clamp(max=3), weights))
    compiled = torch.compile(experts, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(hidden, index, weights), got, atol=1e-6)


def test_experts_that_differ_stay_and_are_named():
    model = mtq.quantize(zoo.build("mixtral"), config(weight="i8[1,...]*f32"))
    experts = model.model.layers[0].mlp.experts
    experts.down_proj_weight_quantizers[2].disable()
    expected = zoo.logits(model, zoo.inputs("mixtral"))
    with pytest.warns(ModelOptWarning, match=r"3 weights stay fake-quantized.*0\.mlp\.experts\.down_proj\[0\]"):
        mtq.compress(model)
    assert "down_proj" in experts._parameters and "gate_up_proj" not in experts._parameters
    assert torch.equal(zoo.logits(model, zoo.inputs("mixtral")), expected)


def test_packed_conv1d_gives_the_same_values(tmp_path):
    batch = zoo.inputs("gpt2")
    model = mtq.quantize(zoo.build("gpt2"), "int8-wo")
    expected = zoo.logits(model, batch)
    layer = mtq.compress(model).transformer.h[0].mlp.c_fc
    assert "weight" not in layer._parameters and layer.weight.shape == (layer.nx, layer.nf)
    assert torch.equal(zoo.logits(model, batch), expected)
    assert torch.equal(zoo.logits(restored("gpt2", model, tmp_path / "out"), batch), expected)


@pytest.mark.parametrize("inputs", [None, "i8[-1]~*f32", "i8[...]*f32"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4", "dbrx"])
def test_no_tokens_at_all(name, inputs):
    model = mtq.quantize(zoo.build(name), config(weight="i8[1,...]*f32", inputs=inputs), [zoo.inputs(name)])
    experts = next(m for key, m in model.named_modules() if key.endswith("experts"))
    given = () if name == "llama4" else (torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert experts(torch.zeros(0, 64), *given).shape == (0, 64)
    mtq.compress(model)
    assert experts(torch.zeros(0, 64), *given).shape == (0, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4"])
@pytest.mark.parametrize("weight, inputs", [("i4[32]*f32", None), ("e4m3[1,...]*f32", "e4m3[-1]~*f32")])
def test_packed_experts_multiply_on_a_gpu(name, weight, inputs):
    batch = {key: value.cuda() for key, value in zoo.inputs(name).items()}
    model = mtq.quantize(zoo.build(name).cuda().to(torch.bfloat16), config(weight=weight, inputs=inputs), [batch])
    expected = zoo.logits(model, batch).float()
    got = zoo.logits(mtq.compress(model), batch).float()
    assert (got - expected).norm() < 3e-2 * expected.norm()


@pytest.mark.gpu
def test_packed_experts_never_wait_for_the_host():
    model = mtq.compress(mtq.quantize(zoo.build("mixtral"), config(weight="i4[32]*f32"))).cuda().to(torch.bfloat16)
    experts, hidden = model.model.layers[0].mlp.experts, torch.randn(6, 64, device="cuda", dtype=torch.bfloat16)
    index, weights = torch.randint(0, 4, (6, 2), device="cuda"), torch.rand(6, 2, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        experts(hidden, index, weights)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = experts(hidden, index, weights)
        for _ in range(3):
            index.copy_(torch.randint(0, 4, (6, 2), device="cuda"))
            graph.replay()
            assert torch.equal(out, experts(hidden, index, weights))
