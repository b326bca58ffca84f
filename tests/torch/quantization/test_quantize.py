"""The verbs on whole models: what they do, what they refuse, and that a refusal leaves nothing behind."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import modelopt.torch.quantization as mtq
from modelopt.core.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    FormatError,
    MissingAlgorithmError,
    ModeError,
    UnknownNameError,
)
from modelopt.core.logging import ModelOptWarning
from modelopt.torch.opt import apply_mode, history, modelopt_state, restore, restore_from_modelopt_state, save
from modelopt.torch.quantization.presets import PRESETS


class Net(nn.Module):
    """Two linear layers, a norm and a head; every dimension a multiple of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 64)
        self.mlp = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
        self.norm = nn.BatchNorm1d(64)
        self.lm_head = nn.Linear(64, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.norm(self.mlp(self.embed(ids))))


IDS = torch.arange(16)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def loop(model: nn.Module) -> None:
    model(IDS)


def untouched(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    same = model.state_dict().keys() == before.keys() and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    return same and not list(mtq.named_quantizers(model)) and type(model.lm_head) is nn.Linear and not history(model)


def enabled(model: nn.Module) -> set[str]:
    return {name for name, q in mtq.named_quantizers(model) if q.is_enabled}


CALIBRATED = [
    name
    for name, preset in PRESETS.items()
    if (m := preset.get("algorithm")) in (None, "max") or (isinstance(m, dict) and m["method"] in ("max", "mse"))
]
MISSING = [name for name in PRESETS if name not in CALIBRATED]


@pytest.mark.parametrize("name", CALIBRATED)
def test_every_preset_calibrates_runs_and_round_trips(name: str, net: Net, tmp_path) -> None:
    plain = net(IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ModelOptWarning)
        model = mtq.quantize(net, getattr(mtq, name), forward_loop=loop)
        assert model is net
        got = model(IDS)
        save(model, tmp_path / "out")
        again = restore(Net().eval(), tmp_path / "out")
    assert torch.isfinite(got).all()
    assert torch.equal(again(IDS), got)
    if enabled(model):
        assert not torch.equal(got, plain) and (got - plain).norm() < 0.5 * plain.norm()
    names = ("output", "norm", "embed") if name == "NVFP4_FP8_MHA_CONFIG" else ("output", "norm", "embed", "lm_head")
    assert not {n for n in enabled(model) if any(word in n for word in names)}
    assert modelopt_state(again)["steps"] == modelopt_state(model)["steps"]
    assert {n: str(q) for n, q in mtq.named_quantizers(again)} == {n: str(q) for n, q in mtq.named_quantizers(model)}


@pytest.mark.parametrize("name", MISSING)
def test_presets_of_missing_algorithms_say_so_and_change_nothing(name: str, net: Net) -> None:
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(MissingAlgorithmError, match="algorithm"):
        mtq.quantize(net, getattr(mtq, name), forward_loop=loop)
    assert untouched(net, before)


def test_values_are_those_of_the_formula(net: Net) -> None:
    w = net.mlp[0].weight.detach().clone()
    mtq.quantize(net, mtq.INT8_DEFAULT_CFG, forward_loop=loop)
    scale = w.abs().amax(1, keepdim=True) / 127
    x = net.embed(IDS)
    s = x.abs().max() / 127
    expected = nn.functional.linear((x / s).round() * s, (w / scale).round() * scale, net.mlp[0].bias)
    assert torch.allclose(net.mlp[0](x), expected, atol=1e-5)
    assert net.mlp[0].weight_quantizer.amax.shape == (96, 1) and net.mlp[0].input_quantizer.amax == x.abs().max()


def test_a_name_is_a_config(net: Net) -> None:
    by_name = mtq.quantize(copy.deepcopy(net), "nvfp4", forward_loop=loop)
    by_preset = mtq.quantize(net, mtq.NVFP4_DEFAULT_CFG, forward_loop=loop)
    assert torch.equal(by_name(IDS), by_preset(IDS))
    with pytest.raises(UnknownNameError, match='Did you mean "nvfp4"'):
        mtq.quantize(Net(), "nvpf4")


W8 = {"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "axis": 0}}, "algorithm": "max"}
W8A8 = {"quant_cfg": {**W8["quant_cfg"], "*input_quantizer": {"num_bits": 8}}, "algorithm": "max"}


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        ({"quant_cfg": {"*weight_quantizer": {"num_bit": 8}}}, ConfigError, 'Did you mean "num_bits"'),
        ({"quant_cfg": {"*weight_quantizer": {"format": "nvpf4"}}}, ConfigError, 'Did you mean "nvfp4"'),
        ({"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "format": "nvfp4"}}}, ConfigError, "contradicts"),
        ({"quant_cfg": {"*mlp.0.weight_quantizer": {"enable": True}}}, ConfigError, "mlp.0.weight_quantizer"),
        ({**W8, "algorithm": "maxx"}, UnknownNameError, 'Did you mean "max"'),
        ({**W8, "algorithm": "awq_lite"}, MissingAlgorithmError, "awq_lite"),
        (W8A8, CalibrationError, "no forward_loop was given: .*mlp.0.input_quantizer"),
        ({"quant_cfg": {"*weight_quantizer": {"format": "i4[1,1,4,4]*f32"}}}, FormatError, r"mlp.0.weight of shape \[96, 64\]"),
        (7, ConfigError, "not a int"),
    ],
)
def test_bad_configs_change_nothing(config, error, match: str, net: Net) -> None:
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(error, match=match):
        mtq.quantize(net, config)
    assert untouched(net, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(bad: float, net: Net) -> None:
    net.mlp[2].weight.data[3, 5] = bad
    net.mlp[2].weight.data[7, 0] = bad
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(CalibrationError, match=r"mlp.2.weight holds .* at index \[3, 5\]"):
        mtq.quantize(net, W8)
    assert net.state_dict().keys() == before.keys() and not history(net) and not list(mtq.named_quantizers(net))


def test_a_failing_forward_loop_leaves_the_model_as_it_was(net: Net) -> None:
    before = copy.deepcopy(net.state_dict())
    for error in (ValueError, KeyboardInterrupt):

        def broken(model: nn.Module, error=error) -> None:
            model(IDS)
            raise error("stop")

        with pytest.raises(error):
            mtq.quantize(net, W8A8, forward_loop=broken)
        assert untouched(net, before)
    mtq.quantize(net, W8A8, forward_loop=loop)


def test_a_loop_that_reaches_not_every_layer(net: Net) -> None:
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(CalibrationError, match="mlp.2.input_quantizer"):
        mtq.quantize(net, W8A8, forward_loop=lambda m: m.mlp[0](m.embed(IDS)))
    assert untouched(net, before)


def test_quantizing_twice_says_what_to_do(net: Net) -> None:
    mtq.quantize(net, W8)
    got = net(IDS)
    with pytest.raises(ModeError, match="Start from the original model"):
        mtq.quantize(net, W8)
    assert torch.equal(net(IDS), got)


def test_patterns_that_match_nothing_warn(net: Net) -> None:
    config = {"quant_cfg": {**W8["quant_cfg"], "*lm_haed*": {"enable": False}}}
    with pytest.warns(ModelOptWarning, match="lm_haed.*lm_head"):
        mtq.quantize(net, config)


def test_described_dict_with_default(net: Net) -> None:
    config = {
        "quant_cfg": {
            "*mlp.0.weight_quantizer": {"num_bits": 4, "format": "nvfp4"},
            "*lm_head*": {"num_bits": 8},
            "default": {"num_bits": 8, "format": "fp8"},
        },
        "algorithm": "max",
    }
    mtq.quantize(net, config, forward_loop=loop)
    formats = {n: str(q.format) for n, q in mtq.named_quantizers(net) if q.is_enabled}
    assert formats == {
        "mlp.0.weight_quantizer": "e2m1[16]~*e4m3[...]*f32",
        "mlp.0.input_quantizer": "e4m3[...]*f32",
        "mlp.2.weight_quantizer": "e4m3[...]*f32",
        "mlp.2.input_quantizer": "e4m3[...]*f32",
        "lm_head.weight_quantizer": "i8[...]*f32",
        "lm_head.input_quantizer": "i8[...]*f32",
    }


def test_opt_in_modules_answer_to_their_class_or_name(net: Net) -> None:
    rules = [
        {"quantizer_name": "*", "cfg": {"num_bits": 8}},
        {"quantizer_name": "*input_quantizer", "parent_class": "nn.BatchNorm1d", "cfg": {"num_bits": 4}},
        {"quantizer_name": "*embed.weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
        {"quantizer_name": "*output_quantizer", "parent_class": "nn.Linear", "cfg": {"num_bits": 8}},
    ]
    mtq.quantize(net, {"quant_cfg": rules}, forward_loop=loop)
    assert {"norm.input_quantizer", "embed.weight_quantizer", "mlp.0.output_quantizer"} <= enabled(net)
    assert "norm.output_quantizer" not in enabled(net)


def test_sequential_configs(net: Net) -> None:
    mtq.quantize(
        net,
        {
            "quant_cfg": [
                {
                    "quantizer_name": "*mlp*weight_quantizer",
                    "cfg": [{"num_bits": 4, "block_sizes": {-1: 32}}, {"num_bits": (4, 3)}],
                }
            ]
        },
    )
    q = net.mlp[0].weight_quantizer
    assert isinstance(q, mtq.SequentialQuantizer) and len(q) == 2 and all(m.amax is not None for m in q)


def test_switching_and_setting(net: Net) -> None:
    plain = net(IDS)
    mtq.quantize(net, W8A8, forward_loop=loop)
    full = net(IDS)
    mtq.disable_quantizer(net, "*")
    assert torch.equal(net(IDS), plain)
    mtq.enable_quantizer(net, lambda name: "lm_head" not in name and ("weight" in name or "input" in name) and "mlp" in name)
    mtq.enable_quantizer(net, "lm_head.[wi]*")
    assert torch.equal(net(IDS), full)
    with pytest.raises(ConfigError, match="output_quantizer"):
        mtq.enable_quantizer(net, "*output_quantizer")
    mtq.set_quantizer_attributes_partial(net, "*mlp.0.weight_quantizer", {"num_bits": 4})
    assert str(net.mlp[0].weight_quantizer.format) == "i4[1,...]*f32" and net.mlp[0].weight_quantizer.amax is None
    mtq.set_quantizer_attributes_full(net, "*weight_quantizer", {"num_bits": (4, 3)}, parent_class=nn.Linear)
    assert str(net.mlp[0].weight_quantizer.format) == "e4m3[...]*f32"
    mtq.set_quantizer_attribute(net, "*mlp*weight_quantizer", [{"num_bits": 4}, {"num_bits": 8}])
    assert isinstance(net.mlp[0].weight_quantizer, mtq.SequentialQuantizer)
    mtq.set_quantizer_by_cfg(net, [{"quantizer_name": "*mlp*", "enable": False}])
    assert not {n for n in enabled(net) if "mlp" in n}


def test_context_brings_everything_back(net: Net) -> None:
    mtq.quantize(net, W8A8, forward_loop=loop)
    full, state = net(IDS), copy.deepcopy(net.state_dict())
    with mtq.set_quantizer_by_cfg_context(net, {"*": {"enable": False}, "*mlp*weight_quantizer": {"num_bits": 2}}):
        assert not torch.equal(net(IDS), full)
    assert torch.equal(net(IDS), full)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_calibrate_again_is_a_step(net: Net, tmp_path) -> None:
    mtq.quantize(net, W8A8, forward_loop=loop)
    first = net.mlp[0].weight_quantizer.amax.clone()
    mtq.calibrate(net, {"method": "mse"}, loop)
    assert not torch.equal(net.mlp[0].weight_quantizer.amax, first)
    assert [s.mode for s in history(net)] == ["quantize", "calibrate"]
    save(net, tmp_path / "out")
    assert torch.equal(restore(Net().eval(), tmp_path / "out")(IDS), net(IDS))
    with pytest.raises(ModeError, match="no quantizers"):
        mtq.calibrate(Net(), "max", loop)


def test_modes_by_name(net: Net) -> None:
    assert mtq.QuantizeModeRegistry.get_mode("quantize").name == "quantize"
    with pytest.raises(UnknownNameError, match='Did you mean "quantize"'):
        mtq.QuantizeModeRegistry.get_mode("quantise")
    apply_mode(net, [("quantize", W8)])
    assert enabled(net) == {"mlp.0.weight_quantizer", "mlp.2.weight_quantizer", "lm_head.weight_quantizer"}


def test_state_of_another_architecture(net: Net, tmp_path) -> None:
    mtq.quantize(net, W8)
    state = modelopt_state(net)
    other = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(CheckpointError, match="another architecture"):
        restore_from_modelopt_state(other, state)


def test_save_pretrained_on_a_plain_module(net: Net, tmp_path) -> None:
    mtq.quantize(net, W8)
    copied = copy.deepcopy(net)
    copied.save_pretrained(tmp_path / "out")
    assert copied.save_pretrained.owner[0] is copied
    assert torch.equal(restore(Net().eval(), tmp_path / "out")(IDS), net(IDS))
    assert "save_pretrained" not in net.state_dict() and len(list(net.modules())) == len(list(copied.modules()))


def test_auto_quantize_is_missing_by_name() -> None:
    with pytest.raises(MissingAlgorithmError, match="auto_quantize"):
        mtq.auto_quantize(Net(), loop)


def test_training_reaches_the_weights(net: Net) -> None:
    mtq.quantize(net, W8A8, forward_loop=loop)
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    first = None
    for _ in range(5):
        loss = nn.functional.cross_entropy(net(IDS), IDS)
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.8 * first


def test_tied_weights_stay_tied(net: Net) -> None:
    net.lm_head.weight = net.embed.weight
    mtq.quantize(net, W8)
    assert net.lm_head.weight is net.embed.weight
    result = mtq.coverage(net, threshold=0)
    assert [w.name for w in result.quantized].count("lm_head.weight") == 1


def test_summary_and_coverage(net: Net, capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    mtq.quantize(net, mtq.INT8_WEIGHT_ONLY_CFG)
    result = mtq.coverage(net)
    assert result.share == 1.0 and [w.name for w in result.excluded] == ["lm_head.weight"] and not result.left
    assert "lm_head" in result.excluded[0].reason
    assert result.total_bytes == 2 * 64 * 96 * 4
    mtq.print_quant_summary(net)
    text = capsys.readouterr().out
    assert "mlp.0.weight_quantizer" in text and "i8[1,...]*f32" in text and "coverage 100.0%" in text
    mtq.print_quant_summary(net, tmp_path)
    assert (tmp_path / "quant_summary.txt").read_text() == text


def test_low_coverage_warns_and_lists_what_was_left() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(4, 32, 64))

    model = nn.ModuleDict({"fc": nn.Linear(32, 32), "experts": Experts(), "conv": nn.Conv1d(4, 4, 3)})
    mtq.quantize(model, W8)
    with pytest.warns(ModelOptWarning, match=r"experts.gate_up_proj \(Experts has no quantized class\)"):
        result = mtq.coverage(model)
    assert result.share == pytest.approx(32 * 32 / (32 * 32 + 4 * 32 * 64))
    half = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    mtq.quantize(half, {"quant_cfg": {"0.weight_quantizer": {"num_bits": 8}}})
    with pytest.warns(ModelOptWarning, match="1.weight"):
        assert mtq.coverage(half).share == 0.5


def test_scaled_e4m3() -> None:
    x = torch.randn(4, 8) * 3
    amax = x.abs().amax(1, keepdim=True)
    per_row = mtq.scaled_e4m3_impl(x, amax)
    expected = (x * (448 / amax)).to(torch.float8_e4m3fn).float() * (amax / 448)
    assert torch.allclose(per_row, expected, rtol=1e-6)
    assert torch.equal(mtq.scaled_e4m3_impl(x, x.abs().max()), mtq.scaled_e4m3_impl(x))
    assert not torch.equal(per_row, mtq.scaled_e4m3_impl(x))


def _fresh(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300).stdout


def test_import_is_light() -> None:
    code = """
import time, resource, sys, torch, torch.nn
mem = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
t, m = time.process_time(), mem()
import modelopt.torch.quantization as mtq
heavy = ("triton", "transformers", "torch._dynamo", "modelopt.cli")
print(time.process_time() - t, mem() - m, *[x for x in heavy if x in sys.modules])
"""
    seconds, mib, *loaded = _fresh(code).split()
    assert float(seconds) <= 0.5 and float(mib) <= 60 and not loaded


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lru_cache.*")
        yield


def test_a_kv_cache_that_cannot_be_quantized_is_said():
    with pytest.warns(ModelOptWarning, match="no attention of this model can be quantized"):
        mtq.quantize(nn.Sequential(nn.Linear(32, 32)), mtq.FP8_KV_CFG, forward_loop=[torch.randn(2, 32)])
