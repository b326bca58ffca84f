"""fake_quantize on CPU cores against the law, bit for bit: long rows, pieces that do not fit evenly, NaN, zeros, extremes."""

from __future__ import annotations

import pytest
import torch

from modelopt.numerics import parse
from modelopt.numerics import reference as law
from modelopt.torch import kernels
from modelopt.torch.kernels.fake_quantize import lane_math, lanes

FORMATS = [
    *("i8[...]*f32", "i4[1,...]*f32", "i8[...,1]*f32", "e4m3[...]*f32", "e5m2[1,...]*f32", "e4m3[-1]~*f32", "i4[128]*f32"),
    *(
        "u4[64]*f16+u4",
        "e2m1[16]~*e4m3[...]*f32",
        "e2m1[16]*e4m3[...]*f32",
        "e2m1[32]~*e8m0",
        "e3m2[32]~*e8m0:floor",
        "i8[32]~*e8m0",
    ),
]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in shape, dtype and bits; one NaN is as good as another."""
    nan = a.isnan()
    equal = a.shape == b.shape and a.dtype == b.dtype and torch.equal(nan, b.isnan())
    return equal and torch.equal(a[~nan], b[~nan]) and torch.equal(a[~nan].signbit(), b[~nan].signbit())


def measured(fmt, x):
    """Ranges of other data, as a static quantizer holds them."""
    other = torch.randn_like(x)
    if fmt.zero is not None:
        low, high = law.block_range(other, fmt)
        return {"amax": high, "amin": low}
    if fmt.dynamic:
        return {"amax": law.global_amax(other)} if fmt.needs_global else {}
    return {"amax": law.block_amax(other, fmt)}


@pytest.mark.parametrize("text", FORMATS)
def test_equal_to_the_law(text):
    fmt = parse(text)
    for shape in ((1,), (5, 96), (3, 5, 64), (3, 40000), (1, 200000), (33, 4096)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape, dtype=dtype)
            for given in ({}, measured(fmt, x)):
                assert same(kernels.fake_quantize(x, fmt, **given), law.fake_quantize(x, fmt, **given)), (shape, dtype, given)


@pytest.mark.parametrize("text", FORMATS)
def test_odd_values(text):
    fmt = parse(text)
    x = torch.randn(8, 256)
    x[0, 0], x[2, 2], x[3, 3], x[1], x[1, 3] = float("nan"), float("inf"), float("-inf"), 0.0, -0.0
    x[4], x[5] = x[4] * 1e-42, x[5] * 1e38
    for given in ({}, measured(fmt, torch.randn(8, 256))):
        assert same(kernels.fake_quantize(x, fmt, **given), law.fake_quantize(x, fmt, **given))


def test_inference_mode_views_and_gradients():
    x = torch.randn(64, 300, requires_grad=True)
    with torch.inference_mode():
        assert same(kernels.fake_quantize(x, "i8[-1]~*f32"), law.fake_quantize(x, parse("i8[-1]~*f32")))
    view = x[::2, 44:]
    assert same(kernels.fake_quantize(view, "e2m1[32]~*e8m0").detach(), law.fake_quantize(view.detach(), parse("e2m1[32]~*e8m0")))
    kernels.fake_quantize(x, "i8[-1]~*f32").sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_what_is_left_to_the_law_is_said():
    x = torch.randn(4, 50)
    assert lanes.why_not(x, parse("i8[1,...]*f32"), ranged=True) is None
    assert "blocks" in str(lanes.why_not(x, parse("i4[32]*f32"), ranged=True))
    assert "codebook" in str(lanes.why_not(x, parse("nf4[50]*f32"), ranged=True))
    assert "float64" in str(lanes.why_not(x.double(), parse("i8[1,...]*f32"), ranged=True))


MORE = ["e3m0[32]~*e8m0", "e0m3[16]*f32", "e2m3[32]~*e8m0:nearest", "i8n[1,...]*bf16", "e4m3[...,1]*f32", "u8[...]*f32+u8"]
AMAX = [0.0, 1e-45, 3e-39, 1.2e-38, 1.0, 5.99, 6.0, 6.0000005, 7.5, 448.0, 3e38, float("inf"), float("nan")]


@pytest.mark.parametrize("text", [*FORMATS, *MORE])
def test_small_pieces_strips_and_strides(text, monkeypatch):
    """The same bits however the tensor is cut: a strip for each thread, ragged last pieces, rows longer than a piece."""
    fmt = parse(text)
    monkeypatch.setattr(lanes, "piece_size", lambda: 128)
    for large in (1, 1 << 30):
        monkeypatch.setattr(lanes, "_LARGE", large)
        for shape in ((1, 96), (3, 160), (7, 11, 64), (131, 32), (64, 33)):
            for dtype in (torch.float32, torch.float16):
                x = torch.randn(2 * shape[0], *shape[1:], dtype=dtype)[::2]
                for given in ({}, measured(fmt, x)):
                    wanted = law.fake_quantize(x, fmt, **given)
                    for source in (x, x.contiguous(), x.mT.contiguous().mT):
                        made = kernels.fake_quantize(source, fmt, **given)
                        assert made.is_contiguous() and same(made, wanted), (large, shape, dtype, list(given))


@pytest.mark.parametrize("text", ["e4m3[32]~*e8m0", "e2m1[32]~*e8m0:floor", "e3m2[32]~*e8m0:nearest", "i8[32]~*e8m0"])
def test_powers_of_two_are_those_of_the_law(text):
    fmt, amax = parse(text), torch.tensor(AMAX).view(1, -1, 1)
    wanted = law.compute_scales(amax, fmt).effective
    assert same(lane_math.find_scales(amax.clone(), fmt, None, None), wanted)


@pytest.mark.parametrize("text", ["e2m1[16]~*e4m3[...]*f32", "e2m1[16]~*e4m3:fp8[...]*f32", "i4[16]~*e5m2[...]*f16"])
@pytest.mark.parametrize("whole", [0.0, 1e-40, 6.0, 3e38, float("inf"), float("nan")])
def test_two_level_scales_are_those_of_the_law(text, whole):
    fmt, amax, whole = parse(text), torch.tensor(AMAX).view(1, -1, 1), torch.tensor(whole)
    wanted = law.compute_scales(amax, fmt, whole).effective
    assert same(lane_math.find_scales(amax.clone(), fmt, lane_math.outer_scale(fmt, whole), whole), wanted)


def test_tiny_scales_are_not_divided_further():
    x = torch.randn(2048, 256) * 1e-43
    for text in ("e4m3[...]*f32", "e2m1[1,...]*f32"):
        assert (
            lane_math.fold(law.compute_scales(law.block_amax(x, parse(text)), parse(text)).effective, parse(text).element) is None
        )
        assert same(kernels.fake_quantize(x, text), law.fake_quantize(x, parse(text)))
