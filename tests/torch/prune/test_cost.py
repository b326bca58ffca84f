"""Costs read off the labels equal what torch counts on the model, and on a model that really is smaller."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from modelopt.torch.prune.cost import Costs
from modelopt.torch.trace.axes import infer_axes


class Net(nn.Module):
    def __init__(self, width: int = 16, hidden: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2)
        self.depth = nn.Conv2d(width, width, 3, groups=width)
        self.mix = nn.Conv2d(width, hidden, 1)
        self.head = nn.Linear(hidden, 5)

    def forward(self, x):
        x = self.mix(torch.relu(self.depth(torch.relu(self.stem(x)))))
        return self.head(x.mean((2, 3)))


def counted(model: nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops()


def test_costs_of_the_whole_model_and_of_the_smaller_one():
    x = torch.randn(2, 3, 16, 16)
    model = Net()
    axes = infer_axes(model, (x,), record_ops=True)
    costs = Costs(model, axes)
    sizes = {f.size: f for f in axes.families}
    assert costs.of(frozenset(), "flops") == counted(model, x)
    assert costs.of(frozenset(), "params") == sum(p.numel() for p in model.parameters())
    drop = frozenset(sizes[16].atoms[:6]) | frozenset(sizes[24].atoms[:8])
    small = Net(10, 16)
    assert costs.of(drop, "flops") == counted(small, x)
    assert costs.of(drop, "params") == sum(p.numel() for p in small.parameters())
    assert costs.of(drop, "memory") == 4 * costs.of(drop, "params")


def test_transformer_flops_are_those_that_torch_counts():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_key_value_heads=2, attn_implementation="eager")
    ).eval()
    call = {"input_ids": torch.arange(12)[None], "use_cache": False}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**call)
    axes = infer_axes(model, (), call, record_ops=True)
    assert Costs(model, axes).of(frozenset(), "flops") == pytest.approx(counter.get_total_flops(), rel=1e-6)
