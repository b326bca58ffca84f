"""Equalization pairs: scaled and divided, every model is the same function; and the pairs are those that people use."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from modelopt.core.errors import ShapeError
from modelopt.torch.trace import equalization_pairs
from modelopt.torch.trace.inputs import resolve_inputs, run
from modelopt.torch.trace.record_graph import leaves
from tests.torch.trace.models import Classic, tiny_llama


def unchanged(model: nn.Module) -> tuple:
    """Apply random factors to all pairs at once and compare in float64; return the pairs."""
    model = copy.deepcopy(model).double().eval()
    args, kwargs = resolve_inputs(model)
    before = [t for _, t in leaves(run(model, (args, kwargs)))]
    pairs = equalization_pairs(model, (args, kwargs))
    for pair in pairs:
        pair.apply(model, torch.rand(pair.size, dtype=torch.float64) * 3 + 0.3)
    after = [t for _, t in leaves(run(model, (args, kwargs)))]
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    return pairs


def names(pairs) -> list[str]:
    return [p.name for p in pairs]


def test_llama_has_the_pairs_of_smoothquant_and_awq():
    pairs = unchanged(tiny_llama())
    assert len(pairs) == 9 and names(pairs)[-1] == "model.norm.weight -> lm_head.weight"
    layer = "model.layers.0."
    proj = [f"{layer}self_attn.{n}_proj.weight" for n in "qkvo"]
    assert names(pairs)[:4] == [
        f"{layer}input_layernorm.weight -> {', '.join(proj[:3])}",
        f"{proj[2]} -> {proj[3]}",
        f"{layer}post_attention_layernorm.weight -> {layer}mlp.gate_proj.weight, {layer}mlp.up_proj.weight",
        f"{layer}mlp.up_proj.weight -> {layer}mlp.down_proj.weight",
    ]
    assert [p.size for p in pairs[:4]] == [64, 32, 64, 128]


def test_classic_network():
    assert unchanged(Classic())


class Mixed(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)
        self.act = act

    def forward(self, x):
        return self.c(self.act(self.a(x)) + self.b(x))


@pytest.mark.parametrize(
    ("act", "wanted"),
    [
        (nn.ReLU(), ["a.weight, a.bias, b.weight, b.bias -> c.weight"]),
        (nn.LeakyReLU(), ["a.weight, a.bias, b.weight, b.bias -> c.weight"]),
        (nn.GELU(), []),
        (nn.Tanh(), []),
    ],
)
def test_activations(act, wanted):
    assert names(unchanged(Mixed(act))) == wanted


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1)),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.Conv2d(8, 4, 1)),
        nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)),
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 26 * 26, 5)),
    ],
    ids=["conv-bn", "depthwise", "layernorm", "flatten"],
)
def test_small_models(model):
    assert len(unchanged(model)) == 1


class FusedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(2, 8, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(2, 8, 16))


def test_values_in_a_fused_projection():
    (pair,) = unchanged(FusedAttention())
    assert pair.size == 16 and (pair.producers["qkv.weight", 0] >= 0).tolist() == [False] * 32 + [True] * 16


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)

    def forward(self, ids):
        return self.embed(ids) @ self.embed.weight.t()


def test_tied_weights_are_left_alone():
    assert unchanged(Tied()) == ()


@pytest.mark.parametrize("name", ["Bert", "T5", "OPT", "Mixtral", "GPT2", "ViT"])
def test_transformers_models(name):
    transformers = pytest.importorskip("transformers")
    tiny = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 64}
    made = {
        "Bert": lambda t: t.BertForMaskedLM(t.BertConfig(**tiny)),
        "T5": lambda t: t.T5ForConditionalGeneration(
            t.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=64)
        ),
        "OPT": lambda t: t.OPTForCausalLM(t.OPTConfig(**tiny, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=32)),
        "Mixtral": lambda t: t.MixtralForCausalLM(t.MixtralConfig(**tiny, num_key_value_heads=2, num_local_experts=4)),
        "GPT2": lambda t: t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)),
        "ViT": lambda t: t.ViTForImageClassification(t.ViTConfig(**tiny | {"vocab_size": 2}, image_size=32, patch_size=16)),
    }[name](transformers)
    made.config._experts_implementation = "eager"  # the batched kernel knows no float64
    found = names(unchanged(made))
    values = "c_attn" if name == "GPT2" else "v"
    assert any(values in n.split(" -> ")[0] for n in found)
    assert {"Bert": 1, "T5": 5, "OPT": 4, "Mixtral": 2, "GPT2": 3, "ViT": 4}[name] <= len(found), found


def test_bad_factors():
    (pair,) = equalization_pairs(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    for factors in (torch.ones(3), -torch.ones(8)):
        with pytest.raises(ShapeError, match="8 positive factors"):
            pair.apply(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), factors)


def test_without_weights():
    with torch.device("meta"):
        model = tiny_llama(num_hidden_layers=1)
    assert len(equalization_pairs(model)) == 5
