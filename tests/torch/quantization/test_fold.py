"""Folding writes quantized values into weights, and never into a weight that another module reads unquantized."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import modelopt.torch.quantization as mtq


@pytest.mark.parametrize("fmt", ["i8[1,...]*f32", "nvfp4", "mxfp8", "i4[32]*f32"])
def test_outputs_stay_and_quantizers_are_off(fmt: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Conv1d(3, 4, 1)).eval()
    mtq.quantize(model, {"quant_cfg": {"0.weight_quantizer": {"format": fmt}}})
    weight = model[0].weight
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = model[0](x)
        assert mtq.fold_weight(model) is model
        assert torch.equal(model[0](x), expected)
    assert model[0].weight is weight and not model[0].weight_quantizer.is_enabled and model[0].weight_quantizer.amax is None


def test_keep_attrs() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    mtq.quantize(model, {"quant_cfg": {"*weight_quantizer": {"num_bits": 8}}})
    mtq.fold_weight(model, keep_attrs=True)
    assert model[0].weight_quantizer.amax is not None


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 32), nn.Linear(32, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


@pytest.mark.parametrize("both", [False, True])
def test_tied_weights(both: bool) -> None:
    torch.manual_seed(0)
    model = Tied().eval()
    rules = {"*head.weight_quantizer": {"num_bits": 4, "axis": 0}}
    if both:
        rules["*embed.weight_quantizer"] = {"num_bits": 4, "axis": 0}
    mtq.quantize(model, {"quant_cfg": rules})
    ids = torch.arange(16)
    with torch.no_grad():
        expected = model(ids)
        mtq.fold_weight(model)
        assert torch.equal(model(ids), expected)
    assert (model.head.weight is model.embed.weight) == both


def test_recurrent_and_attention_weights_fold() -> None:
    torch.manual_seed(0)
    for module, args in (
        (nn.LSTM(8, 8), (torch.randn(3, 2, 8),)),
        (nn.MultiheadAttention(8, 2), (torch.randn(3, 2, 8),) * 3),
    ):
        model = nn.ModuleList([module.eval()])
        mtq.quantize(model, {"quant_cfg": {"*weight_quantizer": {"num_bits": 4, "axis": 0}}})
        with torch.no_grad():
            expected = copy.deepcopy(model)[0](*args)[0]
            mtq.fold_weight(model)
            assert torch.allclose(model[0](*args)[0], expected, atol=1e-6)
