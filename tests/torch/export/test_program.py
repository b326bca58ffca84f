"""A quantized model as a torch.export program."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import modelopt.torch.quantization as mtq
from modelopt.core.errors import ExportError
from modelopt.torch.export import export_torch_model


def quantized(preset: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval()
    return mtq.quantize(model, getattr(mtq, preset), forward_loop=lambda m: m(x)), x


@pytest.mark.parametrize("preset", ["INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG"])
def test_the_program_computes_the_same_for_other_batch_sizes(tmp_path, preset):
    model, x = quantized(preset)
    export_torch_model(model, tmp_path / "model.pt2", example_inputs=x)
    program = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (x, torch.cat((x, x * 0.5, x))):
        assert torch.equal(program(batch), model(batch))
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]


def test_without_shapes_the_error_says_what_to_pass(tmp_path):
    model = nn.Linear(4, 4)
    with pytest.raises(ExportError, match="example_inputs"):
        export_torch_model(model, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_the_shapes_that_calibration_recorded_are_used(tmp_path):
    model, x = quantized("INT8_DEFAULT_CFG")
    export_torch_model(model, tmp_path / "model.pt2")
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(x), model(x))


def test_a_model_that_cannot_be_traced(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return x if x.sum().item() > 0 else -x

    with pytest.raises(ExportError, match="cannot trace"):
        export_torch_model(Odd(), tmp_path / "model.pt2", example_inputs=torch.ones(2))
    assert list(tmp_path.iterdir()) == []
