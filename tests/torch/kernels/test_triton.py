"""The Triton kernels against the law, bit for bit, on a CUDA device: every format, odd tensors, NaN, extremes, 2^31."""

from __future__ import annotations

import pytest
import torch

from modelopt.numerics import parse
from modelopt.numerics import reference as law
from modelopt.numerics.blocks import spread
from modelopt.torch import kernels
from modelopt.torch.kernels.fake_quantize import reference as slow

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: Triton kernels run on one only"),
]
FORMATS = [
    *("e4m3[...]*f32", "e5m2[...]*f32", "i8[...]*f32", "i8n[1,...]*f32", "i8[-1,1,...]*f32", "i8[...,1]*f32", "u8[...]*f32"),
    *("i8[-1]~*f32", "e4m3[-1]~*f32", "i7[32]*f16", "i5[32]*f32", "i4[128]*f32", "i4[64]*bf16", "i3[50]*f32", "u1[8]*f32"),
    *("u4[64]*f16+u4", "u4[64]~*f16+u4", "u8[1,...]*f32+u8", "i4[32]*f32+i4", "u2[16]*f32+u2"),
    *("e2m1[16]~*e4m3[...]*f32", "e2m1[16]*e4m3[...]*f32", "e2m1[32]~*e4m3:fp8[...]*f32", "e2m1[16]*e4m3", "i4[32]*i8[...]*f32"),
    *("e2m1[32]~*e8m0", "e2m1[32]~*e8m0:floor", "e2m1[32]~*e8m0:nearest", "e3m2[32]~*e8m0", "e2m3[32]~*e8m0"),
    *("e4m3[32]~*e8m0", "e5m2[32]~*e8m0", "i8[32]~*e8m0", "e1m2[32]*e8m0", "e3m0[32]*e8m0", "e0m3[32]*e8m0"),
    *("nf4[64]*f32", "nf4[64]*i8[256]*f32", "e4m3[128,128]*f32", "e4m3[5,7]*f32", "e4m3[1,-1,1]*f32"),
]
SHAPES = [(1,), (7, 200), (3, 5, 64), (65, 4100), (129, 33, 17)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in shape, dtype and bits; one NaN is as good as another."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or a.element_size() == 1:
        return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a[~nan].signbit(), b[~nan].signbit()) and torch.equal(a[~nan], b[~nan])


def measured(fmt, x):
    """Ranges of other data, as a static quantizer holds them."""
    other = torch.randn_like(x)
    if fmt.dynamic:
        return {"amax": law.global_amax(other)} if fmt.needs_global else {}
    if fmt.zero is not None:
        low, high = law.block_range(other, fmt)
        return {"amax": high, "amin": low}
    given = {"amax": law.block_amax(other, fmt)}
    return given | ({"global_amax": law.global_amax(other)} if fmt.needs_global else {})


def check_all(x, fmt, given):
    values = law.fake_quantize(x, fmt, **given)
    assert same(kernels.fake_quantize(x, fmt, **given), values), "fake_quantize"
    expected = law.quantize(x, fmt, **given).parts
    parts = kernels.quantize(x, fmt, **given)
    for a, b in zip(parts, expected, strict=True):
        assert same(a, b), f"quantize: {a.dtype} {tuple(a.shape)}"
    assert same(
        kernels.dequantize(parts, fmt, x.shape, x.dtype), law.Quantized.from_parts(expected, fmt, x.shape, x.dtype).dequantize()
    )
    grad = torch.randn_like(x)
    clipped = slow.clipped_gradient(grad, x, fmt, given.get("amax"), given.get("global_amax"), given.get("amin"))
    assert same(
        torch.ops.modelopt.clipped_gradient(grad, x, str(fmt), given.get("amax"), given.get("global_amax"), given.get("amin")),
        clipped,
    ), "clipped_gradient"


@pytest.mark.parametrize("text", FORMATS)
def test_equal_to_the_law(text):
    fmt = parse(text)
    torch.manual_seed(0)
    for shape in SHAPES:
        if fmt.why_not(shape) is not None:
            continue
        for dtype in DTYPES if shape == (65, 4100) else DTYPES[:1]:
            x = torch.randn(shape, dtype=dtype, device="cuda") * 3
            for given in ({}, measured(fmt, x)):
                check_all(x, fmt, given)
            assert same(kernels.amax(x, fmt), law.block_amax(x, fmt)), "amax"


@pytest.mark.parametrize("text", FORMATS)
def test_equal_to_the_law_on_the_cpu(text):
    """The law itself says the same on both devices."""
    fmt = parse(text)
    x = torch.randn(3, 65, 256, dtype=torch.bfloat16)
    for given in ({}, measured(fmt, x)):
        there = {name: value.cuda() for name, value in given.items()}
        assert same(kernels.fake_quantize(x.cuda(), fmt, **there).cpu(), law.fake_quantize(x, fmt, **given))


@pytest.mark.parametrize("text", FORMATS)
def test_every_bfloat16_and_extreme_floats(text):
    fmt = parse(text)
    every = torch.arange(65536, device="cuda").to(torch.int16).view(torch.bfloat16)
    finite = every[every.isfinite()]
    x = finite[torch.randperm(finite.numel(), device="cuda")][:65024].reshape(254, 256)
    if fmt.why_not(x.shape) is not None:
        pytest.skip("needs three dimensions")
    values = law.fake_quantize(x, fmt)
    assert same(kernels.fake_quantize(x, fmt), values)
    for given in ({}, measured(fmt, x.float())):
        for power in (-149, -140, -126, -60, 0, 60, 100):
            wide = torch.randn(254, 256, device="cuda") * 2.0**power
            assert same(kernels.fake_quantize(wide, fmt, **given), law.fake_quantize(wide, fmt, **given)), power
    odd = torch.randn(254, 256, device="cuda")
    odd[3, 5], odd[100, 17] = float("nan"), 0.0
    odd[200:] = 0
    assert same(kernels.fake_quantize(odd, fmt), law.fake_quantize(odd, fmt)), "NaN"
    assert same(kernels.amax(odd, fmt), law.block_amax(odd, fmt))
    odd[3, 5], odd[7, 7], odd[9, 9] = 1.0, float("inf"), float("-inf")
    for given in ({}, measured(fmt, x.float())):
        assert same(kernels.fake_quantize(odd, fmt, **given), law.fake_quantize(odd, fmt, **given)), "infinity"


@pytest.mark.parametrize("text", ["i8[...]*f32", "e4m3[1,...]*f32", "i4[128]*f32", "nf4[64]*f32", "e2m1[16]*e4m3[...]*f32"])
def test_ties_and_their_neighbours(text):
    """Quotients at a tie and one or two steps beside it, for many scales: where a wrong last bit of x / s would show."""
    fmt = parse(text)
    torch.manual_seed(1)
    amax = law.block_amax(torch.rand(4096, 1024, device="cuda") * 10, fmt)
    given = {"amax": amax} | ({"global_amax": amax.amax()} if fmt.needs_global else {})
    shape = torch.Size((4096, 1024))
    values = torch.unique(fmt.element.table("cuda").nan_to_num(0.0, 0.0, 0.0))
    middles = (values[1:] + values[:-1]) / 2
    picks = middles[torch.randint(middles.numel(), shape, device="cuda")]
    scale = law.find_scales(torch.zeros(shape, device="cuda"), fmt, **given).effective
    x = picks * spread(scale, fmt.block, shape)
    for shift in range(-3, 4):
        near = (x.view(torch.int32) + shift).view(torch.float32)
        assert same(kernels.fake_quantize(near, fmt, **given), law.fake_quantize(near, fmt, **given)), shift


def test_four_over_six_picks_the_smaller_error():
    """The sum of squares may be added in any order, so the pick may differ where both errors are equal to the last bits."""
    fmt = parse("e2m1[16]*e4m3:46[...]*f32")
    x = torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16)
    top = law.global_amax(x)
    ours, theirs = kernels.fake_quantize(x, fmt, global_amax=top), law.fake_quantize(x, fmt, global_amax=top)
    blocks = (ours != theirs).reshape(-1, 16).any(dim=1)
    errors = [((v.float() - x.float()).double().square().reshape(-1, 16).sum(1)) for v in (ours, theirs)]
    assert blocks.float().mean() < 1e-3
    assert torch.allclose(errors[0], errors[1], rtol=2e-2)
    given = {"amax": law.block_amax(x, fmt), "global_amax": top}
    assert same(kernels.fake_quantize(x, fmt, **given), law.fake_quantize(x, fmt, **given))


@pytest.mark.parametrize("text", ["i8[1,...]*f32", "e2m1[16]~*e4m3[...]*f32", "e4m3[-1]~*f32", "i8[...,1]*f32"])
def test_views_empty_and_scalars(text):
    x = torch.randn(64, 48, 4, device="cuda").permute(1, 2, 0)
    assert same(kernels.fake_quantize(x, text), law.fake_quantize(x.contiguous(), parse(text)))
    assert kernels.fake_quantize(x[:0], text).shape == (0, 4, 64)
    assert same(kernels.fake_quantize(x[::2, :, ::3], text), law.fake_quantize(x[::2, :, ::3].contiguous(), parse(text)))
    shifted = torch.randn(64 * 64 + 1, device="cuda")[1:].reshape(64, 64)  # not aligned to 16 bytes
    assert same(kernels.fake_quantize(shifted, text), law.fake_quantize(shifted, parse(text)))
    if parse(text).why_not(()) is None:
        scalar = torch.tensor(1.7, device="cuda")
        assert same(kernels.fake_quantize(scalar, text), law.fake_quantize(scalar, parse(text)))


@pytest.mark.parametrize("text", ["i8[...]*f32", "e2m1[16]~*e4m3[...]*f32", "e4m3[-1]~*f32", "i8[...,1]*f32"])
def test_more_than_two_to_the_31_elements(text):
    """The last rows of a tensor past 2^31 elements equal those of a small tensor with the same ranges."""
    fmt, columns = parse(text), 16384
    rows = 2**31 // columns + 40
    x = torch.randn(256, columns, device="cuda", dtype=torch.bfloat16).repeat(-(-rows // 256), 1)[:rows]
    small = x[-40:]
    top = {"amax": torch.tensor(3.0, device="cuda")} if fmt.needs_global or fmt.block.whole else {}
    if text.endswith(",1]*f32"):
        top = {"amax": torch.rand(columns, device="cuda") + 1}
    assert same(kernels.fake_quantize(x, fmt, **top)[-40:], law.fake_quantize(small, fmt, **top))
    assert same(kernels.amax(x, fmt).amax(), law.global_amax(x[:256]))
    x[-1, -1] = 1000.0
    assert kernels.amax(x, fmt).amax() == 1000.0
    parts = kernels.quantize(x, fmt, **top)
    expected = law.quantize(x[-40:], fmt, **top)
    assert same(parts[0][-40:], expected.codes)
    assert same(kernels.dequantize(parts, fmt, x.shape, x.dtype)[-40:], expected.dequantize())
