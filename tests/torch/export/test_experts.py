"""Fused experts leave as one matrix for each expert, under the names that checkpoints use, and come back fused."""

from __future__ import annotations

import pytest
import torch

import modelopt.torch.quantization as mtq
from modelopt.core.errors import ExportError
from modelopt.torch import kernels
from modelopt.torch.export import export, load, read, verify
from modelopt.torch.export.passes.split_experts import _split_packed, joined
from modelopt.torch.quantization.nn.modules import PackedExperts

transformers = pytest.importorskip("transformers")
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
    "max_position_embeddings": 64,
}


def make(name: str, **more) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **more)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


MODELS = {
    "Mixtral": ({"num_local_experts": 4}, "model.layers.0.block_sparse_moe.experts.3.w1", "model.layers.0.block_sparse_moe.gate"),
    "Qwen3Moe": (
        {"num_experts": 4, "moe_intermediate_size": 128, "num_experts_per_tok": 2},
        "model.layers.0.mlp.experts.3.gate_proj",
        "model.layers.0.mlp.gate",
    ),
}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("preset, writer", [("INT8_WEIGHT_ONLY_CFG", "hf"), ("NVFP4_DEFAULT_CFG", "compressed-tensors")])
def test_experts_leave_one_by_one_and_come_back(tmp_path, ids, name, preset, writer):
    more, expert, router = MODELS[name]
    model = mtq.quantize(make(name, **more), getattr(mtq, preset), forward_loop=lambda m: m(input_ids=ids))
    export(model, tmp_path / "out", writer)
    checkpoint = read(tmp_path / "out")
    assert expert in checkpoint.layers and router in checkpoint.unquantized and f"{router}.weight" in checkpoint.tensors
    assert len([n for n in checkpoint.layers if "experts" in n]) == 12
    back = load(tmp_path / "out", "fake")
    with torch.no_grad():
        difference = (back(input_ids=ids).logits - model(input_ids=ids).logits).abs().max()
    assert difference < 1e-5
    result = verify(tmp_path / "out", model)
    assert result.ok, str(result)


@pytest.mark.parametrize("preset, writer", [("INT8_WEIGHT_ONLY_CFG", "hf"), ("NVFP4_DEFAULT_CFG", "compressed-tensors")])
def test_packed_experts_leave_as_the_same_files(tmp_path, ids, preset, writer):
    model = mtq.quantize(make("Mixtral", num_local_experts=4), getattr(mtq, preset), forward_loop=lambda m: m(input_ids=ids))
    export(model, tmp_path / "plain", writer)
    export(mtq.compress(model), tmp_path / "packed", writer)
    plain, packed = read(tmp_path / "plain"), read(tmp_path / "packed")
    assert sum("experts" in n for n in packed.layers) == 12 and plain.layers.keys() == packed.layers.keys()
    for name, record in plain.layers.items():
        parts = zip(record.quantized().parts, packed.layers[name].quantized().parts, strict=True)
        assert all(torch.equal(a.float(), b.float()) for a, b in parts), name
    result = verify(tmp_path / "packed", model)
    assert result.ok, str(result)
    back = load(tmp_path / "packed", "packed")
    assert sum(isinstance(m, PackedExperts) for m in back.modules()) == 2
    with torch.no_grad():
        assert torch.equal(back(input_ids=ids).logits, load(tmp_path / "packed", "fake")(input_ids=ids).logits)


def test_parts_that_share_no_scale_are_not_joined():
    whole = kernels.quantized(torch.randn(8, 64), "e4m3[...]*f32")
    other = kernels.quantized(torch.randn(8, 64) * 2, "e4m3[...]*f32")
    assert joined([whole, other]) is None and torch.equal(joined([whole, whole]).dequantize()[8:], whole.dequantize())
    rows = [kernels.quantized(torch.randn(8, 64), "nf4[64]*i8[256]*f32") for _ in range(2)]
    assert torch.equal(joined(rows).dequantize(), torch.cat([q.dequantize() for q in rows]))


@pytest.mark.parametrize("fmt", ["nf4[32]*i8[3,1]*f32", "nf4[1,32]*i8[4,256]*f32", "u4[3,32]*f16+u4", "e2m1[16]~*e4m3[...]*f32"])
@pytest.mark.parametrize("rows", [2, 6, 8, 10, 12, 256])
def test_packed_halves_have_the_values_of_the_whole(fmt, rows):
    whole = kernels.quantized(torch.randn(rows, 64), fmt)
    halves = _split_packed(whole, 2)
    if halves is not None:  # else a block lies across the cut, on some level of scales
        assert torch.equal(torch.cat([h.dequantize() for h in halves]), whole.dequantize())
        assert torch.equal(joined(halves).dequantize(), whole.dequantize())
    one, other = (kernels.quantized(torch.randn(rows, 64), fmt) for _ in range(2))
    both = joined([one, other])
    assert both is None or torch.equal(both.dequantize(), torch.cat([one.dequantize(), other.dequantize()]))
    assert joined([one]) is one


def test_experts_that_checkpoints_keep_fused_are_refused(tmp_path, ids):
    model = mtq.quantize(make("GptOss", num_local_experts=4), mtq.INT8_WEIGHT_ONLY_CFG)
    with pytest.raises(ExportError, match="keep gate_up_proj fused"):
        export(model, tmp_path / "out")
