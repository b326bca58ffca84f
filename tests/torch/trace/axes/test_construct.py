"""The config of a pruned model: solved from the constructor, proven by building, loaded by plain from_pretrained."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from modelopt.torch.trace.axes import infer_axes
from modelopt.torch.trace.axes.apply import describe, reapply
from modelopt.torch.trace.axes.uniform import config_ties
from tests.torch.trace.axes.halving import half, pruned_by_half

transformers = pytest.importorskip("transformers")

IDS = torch.arange(2, 14).reshape(2, 6)
SIZES = {
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
    "attn_implementation": "eager",
}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    **SIZES,
}


def llama(**more):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **more}))


def gpt2(**more):
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_head=4, n_layer=2, n_positions=32, **SIZES, **more))


def bert():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, **SIZES))


def mixtral():
    config = transformers.MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    config._experts_implementation = "eager"  # grouped products exist in float32 only, and the oracle works in float64
    return transformers.MixtralForCausalLM(config)


def t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **SIZES))


def swin():
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4, attn_implementation="eager"
    )
    return transformers.SwinForImageClassification(config)


def loaded(model, folder):
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder, attn_implementation="eager").eval()
    again.config._experts_implementation = model.config._experts_implementation
    return again


@pytest.mark.parametrize(
    "make, inputs, width",
    [
        (llama, {"input_ids": IDS}, True),
        (gpt2, {"input_ids": IDS}, True),
        (bert, {"input_ids": IDS}, True),
        (mixtral, {"input_ids": IDS}, True),
        (swin, {"pixel_values": torch.randn(2, 3, 16, 16)}, True),
        (t5, {"input_ids": IDS, "decoder_input_ids": IDS}, False),  # its width is also a factor of its output
    ],
    ids=["llama", "gpt2", "bert", "mixtral", "swin", "t5"],
)
def test_a_uniformly_pruned_model_loads_with_from_pretrained(make, inputs, width, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    pruned, changes, *_ = pruned_by_half(model, (), inputs, width=width)
    assert changes.config == "The config describes the pruned model."
    again = loaded(pruned, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, pruned(**inputs).logits)
    shrunk = [k for k in changes.attributes if k.startswith("config.")]
    assert len(shrunk) >= 2 and sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())


def test_config_attributes_come_from_the_constructor():
    pruned, changes, *_ = pruned_by_half(llama().eval(), (), {"input_ids": IDS})
    new = {k.removeprefix("config."): v for k, v in changes.attributes.items() if k.startswith("config.")}
    assert new == {
        "hidden_size": (32, 16), "intermediate_size": (48, 24), "num_attention_heads": (4, 1), "num_key_value_heads": (2, 1),
    }  # fmt: skip
    attention = pruned.model.layers[0].self_attn
    assert attention.num_key_value_groups == 1 and pruned.config.head_dim == attention.head_dim == 8


def test_an_optional_attribute_is_set_where_a_size_needs_it(tmp_path):
    model = gpt2().eval()
    assert model.config.n_inner is None
    pruned, changes, *_ = pruned_by_half(model, (), {"input_ids": IDS}, names=("mlp",))
    assert changes.attributes["config.n_inner"] == (None, 64)
    again = loaded(pruned, tmp_path)
    assert torch.equal(again(IDS).logits, pruned(IDS).logits)


def test_layers_that_differ_are_named_and_load_by_description():
    model = llama().eval()
    fresh = copy.deepcopy(model)
    pruned, changes, *_ = pruned_by_half(model, (), {"input_ids": IDS}, names=("layers.1.mlp",))
    assert "model.layers.1.mlp" in changes.config and "config.intermediate_size" in changes.config
    assert pruned.config.intermediate_size == 48
    reapply(fresh, json.loads(json.dumps(describe(changes)))).load_state_dict(pruned.state_dict())
    assert torch.equal(fresh(IDS).logits, pruned(IDS).logits)


def test_a_constant_made_of_a_size_is_not_lost():
    config = transformers.Gemma3TextConfig(**{**LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4})
    model = transformers.Gemma3ForCausalLM(config).eval()
    changes = pruned_by_half(model, (), {"input_ids": IDS})[1]
    assert "embed_scale" in changes.config  # sqrt(hidden_size), which a model built from the new config would compute anew
    assert pruned_by_half(model, (), {"input_ids": IDS}, width=False)[1].config == "The config describes the pruned model."


def test_families_that_one_config_ties():
    model = llama(num_hidden_layers=3).eval()
    axes = infer_axes(model, (), {"input_ids": IDS})
    sizes = {f.name: f.size for f in axes.families}
    ties = config_ties(axes, model)
    assert all(sizes[a] == sizes[b] for a, b in (t.families for t in ties))
    ffn = {n for t in ties for n in t.families if sizes[n] == 48}
    heads = {n for t in ties for n in t.families if sizes[n] == 2}
    assert len(ffn) == 3 and len(heads) >= 3
    assert config_ties(infer_axes(nn.Linear(3, 3), (torch.zeros(1, 3),)), nn.Linear(3, 3)) == ()


@dataclass
class Plan:
    width: int = 16
    hidden: int = 24
    ratio: float = 1.5


class Plain(nn.Module):
    """A model with a config of its own making."""

    def __init__(self, config):
        super().__init__()
        self.config, self.width = config, config.width
        self.a, self.b = nn.Linear(5, config.width), nn.Linear(config.width, config.hidden)
        self.gain, self.c = nn.Parameter(torch.ones(config.hidden)), nn.Linear(config.hidden, 3)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu() * self.gain)


def test_any_model_that_is_built_from_a_config():
    pruned, changes, *_ = pruned_by_half(Plain(Plan()), (torch.randn(2, 5),))
    assert (pruned.config.width, pruned.config.hidden, pruned.width) == (8, 12, 8)
    assert Plain(pruned.config).load_state_dict(pruned.state_dict())


def test_a_model_that_its_config_does_not_build_is_left_to_its_description():
    model = Plain(Plan())
    model.c = nn.Linear(24, 4)
    _, changes, *_ = pruned_by_half(model, (torch.randn(2, 5),))
    assert "changed after it was built" in changes.config


def test_a_model_without_a_config_has_nothing_to_describe():
    assert pruned_by_half(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.randn(2, 4),))[1].config == ""


def test_nothing_is_touched_by_planning():
    model = llama().eval()
    config, state = copy.deepcopy(model.config.to_dict()), torch.random.get_rng_state()
    axes = infer_axes(model, (), {"input_ids": IDS})
    drop, _ = axes.relax(half(axes))
    axes.apply(copy.deepcopy(model), drop)
    assert model.config.to_dict() == config and torch.equal(torch.random.get_rng_state(), state)
    assert type(model.config) is transformers.LlamaConfig
