"""Layers that read one tensor: from recorded calls, from axes, beside calibration; the table of names against the graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modelopt.core.errors import TraceError
from modelopt.torch.trace import infer_axes, recursive_trace, shared_inputs
from modelopt.torch.trace.inputs import resolve_inputs
from modelopt.torch.trace.sharing import seen_inputs, watch_inputs
from tests.torch.trace.models import tiny_llama

LAYER = "model.layers.{}.{}"


def llama_groups():
    parts = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
    return tuple(tuple(LAYER.format(i, n) for n in part) for i in range(2) for part in parts)


def test_llama_from_model_graphs_and_axes():
    model = tiny_llama()
    assert shared_inputs(model) == llama_groups()
    assert shared_inputs(recursive_trace(model)) == llama_groups()
    args, kwargs = resolve_inputs(model)
    assert shared_inputs(infer_axes(model, args, kwargs)) == llama_groups()


def test_seen_while_the_model_runs():
    model = tiny_llama()
    assert seen_inputs(model) is None
    with watch_inputs(model), torch.no_grad():
        for _ in range(2):
            model(torch.arange(8)[None])
    ran, groups = seen_inputs(model)
    assert groups == llama_groups() and len(ran) == 15
    assert not any(m._forward_pre_hooks for m in model.modules())


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(8, 4), "w3": nn.Linear(8, 4)}) for _ in range(3))

    def forward(self, x):
        chosen = self.router(x).argmax(-1)
        y = 0
        for i, expert in enumerate(self.experts):
            rows = x[torch.cat([(chosen == i).nonzero()[:, 0], torch.tensor([0])])]
            y = y + (expert["w1"](rows) * expert["w3"](rows)).sum()
        return y


def test_experts_read_rows_of_one_tensor():
    model, x = Experts(), torch.randn(6, 8)
    every = tuple(f"experts.{i}.w{j}" for i in range(3) for j in (1, 3))
    assert shared_inputs(model, x) == (("router", *every),)
    assert shared_inputs(model, x, experts=False) == tuple((f"experts.{i}.w1", f"experts.{i}.w3") for i in range(3))
    assert shared_inputs(model, x, siblings=True) == tuple((f"experts.{i}.w1", f"experts.{i}.w3") for i in range(3))


class Cross(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, memory):
        return self.q_proj(x) @ (self.k_proj(memory) + self.v_proj(memory)).transpose(-1, -2)


def test_cross_attention_is_told_from_self_attention():
    x, memory = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    assert shared_inputs(Cross(), (x, memory)) == (("k_proj", "v_proj"),)
    assert shared_inputs(Cross(), (x, x)) == (("q_proj", "k_proj", "v_proj"),)


def test_a_tensor_that_changed_in_between_is_another_one():
    class Changes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = x + 0
            y = self.a(x)
            x.add_(1)
            return y + self.b(x)

    model = Changes()
    with watch_inputs(model), torch.no_grad():
        model(torch.ones(2, 4))
    assert seen_inputs(model)[1] == ()


def test_a_model_that_does_not_run():
    with pytest.raises(TraceError, match="unknown"):
        shared_inputs(nn.Linear(4, 4), torch.ones(2, 3))


NAMES = (
    "LlamaForCausalLM BertForMaskedLM T5ForConditionalGeneration BartForConditionalGeneration OPTForCausalLM MixtralForCausalLM"
)


@pytest.mark.parametrize("name", NAMES.split())
def test_the_table_of_names_is_confirmed_by_the_graph(name):
    """Every group of the table is one of the graph, except where the names are those of cross-attention."""
    from modelopt.torch.quantization.shared_scales import groups_of

    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, name)
    small = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 64}
    small |= {"num_key_value_heads": 2, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_layers": 1, "d_kv": 16}
    small |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    small |= {"num_heads": 2, "d_ff": 32, "num_local_experts": 2, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
    known = vars(cls.config_class()).keys()
    made = cls(cls.config_class(**{k: v for k, v in small.items() if k in known}, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    model = made.eval()
    graph = [set(g) for g in shared_inputs(model, siblings=True)]
    table = groups_of(n for n, m in model.named_modules() if isinstance(m, nn.Linear))
    wrong = [g for g in table if not any(set(g) <= seen for seen in graph)]
    assert all("EncDecAttention" in n or "encoder_attn" in n for g in wrong for n in g)
    assert bool(wrong) == (name in ("T5ForConditionalGeneration", "BartForConditionalGeneration"))
    assert len(table) > len(wrong)


def test_calibration_shares_what_reads_one_tensor_only():
    from modelopt.torch import quantization as mtq
    from modelopt.torch.export.collect import collect

    model = nn.ModuleDict({"cross": Cross()})
    model.forward = lambda x: model["cross"](x, 10 * x[:, :2])
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG, forward_loop=[torch.randn(2, 4, 8)])
    q, k, v = (model["cross"].get_submodule(f"{n}_proj").input_quantizer.amax for n in "qkv")
    assert torch.equal(k, v) and not torch.equal(q, k)
    assert collect(model).shared_inputs == (("cross.k_proj", "cross.v_proj"),)
