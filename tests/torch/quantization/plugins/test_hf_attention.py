"""Quantizers inside attention: what they change, what they leave alone, caches, compilation."""

from __future__ import annotations

import copy

import hf_zoo as zoo
import pytest
import torch

import modelopt.torch.quantization as mtq
from modelopt.core.errors import ConfigError
from modelopt.torch.kernels import fake_quantize

ALL_OFF = {"quantizer_name": "*", "enable": False}
FP8 = {"num_bits": (4, 3), "axis": None}
ATTENTION = [name for name in zoo.MODELS if name != "mamba"]


def only(pattern, cfg=FP8):
    return {"quant_cfg": [ALL_OFF, {"quantizer_name": pattern, "cfg": cfg}], "algorithm": "max"}


@pytest.mark.parametrize("name", ATTENTION)
def test_each_operand_is_reached_and_nothing_else_changes(name):
    batch = zoo.inputs(name)
    original = zoo.build(name)
    exact = zoo.logits(original, batch)
    implementation = original.config._attn_implementation
    for letter in ("q", "k", "v"):
        model = mtq.quantize(copy.deepcopy(original), only(f"*{letter}_bmm_quantizer"), [batch])
        changed = zoo.logits(model, batch)
        assert 0 < float((changed - exact).norm() / exact.norm()) < 0.3
        assert model.config._attn_implementation == implementation
        mtq.disable_quantizer(model, "*")
        assert torch.equal(zoo.logits(model, batch), exact)


@pytest.mark.parametrize("name", ATTENTION)
def test_the_explicit_attention_is_the_same_attention(name):
    batch = zoo.inputs(name)
    model = zoo.build(name)
    exact = zoo.logits(model, batch)
    mtq.quantize(model, only("*softmax_quantizer"), [batch])
    assert not torch.equal(zoo.logits(model, batch), exact)
    seen = []
    for key, quantizer in model.named_modules():
        if key.endswith("softmax_quantizer"):
            assert 0 < float(quantizer.amax) <= 1
            quantizer.forward = lambda p: seen.append(p) or p  # let probabilities through as they are
    assert torch.allclose(zoo.logits(model, batch), exact, atol=2e-6)
    assert seen
    assert all(torch.allclose(p.sum(-1), torch.ones(()), atol=1e-5) for p in seen) or name == "gpt_oss"  # sinks take a share


def test_the_quantized_operands_are_those_of_the_matrix_products():
    name, batch = "llama", zoo.inputs("llama")
    model = mtq.quantize(zoo.build(name), only("*[qkv]_bmm_quantizer"), [batch])
    attention = model.model.layers[0].self_attn
    seen = {}
    for letter in "qkv":
        getattr(attention, f"{letter}_bmm_quantizer").register_forward_hook(
            lambda m, args, out, letter=letter: seen.update({letter: (args[0], out)})
        )
    attention.o_proj.register_forward_pre_hook(lambda m, args: seen.update(mixed=args[0]))
    zoo.logits(model, batch)
    assert seen["k"][0].shape == (2, 2, 8, 16)  # key heads before they are repeated for the query heads
    q, k, v = (fake_quantize(seen[c][0], "e4m3[...]*f32", amax=seen[c][0].abs().max()) for c in "qkv")
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = (q @ k.transpose(2, 3)) * 16**-0.5
    scores = scores.masked_fill(~torch.ones(8, 8, dtype=torch.bool).tril(), -torch.inf)
    expected = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 8, 64)
    assert torch.allclose(seen["mixed"], expected, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_cache_quantized_at_every_step_is_a_cache_quantized_once(name):
    batch = zoo.inputs(name)
    model = mtq.quantize(zoo.build(name), only("*[kv]_bmm_quantizer"), [batch])
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(batch["input_ids"], use_cache=True, **settings)
    assert torch.equal(cached, model.generate(batch["input_ids"], use_cache=False, **settings))
    with torch.no_grad():
        start = model(cached[:, :9], use_cache=True)
        rest = model(cached[:, 9:], past_key_values=start.past_key_values)
    assert torch.allclose(torch.cat([start.logits, rest.logits], 1), zoo.logits(model, {"input_ids": cached}), atol=2e-6)


def test_softmax_without_an_eager_attention_is_refused():
    model = mtq.quantize(zoo.build("llama"), only("*softmax_quantizer"), [zoo.inputs("llama")])
    for module in model.modules():
        if hasattr(module, "softmax_quantizer"):
            module.__dict__["config"] = copy.copy(module.__dict__["config"])
            module.__dict__["config"]._attn_implementation_internal = "flex_attention"
    with pytest.raises(ConfigError, match=r"softmax_quantizer .* eager"):
        model.model.layers[0].self_attn(
            torch.zeros(1, 2, 64), position_embeddings=(torch.ones(1, 2, 16), torch.zeros(1, 2, 16)), attention_mask=None
        )


def test_one_graph():
    name = "mixtral"
    batch = {**zoo.inputs(name), "use_cache": False}
    config = mtq.get_config("fp8")
    config["quant_cfg"].append({"quantizer_name": "*[kv]_bmm_quantizer", "cfg": FP8})
    model = mtq.quantize(zoo.build(name), config, [batch]).requires_grad_(False)
    expected = zoo.logits(model, batch)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(zoo.logits(compiled, batch), expected, atol=1e-6)
    torch._dynamo.reset()
    program = torch.export.export(model, (), batch, strict=False)
    enabled = sum(q.is_enabled for q in model.modules() if isinstance(q, mtq.nn.TensorQuantizer))
    assert sum("modelopt.fake_quantize" in str(node.target) for node in program.graph.nodes) == enabled
