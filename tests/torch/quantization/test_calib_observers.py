"""Observers and thresholds against brute force on stored data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from modelopt.core.errors import CalibrationError, ConfigError
from modelopt.numerics import parse
from modelopt.numerics.reference import fake_quantize
from modelopt.torch.calibration import Histogram, TokenMask
from modelopt.torch.quantization.calib import (
    AffineObserver,
    HistogramCalibrator,
    HistogramObserver,
    MaxCalibrator,
    MaxObserver,
    MinMaxObserver,
)
from modelopt.torch.quantization.calib.observers import Watch
from modelopt.torch.quantization.calib.thresholds import candidates, code_groups


def heavy(n: int = 20_000) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(n), torch.randn(n) * 2, torch.cat([torch.randn(n), torch.tensor([60.0, -80.0])])]


def fed(observer: HistogramObserver, data: list[torch.Tensor]) -> HistogramObserver:
    for x in data:
        observer.update(x)
    return observer


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.9, 100.0])
def test_percentile(percentile: float) -> None:
    data = heavy()
    observer = fed(HistogramCalibrator("i8[...]*f32", "percentile", percentile=percentile), data)
    exact = np.quantile(torch.cat(data).abs().double().numpy(), percentile / 100, method="inverted_cdf")
    width = observer.statistic.limit / observer.num_bins
    assert exact <= float(observer.amax()) + 1e-6 and float(observer.amax()) <= exact + width + 1e-6


@pytest.mark.parametrize("fmt", ["i8[...]*f32", "i4[...]*f32", "e4m3[...]*f32", "i8[...]*bf16"])
def test_mse_is_as_good_as_a_search_on_the_data(fmt: str) -> None:
    data = heavy(4000)
    everything = torch.cat(data)

    def error(amax: float) -> float:
        rounded = fake_quantize(everything, parse(fmt), torch.tensor(amax))
        return float((rounded - everything).double().square().sum())

    found = float(fed(HistogramObserver(fmt, "mse"), data).amax())
    best = min(error(float(everything.abs().max()) * f) for f in np.linspace(0.005, 1.0, 400))
    assert error(found) <= best * 1.02
    if fmt.startswith("i4"):
        assert found < 0.5 * float(everything.abs().max())  # the outliers are clipped: not just the maximum


def brute_force_kl(values: np.ndarray, fmt: str, stat: Histogram) -> float:
    """The definition on the stored data, in numpy: histogram of the data itself, one candidate at a time."""
    n, width = stat.num_bins, stat.limit / stat.num_bins
    hist, _ = np.histogram(values, bins=n, range=(0.0, stat.limit))
    hist = hist.astype(float)
    hist[0] = 0
    centers = (np.arange(n) + 0.5) * width
    element = parse(fmt).element
    best, best_loss = 0.0, math.inf
    for kept in candidates(stat, 2 ** (element.bits - 1)):
        codes = element.cast(torch.tensor(centers[:kept], dtype=torch.float32) / torch.tensor(kept * width / element.max)).numpy()
        p = hist[:kept].copy()
        p[-1] += hist[kept:].sum()
        q = np.zeros(kept)
        for code in np.unique(codes):
            here = (codes == code) & (hist[:kept] > 0)
            if here.any():
                q[here] = hist[:kept][here].sum() / here.sum()
        p, q = p / p.sum(), np.maximum(q / max(q.sum(), 1e-12), 1e-12)
        loss = float(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0])))
        if loss < best_loss - 1e-12:
            best, best_loss = kept * width, loss
    return best


@pytest.mark.parametrize("fmt", ["i8[...]*f32", "e4m3[...]*f32"])
def test_entropy_is_that_of_the_stored_data(fmt: str) -> None:
    data = heavy()
    observer = fed(HistogramObserver(fmt, "entropy", num_bins=1024), data)
    everything = torch.cat(data).abs().numpy()
    wanted = min(brute_force_kl(everything, fmt, observer.statistic), float(everything.max()))
    assert float(observer.amax()) == pytest.approx(wanted, rel=1e-6)
    if fmt.startswith("i8"):
        assert float(observer.amax()) < 0.6 * everything.max()


def test_code_groups_are_runs_of_equal_codes() -> None:
    groups = code_groups(torch.tensor([0.1, 0.4, 0.6, 1.4, 2.4]), 7.0, parse("i4[...]*f32").element)
    assert groups.tolist() == [0, 0, 1, 1, 2]


def test_memory_is_that_of_the_bins() -> None:
    observer = HistogramObserver("i8[...]*f32")
    for i in range(20):
        observer.update(torch.randn(5000) * 2.0**i)
    assert sum(t.numel() for t in observer.statistic.tensors().values()) == observer.num_bins + 2
    assert not any(isinstance(v, torch.Tensor | list) for v in vars(observer).values())


def test_bad_histograms() -> None:
    for arguments in (
        ("i8[-1]~*f32",),
        ("e2m1[16]~*e4m3[...]*f32",),
        ("i8[...]*f32", "entropi"),
        ("i8[...]*f32", "percentile", 64, 0.0),
    ):
        with pytest.raises(ConfigError):
            HistogramObserver(*arguments)
    with pytest.raises(CalibrationError, match="seen no tensor"):
        HistogramObserver().amax()
    zeros = HistogramObserver()
    zeros.update(torch.zeros(4))
    assert zeros.amax() == 0


def test_max_gives_what_the_format_needs() -> None:
    x = torch.randn(4, 32)
    for text in ("i8[...]*f32", "i8[1,...]*f32", "i4[16]*f32", "e2m1[16]~*e4m3[...]*f32", "e2m1[16]*e4m3[...]*f32"):
        observer = MaxCalibrator(text)
        observer.update(x / 2)
        observer.update(x)
        found, fmt = observer.ranges(), parse(text)
        given = (None, found.amax) if fmt.dynamic else (found.amax, found.global_amax)
        assert torch.equal(fake_quantize(x, fmt, *given), fake_quantize(x, fmt)), text
        observer.reset()
        with pytest.raises(CalibrationError):
            observer.amax()


def test_min_max_for_zero_points() -> None:
    x, fmt = torch.rand(4, 32) + 1, parse("u8[16]*f32+u8")
    observer = MinMaxObserver(fmt)
    observer.update(x)
    found = observer.ranges()
    assert torch.equal(fake_quantize(x, fmt, found.amax, None, found.amin), fake_quantize(x, fmt))


def test_affine_bias_in_one_pass() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(2, 3, 5, 4) + torch.arange(3.0).reshape(3, 1, 1) * 10 for _ in range(3)]
    observer = AffineObserver("e4m3[...]*f32", (-4, -2))
    for x in batches:
        observer.update(x)
    everything = torch.cat(batches)
    mean = everything.mean((0, 2), keepdim=True)
    found = observer.ranges()
    torch.testing.assert_close(found.bias, mean)
    torch.testing.assert_close(found.amax, (everything - mean).abs().max())
    with pytest.raises(ConfigError, match="bias"):
        AffineObserver("i8[1,...]*f32", (-2,))


def test_one_observation_per_distinct_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    shared: dict = {}
    watches = [Watch(MaxObserver("i8[...]*f32"), TokenMask(), False, shared) for _ in range(3)]
    calls: list[int] = []
    original = type(watches[0].observer.statistic).reduce
    monkeypatch.setattr(type(watches[0].observer.statistic), "reduce", lambda *a: (calls.append(1), original(*a))[1])
    x = torch.ones(4)
    for w in watches:
        w.update(x)
    assert len(calls) == 1 and all(w.observer.amax() == 1 for w in watches)
    x.mul_(3)  # the same tensor, another version
    watches[0].update(x)
    watches[1].update(torch.full((4,), 5.0))
    assert [float(w.observer.amax()) for w in watches] == [3.0, 5.0, 1.0] and len(calls) == 3
    with torch.inference_mode():
        y = torch.ones(4)
        watches[2].update(y)
        y.mul_(7)  # inference tensors have no version, so nothing may be re-used
        watches[2].update(y)
    assert watches[2].observer.amax() == 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", ["entropy", "percentile", "mse"])
def test_a_gpu_finds_the_amax_of_the_cpu(method: str) -> None:
    data = [x.to(torch.bfloat16) for x in heavy()]
    here, there = fed(HistogramObserver("i8[...]*f32", method), data), HistogramObserver("i8[...]*f32", method)
    fed(there, [x.cuda() for x in data])
    assert torch.equal(here.amax(), there.amax().cpu())
