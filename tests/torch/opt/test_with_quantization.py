"""Saving and restoring with a real technique: every format's model comes back bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modelopt.core.errors import CheckpointError, ModelOptError
from modelopt.core.plugins import has
from modelopt.torch.opt import apply_mode, history, modelopt_state, restore, restore_from_modelopt_state, save
from modelopt.torch.utils import digest

mtq = pytest.importorskip("modelopt.torch.quantization")

PRESETS = ["INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "MXFP8_DEFAULT_CFG"]


def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 128))


def data():
    return torch.randn(4, 128, generator=torch.Generator().manual_seed(7))


def bits(model):
    return {n: digest(t) for n, t in model.state_dict().items()}


def quantized(preset):
    return mtq.quantize(build(), getattr(mtq, preset), lambda m: m(data()))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_round_trip(tmp_path, preset, name):
    model = quantized(preset)
    save(model, tmp_path / name)
    fresh = restore(build(1), tmp_path / name)
    assert bits(fresh) == bits(model) and torch.equal(fresh(data()), model(data()))
    assert modelopt_state(fresh) == modelopt_state(model) and history(fresh) == history(model)
    fresh = restore_from_modelopt_state(build(1), modelopt_state_path=tmp_path / name)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(data()), model(data()))


@pytest.mark.parametrize("preset", PRESETS)
def test_compressed_round_trip(tmp_path, preset):
    model = mtq.compress(quantized(preset))
    save(model, tmp_path / "out")
    fresh = restore(build(1), tmp_path / "out")
    assert [s.mode for s in history(fresh)] == [s.mode for s in history(model)]
    assert bits(fresh) == bits(model) and torch.equal(fresh(data()), model(data()))


def test_quantizing_twice_and_another_architecture(tmp_path):
    model = quantized("INT8_DEFAULT_CFG")
    with pytest.raises(ModelOptError, match="already"):
        apply_mode(model, [("quantize", mtq.INT8_DEFAULT_CFG)])
    save(model, tmp_path / "out")
    other = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32))
    before = bits(other)
    with pytest.raises(CheckpointError, match="2.weight"):
        restore(other, tmp_path / "out")
    assert bits(other) == before and type(other[0]) is nn.Linear


def test_nested(tmp_path):
    def whole(seed):
        return nn.ModuleDict({"a": build(seed), "b": build(seed + 1)})

    model = whole(0)
    mtq.quantize(model["a"], mtq.FP8_DEFAULT_CFG, lambda m: m(data()))
    mtq.quantize(model["b"], mtq.MXFP8_DEFAULT_CFG)
    save(model, tmp_path / "out")
    fresh = restore(whole(5), tmp_path / "out")
    assert bits(fresh) == bits(model)
    assert torch.equal(fresh["b"](fresh["a"](data())), model["b"](model["a"](data())))


def nvidia_archive(path, model, rules, quantizer):
    """Write what `mto.save` of ModelOpt 0.47 writes for a weight-only model: two entries, attributes with underscores."""
    common = {"_dynamic": False, "_unsigned": False, "_narrow_range": False, "_pass_through_bwd": True, "_disabled": False}
    off = {**common, "_num_bits": 8, "_axis": None, "_block_sizes": None, "_disabled": True}
    off["_pytorch_state_metadata"] = {"params": {}, "buffers": {}}
    state, tensors = {}, dict(model.state_dict())
    for name in ("0", "2"):
        amax, attributes = quantizer(model.get_submodule(name).weight.detach())
        buffers = {"_amax": {"shape": amax.shape, "dtype": amax.dtype}}
        state[f"{name}.weight_quantizer"] = {
            **common,
            **attributes,
            "_pytorch_state_metadata": {"params": {}, "buffers": buffers},
        }
        state[f"{name}.input_quantizer"] = state[f"{name}.output_quantizer"] = off
        tensors[f"{name}.weight_quantizer._amax"] = amax
    metadata = {"quantizer_state": state}
    entries = [
        ("quantize", {"config": {"quant_cfg": rules, "algorithm": "max", "effective_bits": None}, "metadata": metadata}),
        ("max_calibrate", {"config": {"method": "max", "layerwise": {"enable": False}}, "metadata": metadata}),
    ]
    whole = {"modelopt_state": {"modelopt_state_dict": entries, "modelopt_version": "0.47.0"}, "model_state_dict": tensors}
    torch.save(whole, path)


def channel(w):
    return w.abs().amax(1, keepdim=True), {"_num_bits": 8, "_axis": 0, "_block_sizes": None}


def blocks(w):
    n = w.shape[1] // 32
    extra = {"_block_sizes": {-1: 32, "type": "static"}, "_slices": (slice(None), slice(0, 4, None))}
    return w.reshape(-1, n, 32).abs().amax(2).reshape(-1, 1), {"_num_bits": 4, "_axis": (0,), **extra}


@pytest.mark.parametrize("quantizer", [channel, blocks])
def test_an_archive_of_nvidia_equals_our_own_model(tmp_path, quantizer):
    cfg = {"num_bits": 8, "axis": 0} if quantizer is channel else {"num_bits": 4, "block_sizes": {-1: 32, "type": "static"}}
    rules = [
        {"quantizer_name": "*", "parent_class": None, "cfg": None, "enable": False},
        {"quantizer_name": "*weight_quantizer", "parent_class": None, "cfg": cfg, "enable": True},
    ]
    nvidia_archive(tmp_path / "model.pth", build(), rules, quantizer)
    loaded = restore(build(1), tmp_path / "model.pth")
    ours = mtq.quantize(build(), {"quant_cfg": rules, "algorithm": "max"})
    assert torch.equal(loaded(data()), ours(data())) and not torch.equal(loaded(data()), build()(data()))
    assert [s.mode for s in history(loaded)] == ["quantize"]
    save(loaded, tmp_path / "out")
    assert torch.equal(restore(build(2), tmp_path / "out")(data()), ours(data()))


@pytest.mark.skipif(not has("transformers"), reason="transformers is not installed")
@pytest.mark.parametrize("preset", ["INT8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG"])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_huggingface_round_trip(tmp_path, preset, kind):
    from test_huggingface import llama, mixtral, same

    from modelopt.torch.opt import load_pretrained, save_pretrained

    ids = torch.arange(12)[None]
    model = mtq.quantize({"llama": llama, "mixtral": mixtral}[kind](), getattr(mtq, preset), lambda m: m(ids))
    save_pretrained(model, tmp_path / "out")
    same(load_pretrained(tmp_path / "out"), model)


@pytest.mark.skipif(not has("transformers"), reason="transformers is not installed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_transformers_model_loads_in_another_dtype(tmp_path, dtype):
    from transformers import LlamaConfig, LlamaForCausalLM

    from modelopt.torch.opt import disable_huggingface_checkpointing, enable_huggingface_checkpointing

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    ids = torch.arange(6)[None]
    model = LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16).eval()
    mtq.compress(mtq.quantize(model, "nvfp4", [ids]))
    enable_huggingface_checkpointing()
    try:
        model.save_pretrained(tmp_path / "out")
        fresh = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).eval()
    finally:
        disable_huggingface_checkpointing()
    logits = fresh(ids).logits
    assert logits.dtype == dtype and torch.allclose(logits.float(), model(ids).logits.float(), atol=0.02)
    assert dtype != torch.bfloat16 or torch.equal(logits, model(ids).logits)
