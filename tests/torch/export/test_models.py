"""Whole models: every preset with a layout is exported, loaded by transformers + compressed-tensors, and computes the same."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import modelopt.torch.quantization as mtq
from modelopt.core.errors import CheckpointError, ExportError
from modelopt.torch.export import collect, differences, export, export_hf_checkpoint, load, read, verify
from modelopt.torch.quantization.nn.modules import TensorQuantizer

PRESETS = {
    "INT8_DEFAULT_CFG": "both",
    "INT8_WEIGHT_ONLY_CFG": "both",
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": "both",
    "FP8_DEFAULT_CFG": "both",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": "both",
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": "both",
    "NVFP4_DEFAULT_CFG": "both",
    "W4A16_NVFP4_CFG": "both",
    "NVFP4_MLP_ONLY_CFG": "both",
    "W4A8_NVFP4_FP8_CFG": "hf",
    "MXFP8_DEFAULT_CFG": "both",
    "MXFP4_DEFAULT_CFG": "both",
    "W4A8_MXFP4_FP8_CFG": "both",
    "MXFP6_DEFAULT_CFG": "none",
    "MXINT8_DEFAULT_CFG": "none",
}
CASES = [
    (name, writer, torch.float32)
    for name, able in PRESETS.items()
    for writer in ("compressed-tensors", "hf")
    if able in ("both", writer)
]
CASES += [
    (name, "compressed-tensors", torch.bfloat16)
    for name in ("FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG")
]
ASYMMETRIC = {"quant_cfg": {"*weight_quantizer": {"format": "u4[64]*f32+u4"}, "*lm_head*": {"enable": False}}, "algorithm": "max"}


@pytest.mark.parametrize("name, writer, dtype", CASES)
def test_the_consumer_computes_what_the_fake_quantized_model_computes(tmp_path, quantized, name, writer, dtype):
    model = quantized(getattr(mtq, name), dtype)
    export(model, tmp_path / "out", writer)
    result = verify(tmp_path / "out", model)
    assert result.ok, str(result)
    if "INT4" not in name:  # its scales are rounded to the model's dtype
        assert result.weights_difference < 1e-5 * result.largest_logit
    if result.inputs_comparable:
        assert result.difference <= max(result.tolerance, result.weights_difference * 4)


def test_asymmetric_weights_load_with_dequantize(tmp_path, quantized):
    model = quantized(ASYMMETRIC)
    export(model, tmp_path / "out")
    result = verify(tmp_path / "out", model)
    assert result.ok and result.weights_difference == 0, str(result)


@pytest.mark.parametrize("name", [n for n, able in PRESETS.items() if able == "none"])
@pytest.mark.parametrize("writer", ["compressed-tensors", "hf"])
def test_formats_without_a_layout_are_refused_with_a_way_out(tmp_path, quantized, name, writer):
    with pytest.raises(ExportError, match=r"cannot hold this model.*modelopt.torch.opt.save"):
        export(quantized(getattr(mtq, name)), tmp_path / "out", writer)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_can_is_named(tmp_path, quantized):
    with pytest.raises(ExportError, match='The writer "hf" can'):
        export(quantized(mtq.W4A8_NVFP4_FP8_CFG), tmp_path / "out", "compressed-tensors")


def test_verify_sees_a_changed_scale(tmp_path, quantized):
    model = quantized(mtq.FP8_DEFAULT_CFG)
    export(model, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight_scale"] *= 1.01
    save_file(tensors, file, metadata={"format": "pt"})
    assert not verify(tmp_path / "out", model).ok


def test_the_model_in_memory_stays_as_it_was(tmp_path, quantized):
    model = quantized(mtq.NVFP4_DEFAULT_CFG)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    places = {k: v.data_ptr() for k, v in model.state_dict().items()}
    export_hf_checkpoint(model, export_dir=tmp_path / "out")
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) and after[k].data_ptr() == places[k] for k in before)


def test_fused_layers_have_one_scale_in_model_and_file(tmp_path, quantized):
    export(quantized(mtq.NVFP4_DEFAULT_CFG), tmp_path / "out", "hf")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for key in ("weight_scale_2", "input_scale"):
        q, k, v = (tensors[f"model.layers.0.self_attn.{p}_proj.{key}"] for p in "qkv")
        assert q == k == v
        assert tensors[f"model.layers.1.mlp.gate_proj.{key}"] == tensors[f"model.layers.1.mlp.up_proj.{key}"]


@pytest.mark.parametrize("writer", ["compressed-tensors", "hf"])
@pytest.mark.parametrize("mode", ["dequantized", "fake", "packed"])
def test_reading_back_gives_the_same_model(tmp_path, quantized, ids, writer, mode):
    model = quantized(mtq.FP8_DEFAULT_CFG)
    export(model, tmp_path / "out", writer)
    back = load(tmp_path / "out", mode)
    reference = copy.deepcopy(model)
    if mode == "dequantized":
        for module in reference.modules():
            if isinstance(module, TensorQuantizer) and module.format is not None and not module.format.dynamic:
                module.disable()
        for name, module in back.named_modules():
            if hasattr(reference.get_submodule(name), "weight_quantizer") and "lm_head" not in name:
                quantizer = model.get_submodule(name).weight_quantizer
                assert torch.equal(module.weight, quantizer(model.get_submodule(name).weight)), name
        return
    with torch.no_grad():
        assert torch.equal(back(input_ids=ids).logits, reference(input_ids=ids).logits)


def test_key_value_cache_scales_are_written(tmp_path, quantized):
    config = copy.deepcopy(dict(mtq.FP8_DEFAULT_CFG))
    config = mtq.update_quant_cfg_with_kv_cache_quant(config, mtq.FP8_KV_CFG["quant_cfg"])
    model = quantized(config)
    checkpoint = collect(model)
    if not checkpoint.kv:
        pytest.skip("no attention quantizers in this model")
    export(model, tmp_path / "out", "hf")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.0.self_attn.k_proj.k_scale"].shape == ()
    export(model, tmp_path / "ct")
    assert load_file(tmp_path / "ct" / "model.safetensors")["model.layers.1.self_attn.v_scale"].shape == (1,)
    result = verify(tmp_path / "ct", model)
    assert result.ok, str(result)


def test_tied_embeddings_are_written_once(tmp_path, quantized):
    model = quantized(mtq.INT8_WEIGHT_ONLY_CFG, tie=True)
    export(model, tmp_path / "out")
    keys = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert "model.embed_tokens.weight" in keys and "lm_head.weight" not in keys
    assert verify(tmp_path / "out", model).ok


def test_source_files_and_unknown_tensors_travel_along(tmp_path, quantized, llama):
    source = tmp_path / "source"
    llama().save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    tensors["mtp.layers.0.weight"] = torch.ones(3, 3)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("hi")
    with pytest.warns(UserWarning, match="mtp.layers.0.weight"):
        export(quantized(mtq.FP8_DEFAULT_CFG), tmp_path / "out", source=source, max_shard_size="300KB")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "modelopt.json", "config.json"} <= names
    assert torch.equal(read(tmp_path / "out").tensors["mtp.layers.0.weight"], torch.ones(3, 3))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(tensors) - {k for k in tensors if k.endswith("proj.weight")} <= set(index["weight_map"])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_export_leaves_nothing(tmp_path, quantized, monkeypatch, error):
    from modelopt.torch.export.shards import ShardWriter

    real, calls = ShardWriter.add, []

    def add(self, name, tensor):
        calls.append(name)
        if len(calls) == 9:
            raise error
        real(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "add", add)
    with pytest.raises((KeyboardInterrupt, ExportError)):
        export(quantized(mtq.FP8_DEFAULT_CFG), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_another_architecture_is_refused(tmp_path, quantized):
    export(quantized(mtq.FP8_DEFAULT_CFG), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for change in ({"architectures": ["NoSuchModel"]}, {"num_hidden_layers": 3}, {"hidden_size": 512}):
        (tmp_path / "out" / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError):
            load(tmp_path / "out")


def test_a_plain_model_with_nothing_quantized_is_refused(tmp_path, llama):
    with pytest.raises(ExportError, match="Nothing in the model is quantized"):
        export(llama(), tmp_path / "out")


@pytest.mark.parametrize("writer", ["compressed-tensors", "hf"])
def test_plain_modules_go_out_and_come_back(tmp_path, writer):
    torch.manual_seed(0)

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128))

    x = torch.randn(4, 128)
    model = mtq.quantize(make().eval(), mtq.FP8_DEFAULT_CFG, forward_loop=lambda m: m(x))
    export(model, tmp_path / "out", writer)
    back = load(tmp_path / "out", "fake", model=make().eval())
    assert torch.equal(back(x), model(x))
    with pytest.raises(CheckpointError, match="does not fit"):
        load(tmp_path / "out", model=nn.Sequential(nn.Linear(128, 64)))


def test_modelopt_json_tells_the_story(tmp_path, quantized):
    export(quantized(mtq.NVFP4_DEFAULT_CFG), tmp_path / "out")
    told = json.loads((tmp_path / "out" / "modelopt.json").read_text())
    assert [s["mode"] for s in told["steps"]] == ["quantize"]
    assert told["export"]["writer"] == "compressed-tensors"
    assert told["export"]["layers"]["model.layers.0.mlp.up_proj"]["weight"] == "e2m1[16]~*e4m3[...]*f32"


def test_a_compressed_model_exports_the_same_codes(tmp_path, llama, ids):
    model = mtq.quantize(llama(), mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
    before = collect(model)
    kept = before.map_layers(lambda r: type(r)(**{**r.__dict__, "weight": r.quantized()}))
    assert differences(kept, collect(mtq.compress(model))) == []


def test_transformers_loads_an_export_while_it_knows_of_modelopt_json(tmp_path, quantized):
    from modelopt.torch.opt import disable_huggingface_checkpointing, enable_huggingface_checkpointing

    model = quantized(mtq.FP8_DEFAULT_CFG)
    export(model, tmp_path / "out")
    enable_huggingface_checkpointing()
    try:
        assert verify(tmp_path / "out", model).ok
    finally:
        disable_huggingface_checkpointing()


def test_weights_are_packed_one_at_a_time(tmp_path, quantized, monkeypatch):
    """No more than one packed weight is alive while shards are written."""
    import weakref

    from modelopt.torch.export.checkpoint import Deferred

    alive: list[weakref.ref] = []
    most = []
    real = Deferred.quantized

    def spy(self):
        q = real(self)
        alive.append(weakref.ref(q.codes))
        most.append(sum(r() is not None for r in alive))
        return q

    monkeypatch.setattr(Deferred, "quantized", spy)
    export(quantized(mtq.NVFP4_DEFAULT_CFG), tmp_path / "out", "hf")
    assert len(most) == 14 and max(most) <= 2  # the one being made, and the one just handed over


def test_an_export_does_not_replace_its_source(tmp_path, quantized, llama):
    llama().save_pretrained(tmp_path / "source")
    for target in (tmp_path / "source", tmp_path):
        with pytest.raises(ExportError, match="holds the original model"):
            export(quantized(mtq.FP8_DEFAULT_CFG), target, source=tmp_path / "source", overwrite=True)
    assert (tmp_path / "source" / "model.safetensors").exists()


def test_a_packed_head_of_another_name_is_no_longer_tied(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 256}
    model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes)).eval()
    model = mtq.quantize(model, mtq.INT8_WEIGHT_ONLY_CFG)
    mtq.enable_quantizer(model, "*predictions.decoder.weight_quantizer")
    export(model, tmp_path / "out")
    checkpoint = read(tmp_path / "out")
    assert "cls.predictions.decoder" in checkpoint.layers and "cls.predictions.decoder.bias" in checkpoint.tensors
    assert checkpoint.config["tie_word_embeddings"] is False
    result = verify(tmp_path / "out", model)
    assert result.ok, str(result)


def test_an_encoder_decoder_of_speech_goes_through_transformers(tmp_path):
    config = transformers.WhisperConfig(
        vocab_size=256,
        d_model=128,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        num_mel_bins=16,
        max_source_positions=32,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    model = transformers.WhisperForConditionalGeneration(config).eval()
    batch = {"input_features": torch.randn(2, 16, 64), "decoder_input_ids": torch.randint(3, 250, (2, 8))}
    export(mtq.quantize(model, mtq.FP8_DEFAULT_CFG, forward_loop=[batch]), tmp_path / "out")
    result = verify(tmp_path / "out", model)
    assert result.ok and result.difference < 1e-5, str(result)
