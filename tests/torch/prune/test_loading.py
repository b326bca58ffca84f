"""Pruned transformers models as directories: plain from_pretrained where one config describes them, else our own loader."""

from __future__ import annotations

import pytest
import torch

import modelopt.torch.opt as mto
from modelopt.torch.prune import prune

transformers = pytest.importorskip("transformers")
IDS = {"input_ids": torch.arange(12)[None], "use_cache": False}


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("ratio", [{"default": 0.5}, {"layers": 0.5}, {"default": 0.5, "layers": 0.5}])
def test_a_uniform_model_is_described_by_its_config(tmp_path, ratio):
    model = llama()
    _, result = prune(model, [("structured", {"ratio": ratio})], {}, IDS)
    mto.save_pretrained(model, tmp_path / "out")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(plain(**IDS).logits, model(**IDS).logits)
    ours = mto.load_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(ours(**IDS).logits, model(**IDS).logits) and mto.history(ours) == mto.history(model)


@pytest.mark.parametrize("layers", [{}, {"layers": 0.25}])
def test_layers_of_different_widths_load_by_our_loader(tmp_path, layers):
    model = llama()
    ratio = {"model.layers.0.mlp.*": 0.5, "model.layers.3.mlp.*": 0.25, **layers}
    _, result = prune(model, [("structured", {"ratio": ratio})], {}, IDS)
    assert "no single config" in result["config"]
    mto.save_pretrained(model, tmp_path / "out")
    ours = mto.load_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(ours(**IDS).logits, model(**IDS).logits)
    assert len({layer.mlp.up_proj.out_features for layer in ours.model.layers}) > 1
