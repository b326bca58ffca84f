"""Two right models may differ in their logits; no layer of theirs does. A wrong scale shows in a layer."""

from __future__ import annotations

import copy

import torch

import modelopt.torch.quantization as mtq
from modelopt.torch.export import export, load, verify
from modelopt.torch.export.layerwise import largest_layer_difference
from modelopt.torch.export.readers.files import inverse
from modelopt.torch.export.verify import _weights_agree


def with_cache(config):
    return mtq.update_quant_cfg_with_kv_cache_quant(copy.deepcopy(dict(config)), mtq.FP8_KV_CFG["quant_cfg"])


def test_a_layer_shows_what_is_wrong_in_it(quantized, ids):
    model = quantized(with_cache(mtq.NVFP4_DEFAULT_CFG))
    other = copy.deepcopy(model)
    assert largest_layer_difference(model, other, ids)[0] == 0
    other.model.layers[1].mlp.down_proj.input_quantizer.amax *= 1.1
    worst, name = largest_layer_difference(model, other, ids)
    assert worst > 0.01 and name == "model.layers.1.mlp.down_proj"
    assert not any(module._forward_hooks for module in model.modules())


def test_nvfp4_with_an_fp8_cache_is_verified_with_and_without_the_model(tmp_path, quantized):
    model = quantized(with_cache(mtq.NVFP4_DEFAULT_CFG))
    export(model, tmp_path / "out")
    for given in (model, None):
        result = verify(tmp_path / "out", given)
        assert result.ok and result.weights_difference == 0, str(result)


def test_the_reader_finds_the_weights_that_the_consumer_finds(tmp_path, quantized):
    """FP4 weights come out of transformers in bfloat16; so must those of our reader's model before logits are compared."""
    model = quantized(mtq.W4A16_NVFP4_CFG)
    export(model, tmp_path / "out")
    assert verify(tmp_path / "out").weights_difference == 0
    assert load(tmp_path / "out").dtype == torch.float32


def test_the_inverse_of_a_divisor_gives_it_back():
    torch.manual_seed(0)
    scales = torch.rand(2000) + 1e-3
    divisors = scales.reciprocal()
    back = torch.stack([inverse(d) for d in divisors])
    assert torch.equal(back.reciprocal(), divisors)
    assert bool(((back.view(torch.int32) - scales.view(torch.int32)).abs() <= 1).all())


def test_weights_agree_to_one_step_of_their_dtype():
    torch.manual_seed(0)
    one = torch.nn.Sequential(torch.nn.Linear(8, 8))
    other = copy.deepcopy(one)
    rounding = {"0": torch.bfloat16}
    with torch.no_grad():
        other[0].weight[1, 2] *= 1 + 2.0**-8
    assert _weights_agree(one, other, rounding)
    with torch.no_grad():
        other[0].weight[1, 2] *= 1 + 2.0**-6
    assert not _weights_agree(one, other, rounding)
