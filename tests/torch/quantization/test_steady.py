"""What must stay as it is: a model after a failure, ranges under a change of dtype, names in any order of import."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import modelopt.torch.quantization as mtq
from modelopt.core.errors import CalibrationError, ConfigError, ModelOptError
from modelopt.core.logging import ModelOptWarning
from modelopt.torch.quantization.attributes import QuantizerAttributeConfig
from modelopt.torch.quantization.nn.modules import PackedTensor

X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))


@pytest.mark.parametrize("name", ["nn.modules.weight_cache", "nn", "nn.modules.quant_module", "pack", "conversion"])
def test_every_file_can_be_imported_first(name: str) -> None:
    code = (
        f"import modelopt.torch.quantization.{name}; from modelopt.torch.quantization import set_weight_cache_budget as s; s(9)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_failed_forward_loop_leaves_no_trace() -> None:
    def breaks(model: nn.Module) -> None:
        model(X)
        raise KeyboardInterrupt

    def misses(model: Any) -> None:
        model[0](X)

    for loop, error in ((breaks, KeyboardInterrupt), (misses, CalibrationError)):
        model = mlp()
        before = [(name, type(m), set(m.__dict__)) for name, m in model.named_modules()]
        with pytest.raises(error):
            mtq.quantize(model, "fp8", loop)
        assert [(name, type(m), set(m.__dict__)) for name, m in model.named_modules()] == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_ranges_stay_float32_when_the_model_changes_dtype(dtype: torch.dtype) -> None:
    model = mtq.quantize(mlp(), "fp8", [X * 1e5])  # this range overflows float16
    amax = model[0].input_quantizer.amax.clone()
    model.to(dtype)
    assert model[0].weight.dtype == dtype and torch.equal(model[0].input_quantizer.amax, amax)
    assert bool(model(X.to(dtype)).isfinite().all())
    empty = mtq.quantize(mlp(), "fp8", [X]).to("meta").to_empty(device="cpu")
    assert empty[0].input_quantizer.amax.device.type == "cpu"


def test_packed_weights_can_be_made_empty_on_another_device() -> None:
    model = mtq.compress(mtq.quantize(mlp(), "nvfp4-wo")).to("meta").to_empty(device="cpu")
    packed = model[0].weight_packed
    assert isinstance(packed, PackedTensor) and {p.device.type for p in packed.parts} == {"cpu"}


@pytest.mark.parametrize("call", [mtq.disable_quantizer, mtq.enable_quantizer])
def test_a_pattern_that_selects_nothing_warns(call: Any) -> None:
    model = mtq.quantize(mlp(), "int8-wo")
    with pytest.warns(ModelOptWarning, match=r'"\*wieght_quantizer" matches no quantizer.*weight_quantizer'):
        call(model, "*wieght_quantizer")
    with pytest.warns(ModelOptWarning, match="matches no quantizer"):
        mtq.set_quantizer_attribute(model, "*lm_hed*", {"enable": False})


def test_a_misspelled_pattern_of_compress_warns() -> None:
    model = mtq.quantize(mlp(), "int8-wo")
    with pytest.warns(ModelOptWarning, match=r'"\*lm_hed\*" matches no quantized module'):
        mtq.compress(model, {"compress": {"default": True, "*lm_hed*": False}})


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"num_bits": 8, "type": "dynamic", "block_sizes": {-1: 16, "type": "static"}}, '"type" is "dynamic", and "static"'),
        ({"format": "nvfp4", "type": "static"}, 'contradicts "format": "nvfp4", which is dynamic'),
        ({"format": "i4[64]*f32", "type": "dynamic"}, "which is static"),
        ({"num_bits": (2, 1), "block_sizes": {-1: 16, "scale_bits": (4, 3), "scale_rule": "fp9"}}, 'mean "fp8"'),
        ({"num_bits": 4, "block_sizes": {-1: 16, "scale_rule": "fp8"}}, "needs"),
        (
            {"num_bits": (2, 1), "block_sizes": {-1: 16, "scale_bits": (4, 3), "scale_rule": "fp8", "four_over_six": True}},
            "exclude each other",
        ),
    ],
)
def test_contradictions_are_quoted(attributes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        QuantizerAttributeConfig.parse(attributes)


def test_scale_rules_in_block_sizes() -> None:
    def spelled(**sizes: Any) -> str:
        config = QuantizerAttributeConfig.parse({"num_bits": (2, 1), "block_sizes": {-1: 32, **sizes}})
        assert QuantizerAttributeConfig.parse(config.to_json()).to_format() == config.to_format()
        return str(config.to_format())

    assert spelled(scale_bits=(4, 3), scale_rule="fp8") == "e2m1[32]*e4m3:fp8[...]*f32"
    assert spelled(scale_bits=(8, 0), scale_rule="floor", type="dynamic") == "e2m1[32]~*e8m0:floor"


def test_w4a8_weights_are_those_of_the_layout() -> None:
    model = mtq.quantize(mlp(), mtq.W4A8_NVFP4_FP8_CFG, [X])
    weight = model[0].weight.detach()
    parts = torch.ops.modelopt.quantize(weight, *model[0].weight_quantizer.op_arguments())
    assert torch.equal(parts[2], weight.abs().amax() / 448)
    values = model[0].weight_quantizer(weight) / parts[2]
    assert torch.equal(values.to(torch.float8_e4m3fn).float().abs().amax() <= 448, torch.tensor(True))


def test_misspelled_classes_and_calibrators_are_said() -> None:
    off = {"quantizer_name": "*", "parent_class": "nn.Linaer", "enable": False}
    with pytest.warns(ModelOptWarning, match='"nn.Linaer" is that of no module.*mean "nn.Linear"'):
        mtq.quantize(mlp(), {"quant_cfg": [{"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8}}, off]})
    with pytest.raises(ConfigError, match='mean "histogram"'):
        mtq.quantize(mlp(), {"quant_cfg": {"*input_quantizer": {"num_bits": 8, "calibrator": "histgram"}}}, [X])


def test_wrong_things_are_named() -> None:
    with pytest.raises(ModelOptError, match="A str is no model"):
        mtq.quantize("model", "int8")  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match='mean "NVFP4_DEFAULT_CFG"'):
        _ = mtq.NVFP4_DEFAUL_CFG


def test_the_summary_of_a_plain_model_does_not_blame_its_layers() -> None:
    assert {w.reason for w in mtq.coverage(mlp(), threshold=0.0).left} == {"not quantized"}
