from __future__ import annotations

import json

import pytest
import torch
import toy
from torch import nn

from modelopt.core.errors import CheckpointError, ConfigError
from modelopt.core.plugins import has
from modelopt.torch.opt import apply_mode, history, modelopt_state, restore
from modelopt.torch.utils import digest

pytestmark = pytest.mark.skipif(not has("transformers"), reason="transformers is not installed")

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(tied=True, seed=0, dtype=torch.bfloat16):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM._from_config(LlamaConfig(**LLAMA, tie_word_embeddings=tied), dtype=dtype).eval()


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=4, tie_word_embeddings=False)).eval()


def bert():
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    return BertForMaskedLM(
        BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    ).eval()


MODELS = {
    "llama tied": llama,
    "llama": lambda: llama(tied=False),
    "llama f32": lambda: llama(dtype=torch.float32),
    "mixtral": mixtral,
    "bert": bert,
}


def every_bit(model):
    return {
        n: digest(t) for n, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    }


def same(a, b):
    assert every_bit(a) == every_bit(b)
    assert [type(m) for m in a.modules()] == [type(m) for m in b.modules()]
    assert history(a) == history(b)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(a(ids).logits, b(ids).logits)


@pytest.fixture
def enabled():
    from modelopt.torch.opt import disable_huggingface_checkpointing, enable_huggingface_checkpointing

    enable_huggingface_checkpointing()
    yield
    disable_huggingface_checkpointing()


@pytest.mark.parametrize("case", MODELS)
def test_own_functions(tmp_path, toy_modes, case):
    from transformers import PreTrainedModel

    from modelopt.torch.opt import load_pretrained, save_pretrained

    before = dict(vars(PreTrainedModel))
    model = apply_mode(MODELS[case](), [("scale", {"factor": 1.5})])
    save_pretrained(model, tmp_path / "out")
    loaded = load_pretrained(tmp_path / "out")
    same(loaded, model)
    same(restore(MODELS[case](), tmp_path / "out"), model)  # the names in the file are the model's own
    if case.startswith("llama"):
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is model.config.tie_word_embeddings
    assert dict(vars(PreTrainedModel)) == before
    assert not loaded.training and "_modelopt_original_class" not in vars(type(model))
    save_pretrained(loaded, tmp_path / "again")
    same(load_pretrained(tmp_path / "again"), model)
    with pytest.raises(CheckpointError, match="not empty"):
        save_pretrained(loaded, tmp_path / "again")


@pytest.mark.parametrize("case", MODELS)
def test_patched_functions(tmp_path, toy_modes, enabled, case):
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    model = apply_mode(MODELS[case](), [("scale", {"factor": 1.5})])
    model.save_pretrained(tmp_path / "out")
    auto = AutoModelForMaskedLM if case == "bert" else AutoModelForCausalLM
    same(auto.from_pretrained(tmp_path / "out"), model)
    same(type(model).from_pretrained(tmp_path / "out"), model)
    plain = MODELS[case]()
    plain.save_pretrained(tmp_path / "out")  # a model without history leaves no stale modelopt.json
    assert not (tmp_path / "out/modelopt.json").exists()
    same(auto.from_pretrained(tmp_path / "out"), plain)


def test_packed_weights_shards_and_restore(tmp_path, toy_modes):
    from modelopt.torch.opt import load_pretrained, save_pretrained

    model = apply_mode(llama(), "scale")
    model.lm_head = toy.Wrapper(nn.Identity())  # nothing to pack in the tied head
    model.lm_head = nn.Linear(32, 64, bias=False).bfloat16()
    model = apply_mode(model, "pack")
    model.config.tie_word_embeddings = False
    save_pretrained(model, tmp_path / "out", max_shard_size="8KB")
    assert (tmp_path / "out/model.safetensors.index.json").exists()
    loaded = load_pretrained(tmp_path / "out")
    assert every_bit(loaded) == every_bit(model)
    fresh = llama(tied=False, seed=3)
    assert every_bit(restore(fresh, tmp_path / "out")) == every_bit(model)


def test_shared_buffers_and_nested(tmp_path, toy_modes):
    from modelopt.torch.opt import load_pretrained, save_pretrained

    model = llama()
    apply_mode(model.model.layers[0], [("scale", {"factor": 3.0})])
    first, *rest = [m for m in model.modules() if isinstance(m, toy.Scaled)]
    for m in rest:
        m._buffers["_amax"] = first._amax
    save_pretrained(model, tmp_path / "out")
    loaded = load_pretrained(tmp_path / "out")
    same(loaded, model)
    assert modelopt_state(loaded) == modelopt_state(model)


def test_enabling_is_idempotent_and_reversible(tmp_path, toy_modes):
    from transformers import PreTrainedModel

    from modelopt.torch.opt import disable_huggingface_checkpointing, enable_huggingface_checkpointing, load_pretrained

    before = dict(vars(PreTrainedModel))
    enable_huggingface_checkpointing()
    once = dict(vars(PreTrainedModel))
    enable_huggingface_checkpointing()
    assert dict(vars(PreTrainedModel)) == once != before
    model = apply_mode(llama(), "scale")
    model.save_pretrained(tmp_path / "out")
    same(load_pretrained(tmp_path / "out"), model)
    disable_huggingface_checkpointing()
    disable_huggingface_checkpointing()
    assert dict(vars(PreTrainedModel)) == before
    same(load_pretrained(tmp_path / "out"), model)


def test_damage_is_named(tmp_path, toy_modes):
    from modelopt.torch.opt import load_pretrained, save_pretrained

    def saved(name):
        save_pretrained(apply_mode(llama(), "scale"), tmp_path / name)
        return tmp_path / name

    path = saved("state")
    (path / "modelopt.json").write_text('{"steps": []}')
    with pytest.raises(CheckpointError, match="modelopt.json"):
        load_pretrained(path)
    (path / "modelopt.json").unlink()
    with pytest.raises(CheckpointError, match="no modelopt.json"):
        load_pretrained(path)
    path = saved("short")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="short"):
        load_pretrained(path)
    file.unlink()
    with pytest.raises(CheckpointError, match="short"):
        load_pretrained(path)
    path = saved("shape")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(CheckpointError, match="of another shape"):
        load_pretrained(path)
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="missing from the file: model.layers.2"):
        load_pretrained(path)
    (path / "config.json").write_text(json.dumps({**config, "architectures": ["Nothing"]}))
    with pytest.raises(CheckpointError, match="model_class"):
        load_pretrained(path)


def test_plain_modules_are_refused(tmp_path):
    from modelopt.torch.opt import save_pretrained

    with pytest.raises(ConfigError, match="no transformers model"):
        save_pretrained(nn.Linear(2, 2), tmp_path / "out")
    assert not list(tmp_path.iterdir())
