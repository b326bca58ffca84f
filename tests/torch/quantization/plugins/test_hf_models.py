"""Every family of the zoo: presets, coverage, save and restore, ties, and what is left alone."""

from __future__ import annotations

import copy
import warnings

import hf_zoo as zoo
import pytest
import torch

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
from modelopt.core.logging import ModelOptWarning
from modelopt.torch.quantization.presets import get_config, update_quant_cfg_with_kv_cache_quant

ATTENTION = [name for name in zoo.MODELS if name != "mamba"]


@pytest.mark.parametrize("name", zoo.MODELS)
def test_presets_cover_the_model_and_stay_near_it(name):
    batch = zoo.inputs(name)
    original = zoo.build(name)
    exact = zoo.logits(original, batch)
    for scheme, bound in (("int8", 0.04), ("fp8", 0.15), ("nvfp4", 0.5), ("mxfp8", 0.15)):
        model = copy.deepcopy(original)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ModelOptWarning)
            mtq.quantize(model, scheme, [batch])
        logits = zoo.logits(model, batch)
        error = float((logits - exact).norm() / exact.norm())
        assert torch.isfinite(logits).all()
        assert 1e-4 < error < bound, (scheme, error)
        covered = mtq.coverage(model)
        assert covered.share >= 0.9, str(covered)
        assert covered.quantized


@pytest.mark.parametrize("name", zoo.MODELS)
def test_saved_and_restored_bit_equal(name, tmp_path):
    batch = zoo.inputs(name)
    config = get_config("fp8")
    if name in ATTENTION:
        config = update_quant_cfg_with_kv_cache_quant(config, "fp8")
    model = mtq.quantize(zoo.build(name), config, [batch])
    on = [n for n, q in model.named_modules() if n.endswith(("k_bmm_quantizer", "v_bmm_quantizer")) and q.is_enabled]
    assert bool(on) == (name in ATTENTION)
    logits = zoo.logits(model, batch)
    mto.save(model, tmp_path / "saved")
    other = zoo.build(name, seed=1)
    assert not torch.equal(zoo.logits(other, batch), logits)
    restored = mto.restore(other, tmp_path / "saved")
    assert torch.equal(zoo.logits(restored, batch), logits)
    assert torch.equal(zoo.logits(copy.deepcopy(model), batch), logits)


@pytest.mark.parametrize(
    ("name", "excluded"), [("mixtral", "mlp.gate"), ("gpt_oss", "router"), ("dbrx", "router"), ("llama", "lm_head")]
)
def test_routers_and_heads_are_left_alone_and_listed(name, excluded):
    model = mtq.quantize(zoo.build(name), "int8-wo")
    assert any(excluded in w.name for w in mtq.coverage(model).excluded)


def test_what_nothing_can_quantize_is_listed_as_left():
    model = mtq.quantize(zoo.build("mamba"), "int8-wo")
    left = mtq.coverage(model).left
    assert {w.name.rsplit(".", 2)[-2] for w in left} == {"dt_proj"}
    assert "without calling" in left[0].reason


def test_experts_of_an_unknown_layout_are_listed_as_left():
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.num_experts = 4
            self.cubes = torch.nn.Parameter(torch.randn(4, 256, 256))

        def forward(self, x):
            return torch.einsum("th,ehi->ti", x, self.cubes)

    model = zoo.build("llama")
    model.model.layers[0].extra = Experts()
    mtq.quantize(model, "int8-wo")
    with pytest.warns(UserWarning, match=r"cubes \(Experts has no quantized class\)"):
        covered = mtq.coverage(model)
    assert [w.name for w in covered.left] == ["model.layers.0.extra.cubes"]


def test_a_tied_head_stays_tied_and_counts_once():
    model = zoo.build("gemma3")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = mtq.coverage(copy.deepcopy(model), threshold=0.0).total_bytes
    raw = model.lm_head.weight.detach().clone()
    config = get_config("int8-wo")
    config["quant_cfg"].append({"quantizer_name": "*lm_head*weight_quantizer", "enable": True})
    mtq.quantize(model, config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.model.embed_tokens.weight, raw)
    covered = mtq.coverage(model)
    assert sum("lm_head" in w.name or "embed_tokens" in w.name for w in covered.quantized) == 1
    assert covered.total_bytes == before


def test_conv1d_is_quantized_in_the_orientation_of_a_linear():
    model = mtq.quantize(zoo.build("gpt2"), "int8-wo")
    layer = model.transformer.h[0].mlp.c_fc  # weight [in 64, out 256]
    (item,) = layer.quantized_tensors()
    assert item.transposed
    assert tuple(item.tensor.shape) == (256, 64)
    assert layer.weight_quantizer.amax.numel() == 256
    assert torch.allclose(layer.weight_quantizer.amax.flatten(), layer.weight.abs().amax(0))
    x = torch.randn(3, 64)
    scale = layer.weight.abs().amax(0) / 127
    expected = x @ ((layer.weight / scale).round() * scale) + layer.bias
    assert torch.allclose(layer(x), expected, atol=1e-5)
