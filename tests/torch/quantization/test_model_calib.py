"""Calibration of whole models: ranges, masks, sharing of statistics, and errors that leave nothing behind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import modelopt.torch.quantization as mtq
from modelopt.core.errors import CalibrationError, ConfigError, MissingAlgorithmError, UnknownNameError
from modelopt.core.logging import ModelOptWarning
from modelopt.torch.calibration import load, save
from modelopt.torch.quantization import model_calib
from modelopt.torch.quantization.algorithms import MISSING, check_algorithm, steps
from modelopt.torch.quantization.presets import PRESETS

INT8 = {"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "axis": 0}, "*input_quantizer": {"num_bits": 8}}}


class Net(nn.Module):
    """A small masked network: [B, T, 8], with layers that share one input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.down_proj(self.gate_proj(x).relu() * self.up_proj(x))


def amaxes(model: nn.Module) -> dict[str, Tensor]:
    return {n: q.amax for n, q in model.named_modules() if getattr(q, "amax", None) is not None}


def same(a: nn.Module, b: nn.Module, rtol: float = 1e-5) -> None:
    left, right = amaxes(a), amaxes(b)
    assert left.keys() == right.keys() and left
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=rtol, atol=0, msg=name)


def test_int8_ranges_are_those_of_the_unquantized_model() -> None:
    model, x = Net(), torch.randn(2, 3, 8)
    hidden = model.gate_proj(x).relu() * model.up_proj(x)
    mtq.quantize(model, INT8, [x])
    assert model.up_proj.input_quantizer.amax == x.abs().max()
    torch.testing.assert_close(model.down_proj.input_quantizer.amax, hidden.abs().max().detach())
    torch.testing.assert_close(model.up_proj.weight_quantizer.amax.flatten(), model.up_proj.weight.detach().abs().amax(1))
    assert all(q.observer is None for q in model.modules() if isinstance(q, mtq.TensorQuantizer))
    assert model.up_proj.weight_quantizer.is_enabled


@settings(deadline=None, max_examples=20)
@given(
    st.integers(0, 1000),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from(["max", "histogram"]),
)
def test_padding_changes_no_scale(seed: int, lengths: list[int], left: bool, histogram: bool) -> None:
    torch.manual_seed(seed)
    rows = [torch.randn(1, n, 8) for n in lengths]
    width = max(lengths) + 2
    padded, mask = torch.full((len(rows), width, 8), 1000.0), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(width - row.shape[1], width) if left else slice(0, row.shape[1])
        padded[i, place], mask[i, place] = row, 1
    config = {**INT8, "algorithm": {"method": "histogram", "threshold": "percentile"} if histogram else "max"}
    alone = mtq.quantize(Net(), config, rows)
    batched = mtq.quantize(Net(), config, [{"x": padded, "attention_mask": mask}])
    same(alone, batched)
    unmasked = mtq.quantize(Net(), config, [padded])
    assert unmasked.up_proj.input_quantizer.amax > 10 * alone.up_proj.input_quantizer.amax  # the padding would matter


@pytest.mark.parametrize("preset", ["INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG"])
@pytest.mark.parametrize("left", [False, True])
def test_padding_a_language_model_changes_no_scale(preset: str, left: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )

    def build() -> nn.Module:
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()

    torch.manual_seed(1)
    rows = [torch.randint(1, 64, (1, n)) for n in (5, 9, 3)]
    ids, mask = torch.zeros(3, 12, dtype=torch.int64), torch.zeros(3, 12, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(12 - row.shape[1], 12) if left else slice(0, row.shape[1])
        ids[i, place], mask[i, place] = row[0], 1
    alone = mtq.quantize(build(), PRESETS[preset], rows)
    padded = mtq.quantize(build(), PRESETS[preset], [{"input_ids": ids, "attention_mask": mask}])
    same(alone, padded)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_calibrates_or_names_what_is_missing(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 64, (2, 8))
    with torch.no_grad():
        before = model(ids).logits
    missing = [m for m, _ in steps(PRESETS[name].get("algorithm", "max")) if m in MISSING]
    if missing:
        with pytest.raises(MissingAlgorithmError, match=missing[0]):
            mtq.quantize(model, PRESETS[name], [ids])
        assert not any(isinstance(m, mtq.TensorQuantizer) for m in model.modules())
        return
    if name == "NVFP4_EXPERTS_ONLY_CFG":  # this model has no experts
        with pytest.warns(ModelOptWarning, match="No quantizer is enabled"):
            mtq.quantize(model, PRESETS[name], [ids])
        return
    mtq.quantize(model, PRESETS[name], [ids])
    with torch.no_grad():
        after = model(ids).logits
    error = float((after - before).norm() / before.norm())
    assert 1e-5 < error < 0.4, error
    model_calib.require_calibrated(model)


def test_rotation_turns_queries_with_keys_and_the_bias_is_the_mean() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 64, (2, 8))
    wide = {"num_bits": 8, "block_sizes": {-1: 16, "type": "dynamic"}, "rotate": True}
    entries = [
        {"quantizer_name": "*q_bmm_quantizer", "cfg": {"rotate": True}, "enable": False},
        {"quantizer_name": "*k_bmm_quantizer", "cfg": wide},
    ]
    rotated = mtq.quantize(copy.deepcopy(base), {"quant_cfg": entries, "algorithm": "max"})
    with torch.no_grad():
        torch.testing.assert_close(rotated(ids).logits, base(ids).logits, rtol=0.02, atol=0.02)
        lonely = mtq.quantize(copy.deepcopy(base), {"quant_cfg": entries[1:], "algorithm": "max"})
        assert (lonely(ids).logits - base(ids).logits).abs().max() > (rotated(ids).logits - base(ids).logits).abs().max() * 3
    affine = mtq.quantize(copy.deepcopy(base), PRESETS["FP8_AFFINE_KV_CFG"], [ids])
    quantizer = next(q for n, q in affine.named_modules() if n.endswith("v_bmm_quantizer"))
    assert quantizer.bias_value.shape == (1, 2, 1, 32) and quantizer.bias_value.abs().max() > 0


def test_quantizers_only_observe_and_layers_of_one_input_share(monkeypatch: pytest.MonkeyPatch) -> None:
    from modelopt.torch import kernels
    from modelopt.torch.calibration import AbsMax

    calls: list[str] = []
    reduce, fake = AbsMax.reduce, kernels.fake_quantize
    monkeypatch.setattr(AbsMax, "reduce", lambda *a: (calls.append("reduce"), reduce(*a))[1])
    monkeypatch.setattr(kernels, "fake_quantize", lambda *a, **k: (calls.append("fake"), fake(*a, **k))[1])
    mtq.quantize(Net(), INT8, [torch.randn(1, 2, 8)] * 3)
    assert calls == ["reduce"] * 6  # gate and up share: two distinct tensors for each of three batches


def test_statistics_serve_another_format_without_a_forward(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8)
    first = mtq.quantize(Net(), INT8, [x])
    statistics = model_calib.collect_statistics(first, [x])
    save(statistics, tmp_path / "stats")
    fp8 = {"quant_cfg": {"*weight_quantizer": {"num_bits": (4, 3)}, "*input_quantizer": {"num_bits": (4, 3)}}, "algorithm": None}
    with pytest.warns(ModelOptWarning, match="No calibration algorithm"):
        model = mtq.quantize(Net(), fp8)
    model_calib.calibrate(model, "max", statistics=load(tmp_path / "stats"))
    same(model, mtq.quantize(Net(), {**fp8, "algorithm": "max"}, [x]))
    with pytest.raises(CalibrationError, match="forward_loop"):  # a histogram is another statistic
        model_calib.calibrate(model, "histogram", statistics=load(tmp_path / "stats"))


def test_histogram_clips_and_mse_beats_max() -> None:
    x = torch.randn(64, 8, 8)
    x[0, 0, 0] = 100.0
    by_max = mtq.quantize(Net(), INT8, [x])
    by_entropy = mtq.quantize(
        Net(), {**INT8, "algorithm": {"method": "histogram", "threshold": "percentile", "percentile": 99.0}}, [x]
    )
    assert by_entropy.up_proj.input_quantizer.amax < 0.1 * by_max.up_proj.input_quantizer.amax
    per_quantizer = copy.deepcopy(INT8)
    per_quantizer["quant_cfg"]["*input_quantizer"]["calibrator"] = "histogram"
    own = mtq.quantize(Net(), per_quantizer, [x])
    assert own.up_proj.input_quantizer.amax < by_max.up_proj.input_quantizer.amax
    int4: dict[str, Any] = {"quant_cfg": {"*weight_quantizer": {"num_bits": 4, "axis": 0}}}
    plain, best = (mtq.quantize(Net(), {**int4, "algorithm": a}) for a in ("max", "mse"))
    weights = [m.up_proj.weight.detach() for m in (plain, best)]
    errors = [float((m.up_proj.weight_quantizer(w) - w).square().sum()) for m, w in zip((plain, best), weights, strict=True)]
    assert errors[1] < 0.95 * errors[0]


def test_fused_layers_search_under_their_shared_scale() -> None:
    model = mtq.quantize(
        Net(),
        {
            "quant_cfg": {
                "*weight_quantizer": {"num_bits": (2, 1), "block_sizes": {-1: 8, "type": "static", "scale_bits": (4, 3)}}
            },
            "algorithm": {"method": "mse", "fp8_scale_sweep": True},
        },
    )
    gate, up = model.gate_proj.weight_quantizer, model.up_proj.weight_quantizer
    largest = max(float(m.weight.detach().abs().max()) for m in (model.gate_proj, model.up_proj))
    assert float(gate.global_amax) == float(up.global_amax) == pytest.approx(largest)
    codes = up.amax / 6 / (up.global_amax / (6 * 448))
    torch.testing.assert_close(codes, codes.to(torch.float8_e4m3fn).float(), rtol=1e-6, atol=0)  # on the grid of that scale


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return (
        type(model.up_proj) is nn.Linear
        and after.keys() == before.keys()
        and all(torch.equal(after[k], before[k]) for k in before)
    )


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        (None, "forward_loop.*gate_proj.input_quantizer"),
        (lambda m: None, "never reached 3 of 3.*gate_proj.input_quantizer"),
        ([], "never reached"),
        (lambda m: m.gate_proj(torch.ones(1, 8)), "never reached 2 of 3.*up_proj.input_quantizer"),
        ([torch.full((1, 2, 8), torch.nan)], "not finite.*gate_proj.input_quantizer"),
        ([torch.full((1, 2, 8), torch.inf)], "not finite"),
        ("text", "forward_loop is a str"),
    ],
)
@pytest.mark.parametrize("algorithm", ["max", "histogram"])
def test_errors_leave_the_model_as_it_was(loop: Any, message: str, algorithm: str) -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match=message):
        mtq.quantize(model, {**INT8, "algorithm": algorithm}, loop)
    assert unchanged(model, before)
    assert not model._forward_pre_hooks and not model._forward_hooks


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_named_with_the_index(value: float) -> None:
    model = Net()
    with torch.no_grad():
        model.up_proj.weight[3, 5] = value
    with pytest.raises(CalibrationError, match=r"up_proj\.weight .*\[3, 5\]"):
        mtq.quantize(model, INT8, [torch.ones(1, 1, 8)])
    assert type(model.up_proj) is nn.Linear
    good = mtq.quantize(Net(), INT8, [torch.ones(1, 1, 8)])
    with torch.no_grad():
        good.up_proj.weight[3, 5] = value
    before = {k: v.clone() for k, v in amaxes(good).items()}
    with pytest.raises(CalibrationError, match=r"up_proj\.weight .*\[3, 5\]"):
        model_calib.max_calibrate(good, [torch.full((1, 1, 8), 0.5)])
    assert torch.equal(amaxes(good)["gate_proj.weight_quantizer"], before["gate_proj.weight_quantizer"])


def test_algorithms_by_name() -> None:
    for name in MISSING:
        for spelled in (name, {"method": name, "anything": 1}, ["max", name]):
            with pytest.raises(MissingAlgorithmError, match=name):
                check_algorithm(spelled)
    with pytest.raises(UnknownNameError, match='mean "mse"'):
        check_algorithm("msee")
    with pytest.raises(ConfigError, match='mean "step_size"'):
        check_algorithm({"method": "mse", "stepsize": 0.1})
    with pytest.raises(ConfigError, match="method"):
        check_algorithm(3)
    assert check_algorithm(None) == [] and check_algorithm({"method": None}) == [] and len(check_algorithm(["max", "mse"])) == 2


def test_constant_amax_needs_no_data() -> None:
    config = {"quant_cfg": {"*input_quantizer": {"num_bits": (4, 3), "use_constant_amax": True}}}
    assert mtq.quantize(Net(), config).up_proj.input_quantizer.amax == 448
