"""Codes of four and six bits, two values to an instruction: borders in exact arithmetic; on a GPU the kernels against the law."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from modelopt.numerics import parse
from modelopt.numerics import reference as law
from modelopt.numerics.elements import element
from modelopt.torch import kernels
from modelopt.torch.kernels.subbyte.constants import borders, pieces

FORMATS = [
    *("e2m1[16]~*e4m3[...]*f32", "e2m1[16]*e4m3[...]*f32", "e2m1[32]~*e4m3:fp8[...]*f32", "e2m1[128]*f32", "nf4[64]*f32"),
    *("nf4[16]*f32", "e3m2[32]~*e8m0", "e3m2[64]*e8m0", "e2m3[32]*e8m0:nearest", "e3m2[32]~*e8m0:floor"),
]
gpu = pytest.mark.gpu
cuda_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in shape, dtype and bits; one NaN is as good as another."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or a.element_size() == 1:
        return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a[~nan].signbit(), b[~nan].signbit()) and torch.equal(a[~nan], b[~nan])


def test_borders_are_those_of_the_law():
    """x s-multiples around every border: x / s > b + half a step exactly where the rounded quotient gets the upper code."""
    e = element("e2m1")
    table = sorted({v for v in e.table().tolist() if v >= 0})
    generator = torch.Generator().manual_seed(0)
    scales = torch.cat([torch.rand(200, generator=generator) + 1, torch.tensor([1.0, 2.0 - 2**-23, 1.5, 1.25])])
    for k, (b, half, closed, _) in enumerate(borders(e)):
        for s in scales.tolist():
            middle = Fraction(s) * (Fraction(b) + Fraction(half))
            near = torch.tensor(float(middle))
            bits = near.view(torch.int32) + torch.arange(-3, 4)
            x = bits.to(torch.int32).view(torch.float32)
            upper = e.cast(x / torch.tensor(s)) >= table[k + 1]
            exact = [Fraction(v) >= middle if closed else Fraction(v) > middle for v in x.tolist()]
            assert upper.tolist() == exact, (b, s)


def test_pieces_of_nf4_have_one_border_which_is_far_from_their_ends():
    """The code by piece and border is the law's, though a number next to the end of a piece may count as its neighbour's."""
    e = element("nf4")
    border, code = (torch.tensor(v) for v in pieces(e))
    codes = torch.arange(16)[torch.argsort(torch.argsort(e.table()))]
    near = (border[border < 2].view(torch.int32)[:, None] + torch.arange(-2, 3)).int()
    q = torch.cat([torch.linspace(-1, 1, 200001), near.view(torch.float32).flatten()])
    expected = codes[e.encode(e.cast(q)).long()]
    for shift in (-1e-3, 0.0, 1e-3):
        piece = torch.round((q * 15.5 + 15.5 + shift).clamp(0, 31)).long()
        assert torch.equal(code[(piece + (q > border[piece]).long()).clamp(max=31)], expected)


def values_of(x, fmt, **given):
    """What the kernel makes of x, preferred or not (six bits have codes only: Triton's values)."""
    from modelopt.torch.kernels import subbyte
    from modelopt.torch.kernels.amax.triton import ranges

    if subbyte.why_not(x, fmt, False):
        return kernels.fake_quantize(x, fmt, **given)
    amax, top, _, _ = ranges(x, fmt, given.get("amax"), given.get("global_amax"), None)
    return subbyte.fake_quantize(x, fmt, amax, top)


def parts_of(x, fmt, **given):
    from modelopt.torch.kernels import subbyte
    from modelopt.torch.kernels.amax.triton import ranges

    assert subbyte.why_not(x, fmt, True) is None
    amax, top, _, _ = ranges(x, fmt, given.get("amax"), given.get("global_amax"), None)
    return subbyte.quantize(x, fmt, amax, top)


def check(x, fmt, given):
    assert same(values_of(x, fmt, **given), law.fake_quantize(x, fmt, **given)), "values"
    for a, b in zip(parts_of(x, fmt, **given), law.quantize(x, fmt, **given).parts, strict=True):
        assert same(a, b), f"{a.dtype} {tuple(a.shape)}"


def some_ranges(x, fmt):
    """Ranges of other data, as a static quantizer holds them, and those of x."""
    other = torch.randn(x.shape, device=x.device)
    top = {"global_amax": law.global_amax(other)} if fmt.needs_global else {}
    yield top if fmt.needs_global else {}
    if not fmt.dynamic:
        yield {"amax": law.block_amax(other, fmt), **top}


@gpu
@cuda_only
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", FORMATS)
def test_equal_to_the_law(text, dtype):
    fmt = parse(text)
    torch.manual_seed(0)
    for shape in [(256,), (7, 768), (65, 4096), (3, 33, 256), (2048, 4096)]:
        x = torch.randn(shape, dtype=dtype, device="cuda") * 3
        for given in some_ranges(x, fmt):
            check(x, fmt, given)


@gpu
@cuda_only
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", FORMATS)
def test_every_half_under_many_scales(text, dtype):
    """Every finite number of the type in blocks of its own neighbours, under scales from the smallest to the largest."""
    fmt = parse(text)
    torch.manual_seed(1)
    every = torch.arange(65536, device="cuda").to(torch.int16).view(dtype)
    x = every[every.isfinite()]
    x = x[: x.numel() // 512 * 512].reshape(-1, 512)
    mixed = x.reshape(-1)[torch.randperm(x.numel(), device="cuda")].reshape(x.shape)
    for data in (x, mixed):
        check(data, fmt, {"global_amax": law.global_amax(x)} if fmt.needs_global else {})
        if fmt.dynamic:
            for power in range(-140, 128, 20) if fmt.needs_global else ():
                check(data, fmt, {"global_amax": torch.tensor(1.7 * 2.0**power, device="cuda")})
            continue
        amax = law.block_amax(data, fmt)
        for factor in (1.0, 0.37, 2.9, 2.0**-30, 2.0**20):
            check(data, fmt, {"amax": amax * factor} | ({"global_amax": amax.amax()} if fmt.needs_global else {}))
        wide = torch.exp2(torch.rand(amax.shape, device="cuda") * 250 - 140)
        check(data, fmt, {"amax": wide} | ({"global_amax": wide.amax()} if fmt.needs_global else {}))


@gpu
@cuda_only
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", FORMATS)
def test_ties_and_neighbours(text, dtype):
    """Scales that put a number of the type on a border, and scales one to three steps beside them."""
    fmt = parse(text)
    torch.manual_seed(2)
    shape = torch.Size((512, 1024))
    values = torch.unique(fmt.element.table("cuda"))
    middles = (values[1:] + values[:-1]) / 2
    x = (torch.randn(shape, device="cuda") * 2).to(dtype)
    grid = fmt.grid(shape)
    first = x.float().reshape(*grid, -1)[..., 0]
    pick = middles[torch.randint(middles.numel(), grid, device="cuda")].abs()
    scale = first.abs() / pick
    for shift in range(-3, 4):
        amax = (scale.view(torch.int32) + shift).view(torch.float32) * fmt.element.max
        if not fmt.dynamic:
            check(x, fmt, {"amax": amax} | ({"global_amax": amax.amax()} if fmt.needs_global else {}))
        elif fmt.needs_global:
            check(x, fmt, {"global_amax": (amax.reshape(-1)[shift % 5] * 448).abs() + 1e-3})


@gpu
@cuda_only
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", FORMATS)
def test_nan_infinities_and_zeros(text, dtype):
    fmt = parse(text)
    x = torch.randn(64, 512, device="cuda", dtype=dtype)
    x[40:] = 0
    x[1, 5], x[2, 100] = float("nan"), float("nan")
    nan = x.isnan()
    for given in some_ranges(x, fmt):
        assert same(values_of(x, fmt, **given), law.fake_quantize(x, fmt, **given)), "NaN"
        ours, theirs = parts_of(x, fmt, **given), law.quantize(x, fmt, **given).parts
        assert all(same(a, b) for a, b in zip(ours[1:], theirs[1:], strict=True))
        codes = [law.Quantized(p[0], (), fmt, x.shape, dtype).unpacked() for p in (ours, theirs)]
        if fmt.element.kind == "float":  # the sign of a NaN's zero is open
            sign = 1 << (fmt.element.bits - 1)
            codes = [
                torch.where(law.dequantize(law.Quantized.from_parts(theirs, fmt, x.shape, dtype)).isnan() | nan, c & ~sign, c)
                for c in codes
            ]
        assert torch.equal(codes[0], codes[1])
    x[1, 5], x[2, 100], x[3, 7] = 1.0, float("inf"), float("-inf")
    for given in some_ranges(x, fmt):
        assert same(values_of(x, fmt, **given), law.fake_quantize(x, fmt, **given)), "infinity"
    for amax in (float("inf"), float("nan")):
        if not fmt.dynamic:
            bad = law.block_amax(torch.randn(64, 512, device="cuda"), fmt)
            bad.view(-1)[::3] = amax
            given = {"amax": bad} | ({"global_amax": torch.tensor(4.0, device="cuda")} if fmt.needs_global else {})
            assert same(values_of(x, fmt, **given), law.fake_quantize(x, fmt, **given)), amax
        if fmt.needs_global:
            given = {"global_amax": torch.tensor(amax, device="cuda")}
            assert same(values_of(x, fmt, **given), law.fake_quantize(x, fmt, **given)), amax


@gpu
@cuda_only
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_four_over_six_takes_the_smaller_error(dtype):
    """The same choice as the law's but where both errors are equal to the last bits; then values, codes and scales agree."""
    fmt = parse("e2m1[16]~*e4m3:46[...]*f32")
    torch.manual_seed(3)
    every = torch.arange(65536, device="cuda").to(torch.int16).view(dtype)
    every = every[every.float().abs() < 2.0**120]
    for x in (
        torch.randn(2048, 2048, device="cuda", dtype=dtype),
        torch.randint(-6, 7, (512, 2048), device="cuda").to(dtype) / 2,
        torch.randn(512, 2048, device="cuda", dtype=dtype) * 2.0 ** torch.randint(-12, 12, (512, 1), device="cuda").to(dtype),
        every[: every.numel() // 16 * 16][torch.randperm(every.numel() // 16 * 16, device="cuda")].reshape(-1, 16),
    ):
        for factor in (1.0, 0.3, 2.7):
            top = law.global_amax(x) * factor
            ours, theirs = values_of(x, fmt, global_amax=top), law.fake_quantize(x, fmt, global_amax=top)
            parts = parts_of(x, fmt, global_amax=top)
            assert same(law.Quantized.from_parts(parts, fmt, x.shape, dtype).dequantize(), ours)
            other = (ours != theirs).reshape(-1, 16).any(dim=1)
            errors = [(v.double() - x.double()).square().reshape(-1, 16).sum(1)[other] for v in (ours, theirs)]
            assert other.double().mean() < 1e-3
            assert torch.allclose(errors[0], errors[1], rtol=2e-2)


@gpu
@cuda_only
def test_more_than_two_to_the_31_elements():
    fmt, columns = parse("e2m1[16]~*e4m3:46[...]*f32"), 16384
    rows = 2**31 // columns + 40
    x = torch.randn(256, columns, device="cuda", dtype=torch.bfloat16).repeat(-(-rows // 256), 1)[:rows]
    top = torch.tensor(5.0, device="cuda")
    for text in (str(fmt), "nf4[64]*f32", "e3m2[32]~*e8m0"):
        fmt = parse(text)
        given = {"global_amax": top} if fmt.needs_global else {}
        assert same(values_of(x, fmt, **given)[-40:], values_of(x[-40:], fmt, **given))
        parts, last = parts_of(x, fmt, **given), parts_of(x[-40:], fmt, **given)
        assert same(parts[0][-40:], last[0]) and same(parts[1][-40:], last[1])
