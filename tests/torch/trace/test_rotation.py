"""Rotation-invariant spaces: turned by a random orthogonal matrix, every model is the same function."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from modelopt.core.errors import ShapeError
from modelopt.torch.trace import rotation_axes
from modelopt.torch.trace.inputs import resolve_inputs, run
from modelopt.torch.trace.record_graph import leaves
from tests.torch.trace.models import tiny_llama


def unchanged(model: nn.Module, inputs=None) -> tuple:
    """Fold and rotate all spaces at once and compare in float64; return the spaces."""
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    args, kwargs = resolve_inputs(model, inputs)
    before = [t for _, t in leaves(run(model, (args, kwargs)))]
    axes = rotation_axes(model, (args, kwargs))
    for axis in axes:
        if not axis.centered:
            axis.apply(model, torch.linalg.qr(torch.randn(axis.size, axis.size, dtype=torch.float64))[0])
    after = [t for _, t in leaves(run(model, (args, kwargs)))]
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    return axes


def test_llama_has_the_residual_stream_and_the_heads():
    axes = unchanged(tiny_llama())
    assert [(a.name, a.size) for a in axes] == [
        ("model.embed_tokens.weight.1", 64),
        ("model.layers.0.self_attn.v_proj.weight.0", 16),
        ("model.layers.1.self_attn.v_proj.weight.0", 16),
    ]
    stream = axes[0]
    assert len(stream.producers) == 5 and len(stream.consumers) == 11 and len(stream.norms) == 5 and not stream.centered
    assert stream.norms["model.norm.weight"] == (("lm_head.weight", 1),)
    assert axes[1].consumers == (("model.layers.0.self_attn.o_proj.weight", 1),)


def test_batched_experts():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=48, vocab_size=64,
        num_local_experts=4,
    )  # fmt: skip
    stream = rotation_axes(transformers.MixtralForCausalLM(config).eval())[0]
    assert stream.size == 32 and ("model.layers.0.mlp.experts.down_proj", 1) in stream.producers
    assert ("model.layers.0.mlp.experts.gate_up_proj", 2) in stream.consumers


@pytest.mark.parametrize("name", ["Qwen3", "Mixtral", "T5", "Gemma2"])
def test_transformers_models(name):
    transformers = pytest.importorskip("transformers")
    tiny = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 48,
        "vocab_size": 64, "head_dim": 16,
    }  # fmt: skip
    if name == "T5":
        config = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=64)
        model = transformers.T5ForConditionalGeneration(config)
    else:
        known = vars(getattr(transformers, f"{name}Config")()).keys()
        config = getattr(transformers, f"{name}Config")(
            **{k: v for k, v in tiny.items() if k in known}, tie_word_embeddings=False, pad_token_id=0
        )
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    model.config._experts_implementation = "eager"
    axes = unchanged(model)
    assert axes, name
    stream = any(a.size == 32 for a in axes)
    assert stream == (name in ("Qwen3", "Mixtral"))  # T5 ties its head to the embedding, Gemma2 has norms behind its layers


class Block(nn.Module):
    def __init__(self, act: nn.Module | None = None, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.act, self.norm = act or nn.Identity(), norm or nn.Identity()

    def forward(self, x):
        x = self.a(x)
        return self.c(self.norm(x + self.b(self.act(x))))


def test_what_prefers_a_basis_is_left_alone():
    assert [a.size for a in unchanged(Block())] == [8]
    assert unchanged(Block(nn.ReLU())) == ()
    assert unchanged(Block(norm=nn.BatchNorm1d(8))) == ()
    (axis,) = unchanged(Block(norm=nn.RMSNorm(8)))
    assert axis.norms == {"norm.weight": (("c.weight", 1),)}
    (centered,) = unchanged(Block(norm=nn.LayerNorm(8)))
    assert centered.centered


def test_a_bias_turns_with_its_layer():
    (axis,) = rotation_axes(Block())
    assert ("a.bias", 0) in axis.producers and ("b.bias", 0) in axis.producers


def test_bad_rotation():
    (axis,) = rotation_axes(Block())
    with pytest.raises(ShapeError, match=r"\[8, 8\] rotation"):
        axis.apply(Block(), torch.eye(4))
