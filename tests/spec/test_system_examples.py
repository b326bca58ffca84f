"""Law 3: the examples of the described system run as they are written.

Supplied are only what the texts leave free: data loaders, a model where none is built, and `.cuda()` on machines without a GPU.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

from modelopt.torch import quantization as mtq

EXAMPLES = Path(__file__).parent / "examples"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        return torch.relu(self.linear(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(64, 32)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


@pytest.fixture
def no_cuda(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(nn.Module, "cuda", lambda self: self)
        monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)


def run(name: str, **free) -> dict:
    """Execute an example file with its free names supplied, and return its namespace."""
    namespace = {"__name__": "example", **free}
    exec(compile((EXAMPLES / f"{name}.py").read_text(), name, "exec"), namespace)
    return namespace


def formats(model) -> dict[str, str]:
    return {n: str(q.format) for n, q in model.named_modules() if isinstance(q, mtq.nn.TensorQuantizer) and q.is_enabled}


def test_example_1_simple_int8(no_cuda, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    batches = [torch.randn(4, 768) for _ in range(3)]
    model = run("int8_simple", calibration_dataloader=batches)["model"]
    assert formats(model) == {f"linear{i}.{kind}_quantizer": "i8[...]*f32" for i in (1, 2) for kind in ("input", "weight")}
    assert model.linear1.input_quantizer.amax == max(b.abs().max() for b in batches)
    assert (tmp_path / "quantized_model").is_dir() and any((tmp_path / "quantized_model").iterdir())


def test_example_2_trace(capsys):
    namespace = run("trace_directly", MyModel=Net)
    printed = capsys.readouterr().out
    assert "  Net: 7 nodes" in printed and "FAILED" not in printed
    found = [line.removeprefix("Optimizable param: ") for line in printed.splitlines() if line.startswith("Optimizable")]
    assert found == ["layers.0.linear.out_features", "layers.1.linear.out_features"]
    assert namespace["analyzer"].method == "axes"


def test_example_2_query():
    from modelopt.torch.trace import recursive_trace

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 16, 2))
    namespace = run("tracing_query", model=model, linear_layer=model[2], conv_layer=model[0], recursive_trace=recursive_trace)
    assert isinstance(namespace["fx_graph"], torch.fx.Graph) and namespace["failed"] is False


def test_example_3_nvfp4_advanced(no_cuda, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    original = Net().eval()
    model = run("nvfp4_advanced", model=original, calib_dataloader=[torch.randn(4, 64) for _ in range(40)])["model"]
    got = formats(model)
    assert got["layers.0.linear.weight_quantizer"] == "e2m1[16]~*e4m3[...]*f32"
    assert got["layers.0.linear.input_quantizer"] == "e4m3[...]*f32"
    assert got["lm_head.weight_quantizer"] == got["lm_head.input_quantizer"] == "i8[...]*f32"
    assert not any("output_quantizer" in n for n in got), "neither *lm_head* nor default switches output quantizers on"
    program = torch.export.load(tmp_path / "nvfp4_model.pt")
    x = torch.randn(4, 64)
    assert torch.equal(program.module()(x), model(x))


def test_nvfp4_with_tracing(no_cuda):
    namespace = run("nvfp4_with_tracing", model=Net(), data_loader=[torch.randn(4, 64)], quantize=mtq.quantize)
    got = formats(namespace["model"])
    assert got["layers.1.linear.weight_quantizer"] == "e2m1[16]~*e4m3[...]*f32"
    assert got["layers.1.linear.input_quantizer"] == "e4m3[...]*f32"


@pytest.mark.parametrize(("name", "key"), [("fp8_default", "FP8_DEFAULT_CFG"), ("nvfp4_cfg", "NVFP4_CFG")])
def test_configs_of_the_text_are_accepted(name, key):
    model = mtq.quantize(Net(), run(name)[key], forward_loop=[torch.randn(4, 64)])
    assert len(formats(model)) == 6 and model(torch.randn(2, 64)).isfinite().all()


def test_public_names_and_signatures():
    from modelopt.torch.quantization.config import QuantizeConfig, QuantizerAttributeConfig
    from modelopt.torch.quantization.conversion import set_quantizer_attribute, set_quantizer_by_cfg
    from modelopt.torch.quantization.mode import QuantizeModeRegistry
    from modelopt.torch.quantization.model_calib import (
        awq_calibration,
        calibrate_amax,
        histogram_calibration,
        smoothquant_calibration,
    )
    from modelopt.torch.quantization.model_quant import auto_quantize, calibrate, disable_quantizer, enable_quantizer, quantize
    from modelopt.torch.quantization.nn import QuantConv2d, QuantLinear, QuantModule, TensorQuantizer
    from modelopt.torch.quantization.tensor_quant import scaled_e4m3_impl

    assert list(inspect.signature(quantize).parameters)[:3] == ["model", "config", "forward_loop"]
    assert list(inspect.signature(calibrate).parameters)[:3] == ["model", "algorithm", "forward_loop"]
    assert callable(QuantizeModeRegistry.register) and callable(QuantizeModeRegistry.get_mode)
    for thing in (
        set_quantizer_by_cfg,
        set_quantizer_attribute,
        enable_quantizer,
        disable_quantizer,
        calibrate_amax,
        auto_quantize,
    ):
        assert callable(thing)
    for thing in (awq_calibration, histogram_calibration, smoothquant_calibration, QuantizeConfig, QuantizerAttributeConfig):
        assert callable(thing)
    assert (
        issubclass(QuantLinear, QuantModule) and issubclass(QuantConv2d, QuantModule) and issubclass(TensorQuantizer, nn.Module)
    )
    y = scaled_e4m3_impl(torch.tensor([1.0, 500.0]), torch.tensor(448.0))
    assert y.tolist() == [1.0, 448.0]


def test_gemm_registry_of_the_text():
    from modelopt.torch.quantization.backends.gemm_registry import find_kernel, register_kernel
    from modelopt.torch.quantization.backends.nvfp4_gemm import NVFP4Kernel

    assert callable(find_kernel) and callable(register_kernel)
    assert callable(NVFP4Kernel.apply_quantization) and callable(NVFP4Kernel.gemm)
