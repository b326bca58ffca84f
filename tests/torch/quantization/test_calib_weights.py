"""The weight search against brute force: every multiplier, every one of the 126 codes."""

from __future__ import annotations

import pytest
import torch

from modelopt.core.errors import CalibrationError, ConfigError
from modelopt.numerics import element, parse
from modelopt.numerics.reference import block_amax, compute_scales, fake_quantize
from modelopt.torch.kernels import chunks
from modelopt.torch.quantization.calib import MseCalibrator
from modelopt.torch.quantization.calib import weights as weights_module
from modelopt.torch.quantization.calib.weights import block_errors, max_ranges, mse_ranges, multipliers, positive_codes, window

NVFP4_STATIC = "e2m1[16]*e4m3[...]*f32"
DEFAULT = multipliers(0.25, 4.0, 0.1)


def weight(rows: int = 24, columns: int = 64) -> torch.Tensor:
    torch.manual_seed(0)
    w = torch.randn(rows, columns) * torch.logspace(-3, 1, rows).unsqueeze(1)
    w[3] = 0
    w[4, :16] = torch.tensor([100.0] + [0.3] * 15)
    return w


def sse(w: torch.Tensor, fmt: str, amax: torch.Tensor, *more: torch.Tensor | None) -> torch.Tensor:
    """Squared error of each block, by the reference on the whole tensor."""
    squared = (fake_quantize(w, parse(fmt), amax, *more) - w).square()
    grid = parse(fmt).grid(w.shape)
    if grid == ():
        return squared.sum()
    blocks = squared.reshape(grid[0], w.shape[0] // grid[0], grid[1], w.shape[1] // grid[1])
    return blocks.sum((1, 3))


def test_default_multipliers() -> None:
    assert DEFAULT[0] == 0.25 and len(DEFAULT) == 38 and DEFAULT[-1] == pytest.approx(3.95)
    assert multipliers(1.0, 1.5, 0.5) == (1.0, 1.5)
    for bad in ((0, 1, 0.1), (2, 1, 0.1), (1, 2, 0), (1, float("inf"), 1), (1, 2, 1e-9)):
        with pytest.raises(ConfigError):
            multipliers(*bad)


@pytest.mark.parametrize(
    "fmt", ["i4[...]*f32", "i8[1,...]*f32", "i4[16]*f32", "e4m3[8,32]*f32", "i4[-1,1,...]*f32", NVFP4_STATIC]
)
@pytest.mark.parametrize("chunk", [1 << 18, 256])
def test_multipliers_equal_brute_force(fmt: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    w, f = weight(), parse(fmt)
    amax = block_amax(w, f)
    tensor_amax = amax.max() if f.needs_global else None
    errors = torch.stack([sse(w, fmt, amax * m, tensor_amax) for m in DEFAULT])
    found = mse_ranges(w, f, DEFAULT)
    assert found is not None
    ours = sse(w, fmt, found.amax, found.global_amax)
    torch.testing.assert_close(ours, errors.amin(0), rtol=1e-5, atol=0)
    assert float(ours.sum()) <= float(errors[DEFAULT.index(1.05) if 1.05 in DEFAULT else 8].sum())
    ratio = found.amax / amax.clamp(min=1e-30)
    near = [min(abs(float(r) - m) for m in DEFAULT) < 1e-5 for r in ratio.flatten() if r > 0]
    assert all(near)


@pytest.mark.parametrize("shared", [None, 250.0])
def test_the_sweep_equals_all_126_codes(shared: float | None) -> None:
    w, f = weight(), parse(NVFP4_STATIC)
    codes = positive_codes(element("e4m3"))
    assert codes.numel() == 126 and codes[0] == 2.0**-9 and codes[-1] == 448
    given = None if shared is None else torch.tensor(shared)
    found = mse_ranges(w, f, DEFAULT, fp8_sweep=True, tensor_amax=given)
    assert found is not None and found.global_amax == (shared or 100.0)
    outer = found.global_amax / (6 * 448)
    grid = torch.ones(f.grid(w.shape))
    errors = torch.stack([sse(w, NVFP4_STATIC, grid * c * outer * 6, found.global_amax) for c in codes])
    stored = compute_scales(found.amax, f, found.global_amax).stored[0].float()
    ours = sse(w, NVFP4_STATIC, found.amax, found.global_amax)
    torch.testing.assert_close(ours, errors.amin(0), rtol=1e-6, atol=1e-12)
    assert torch.equal(stored, codes[errors.argmin(0)])
    assert float(ours.sum()) < 0.97 * float(sse(w, NVFP4_STATIC, block_amax(w, f), found.global_amax).sum())


def test_the_window_is_smaller_than_all_codes_where_it_may_be() -> None:
    below, above = window(parse(NVFP4_STATIC))
    assert below + above + 1 < 64
    assert window(parse("i4[16]*e4m3[...]*f32")) == (126, 126)


def test_four_over_six_takes_the_better_of_both() -> None:
    w, f = weight(), parse("e2m1[16]*e4m3:46[...]*f32")
    for found in (mse_ranges(w, f, (1.0, 1.5)), max_ranges(w, f)):
        assert found is not None
        assert torch.equal(fake_quantize(w, f, found.amax, found.global_amax), fake_quantize(w, f))
        ratio = (found.amax / block_amax(w, f).clamp(min=1e-30)).flatten()
        assert {round(r, 5) for r in ratio.tolist()} == {0.0, 1.0, 1.5}


def test_zero_point_ranges() -> None:
    w, f = weight() + 0.5, parse("u4[16]*f32+u4")
    plain, best = max_ranges(w, f), mse_ranges(w, f, DEFAULT)
    assert plain is not None and best is not None
    before = (fake_quantize(w, f, plain.amax, None, plain.amin) - w).square().sum()
    assert (fake_quantize(w, f, best.amax, None, best.amin) - w).square().sum() < before


@pytest.mark.parametrize(
    "fmt", ["i8[...]*f32", "i8[1,...]*f32", "i4[16]*f32", "e2m1[16]~*e4m3[...]*f32", NVFP4_STATIC, "u4[16]*f32+u4"]
)
def test_max_ranges_are_those_of_the_weight(fmt: str) -> None:
    w, f = weight(), parse(fmt)
    found = max_ranges(w, f)
    assert found is not None
    arguments = (None, found.amax) if f.dynamic else (found.amax, found.global_amax)
    assert torch.equal(fake_quantize(w, f, *arguments, found.amin), fake_quantize(w, f))


def test_formats_that_find_their_own_range() -> None:
    assert max_ranges(weight(), parse("e2m1[32]~*e8m0")) is None and mse_ranges(weight(), parse("i8[-1]~*f32"), DEFAULT) is None


def test_ragged_and_empty() -> None:
    w, f = torch.randn(5, 37), parse("i4[16]*f32")
    found = mse_ranges(w, f, DEFAULT)
    assert found is not None and found.amax.shape == (5, 3)
    total = block_errors(w, f, compute_scales(found.amax, f)).sum()
    torch.testing.assert_close(total, (fake_quantize(w, f, found.amax) - w).square().sum())
    assert mse_ranges(torch.zeros(0, 16), f, DEFAULT) is not None


def test_the_calibrator_takes_one_tensor() -> None:
    calibrator = MseCalibrator(NVFP4_STATIC, fp8_scale_sweep=True)
    with pytest.raises(CalibrationError):
        calibrator.amax()
    calibrator.update(weight())
    assert calibrator.ranges().amax.shape == (24, 4)
    with pytest.raises(CalibrationError, match="one tensor"):
        calibrator.update(weight())
    calibrator.reset()
    calibrator.update(weight(8, 32))
    assert calibrator.amax().shape == (8, 2)


def test_temporary_memory_is_that_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    biggest = 0
    real = torch.Tensor.float

    def spy(self: torch.Tensor) -> torch.Tensor:
        nonlocal biggest
        biggest = max(biggest, self.numel())
        return real(self)

    w = torch.randn(2048, 512).bfloat16()
    monkeypatch.setattr(torch.Tensor, "float", spy)
    mse_ranges(w, parse("i4[64]*f32"), (0.8, 1.0))
    assert biggest <= chunks.CHUNK < w.numel()


@pytest.mark.parametrize("text", ["e2m1[16]*e4m3[...]*f32", "u4[32]*f32+u4", "e4m3[8,32]*f32", "i8[1,...]*f32"])
def test_searching_by_rows_finds_the_same(text, monkeypatch):
    f, w = parse(text), torch.randn(50, 96)
    whole = mse_ranges(w, f, DEFAULT, fp8_sweep=f.is_two_level)
    monkeypatch.setattr(weights_module, "SEARCHED", 1000)
    parts = mse_ranges(w, f, DEFAULT, fp8_sweep=f.is_two_level)
    assert torch.equal(parts.amax, whole.amax)
    assert whole.amin is None or torch.equal(parts.amin, whole.amin)
    assert (parts.global_amax is None) == (whole.global_amax is None) and (
        parts.global_amax is None or parts.global_amax == whole.global_amax
    )
