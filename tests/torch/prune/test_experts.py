"""Whole experts: router rows, stacked weights and the config go together, and never fewer stay than a token picks."""

from __future__ import annotations

import pytest
import torch

from modelopt.torch.prune import prune
from modelopt.torch.trace.axes import infer_axes

transformers = pytest.importorskip("transformers")
IDS = {"input_ids": torch.arange(16)[None], "use_cache": False}
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "head_dim": 8,
}  # fmt: skip


def build(name):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **SIZES)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_half_of_the_experts(name, tmp_path):
    model = build(name)
    _, result = prune(model, [("structured", {"ratio": {"experts": 0.5}})], {}, IDS)
    assert {(f["kind"], f["before"], f["after"]) for f in result["families"]} == {("experts", 8, 4)}
    assert result["verified"]["exact"] and result["described_by_config"]
    model.save_pretrained(tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(again(**IDS).logits, model(**IDS).logits)


def test_experts_stay_unless_they_are_named_and_never_fewer_than_are_picked():
    model = build("mixtral")
    assert not [f for f in infer_axes(model, (), IDS).families if f.kind == "experts"]
    _, result = prune(model, [("structured", {"ratio": {"experts": 0.9}})], {}, IDS)
    assert {f["after"] for f in result["families"]} == {2}


def test_no_hook_outlives_a_trace():
    infer_axes(build("mixtral"), (), IDS)
    tables = [v for k, v in vars(torch.nn.modules.module).items() if k.startswith("_global") and isinstance(v, dict)]
    assert tables and not any(tables)
