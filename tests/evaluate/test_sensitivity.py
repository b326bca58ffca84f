"""Per-layer errors and output errors against plain computations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from modelopt.core.errors import ConfigError, ShapeError
from modelopt.evaluate.outputs import compare_outputs
from modelopt.evaluate.report.data import LayerError
from modelopt.evaluate.sensitivity import layer_errors


class Rounder(nn.Module):
    format = "i8"

    def __init__(self, step, on=True):
        super().__init__()
        self.step, self.is_enabled = step, on

    def forward(self, x):
        return (x / self.step).round() * self.step if self.is_enabled else x


class Quantized(nn.Linear):
    def quantized_tensors(self):
        return iter(())

    def forward(self, x):
        return nn.functional.linear(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def quantize(model, index, step, on=True):
    layer = model[index]
    layer.__class__ = Quantized
    layer.weight_quantizer, layer.input_quantizer = Rounder(step, on), Rounder(step * 2, on)
    return model


def test_each_layer_by_itself():
    original = network()
    other = quantize(quantize(copy.deepcopy(original), 0, 0.1), 4, 0.05)
    batches = [torch.randn(5, 8), torch.randn(3, 8)]
    rows = layer_errors(original, other, batches)
    assert [r.name for r in rows] == ["0", "4"] and rows[0].format == "i8 x i8"
    with torch.no_grad():
        x = original[:4](torch.cat(batches))
        y, z = original[4](x), other[4](x)
    assert rows[1].output_error == pytest.approx(float((z - y).norm() / y.norm()), rel=1e-5)
    rounded = other[4].weight_quantizer(original[4].weight)
    assert rows[1].weight_error == pytest.approx(
        float((rounded - original[4].weight).norm() / original[4].weight.norm()), rel=1e-5
    )
    assert rows[0].output_error > rows[1].output_error > 0.01
    assert not any(m._forward_hooks for m in original.modules())


def test_a_changed_weight_counts_and_a_quantizer_that_is_off_does_not():
    original = network()
    other = quantize(copy.deepcopy(original), 0, 0.1, on=False)
    with torch.no_grad():
        other[2].weight.mul_(1.25)
    rows = layer_errors(original, other, [torch.randn(5, 8)])
    assert [r.name for r in rows] == ["2"] and rows[0].weight_error == pytest.approx(0.25) and rows[0].format == ""


def test_a_quantized_module_that_holds_quantized_layers_is_left_out():
    class Attention(nn.Sequential):
        def quantized_tensors(self):
            return iter(())

    original = nn.Sequential(network())
    other = copy.deepcopy(original)
    quantize(other[0], 0, 0.1)
    other[0].__class__ = Attention
    assert [r.name for r in layer_errors(original, other, [torch.randn(5, 8)])] == ["0.0"]


def test_pattern_and_bad_pairs():
    original = network()
    other = quantize(quantize(copy.deepcopy(original), 0, 0.1), 4, 0.05)
    assert [r.name for r in layer_errors(original, other, [torch.randn(5, 8)], pattern="4")] == ["4"]
    with pytest.raises(ConfigError, match="copy taken before"):
        layer_errors(other, other, [torch.randn(5, 8)])
    with pytest.raises(ConfigError, match='matches "9"'):
        layer_errors(original, other, [torch.randn(5, 8)], pattern="9")


def test_hooks_go_away_after_an_error():
    original = network()
    other = quantize(copy.deepcopy(original), 0, 0.1)
    with pytest.raises(RuntimeError):
        layer_errors(original, other, [torch.randn(5, 9)])
    assert not any(m._forward_hooks for m in original.modules())


def test_names():
    row = LayerError("model.layers.12.mlp.down_proj", "", 0.1, None)
    assert (row.index, row.kind) == (12, "down_proj")
    assert LayerError("lm_head", "", 0.1, None).index is None


def test_outputs():
    original, batches = network(), [torch.randn(5, 8), (torch.randn(3, 8),)]
    result = compare_outputs(original, lambda x: original(x) * 1.1, batches)
    assert result.relative_error == pytest.approx(0.1, rel=1e-5) and result.cosine == pytest.approx(1)
    assert result.num_values == 32 and result.largest_difference > 0
    with pytest.raises(ShapeError):
        compare_outputs(original, lambda x: original(x)[:1], batches)
    with pytest.raises(ConfigError, match="0 batches"):
        compare_outputs(original, original, [])


def test_outputs_leave_padding_out():
    def model(garbage):
        def forward(input_ids, attention_mask):
            x = input_ids.float()[..., None].expand(*input_ids.shape, 3).clone()
            x[attention_mask == 0] = garbage
            return {"last_hidden_state": x}

        return forward

    batch = {"input_ids": torch.ones(2, 4), "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])}
    result = compare_outputs(model(5), model(-7), [batch])
    assert result.relative_error == 0 and result.num_values == 12
