"""The law: worked formulas in numpy, compressed-tensors' own decompression, and properties of every format."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from modelopt.core.errors import FormatError, ShapeError
from modelopt.numerics import element, parse
from modelopt.numerics import reference as law

EVERY = """
    e4m3[...]*f32 e5m2[...]*f32 i8[...]*f32 i8[1,...]*f32 i8[-1,1,...]*f32 i8[...,1]*f32 i8[-1]~*f32 i8n[1,...]*f32
    u8[...]*f32 i7[32]*f16 i6[32]*bf16 i5[32]*f32 i4[128]*f32 i4[64]*bf16 i3[50]*f32 i2[16]*f16 u1[8]*f32
    u4[64]*f16+u4 u8[1,...]*f32+u8 i4[32]*f32+i4 u2[16]*f32+u2 e2m1[16]~*e4m3[...]*f32 e2m1[16]*e4m3[...]*f32
    e2m1[16]*e4m3:46[...]*f32 e2m1[32]~*e4m3:fp8[...]*f32 e2m1[16]*e4m3 e2m1[32]~*e8m0 e2m1[32]~*e8m0:floor
    e2m1[32]~*e8m0:nearest e3m2[32]~*e8m0 e2m3[32]~*e8m0 e4m3[32]~*e8m0 e5m2[32]~*e8m0 i8[32]~*e8m0 i8[32]~*e8m0:floor
    e1m2[32]*e8m0 e3m0[32]*e8m0 e0m3[32]*e8m0 nf4[64]*f32 nf4[64]*i8[256]*f32 e4m3[128,128]*f32 e4m3[5,7]*f32
""".split()
SHAPES = [(7, 200), (3, 5, 64), (256,), (1,), (0, 4), (1, 1), (2, 3, 4, 5)]


def cases():
    return [(f, s) for f in EVERY for s in SHAPES if parse(f).why_not(s) is None]


@pytest.mark.parametrize("text", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_form_stands_for_the_fake_quantized_values(text, dtype):
    fmt = parse(text)
    for shape in SHAPES:
        if fmt.why_not(shape) is not None:
            continue
        x = torch.randn(shape, dtype=dtype)
        y = law.fake_quantize(x, fmt)
        q = law.quantize(x, fmt)
        assert y.dtype == dtype and y.shape == x.shape
        assert torch.equal(q.dequantize(), y)
        assert law.Quantized.from_parts(q.parts, fmt, q.shape, q.dtype).dequantize().equal(y)
        for stored, level in zip(q.scales, fmt.levels, strict=True):
            values = law.load_scale(stored, level.stored_scale)
            assert (values > 0).all() and values.isfinite().all()


@pytest.mark.parametrize("text", EVERY)
def test_quantizing_the_result_again_changes_nothing(text):
    fmt = parse(text)
    x = torch.randn(6, 128)
    q = law.find_scales(x, fmt)
    once = law.apply_scales(x, q, fmt)
    assert torch.equal(law.apply_scales(once, q, fmt), once)


@pytest.mark.parametrize("text", EVERY)
def test_zeros_stay_zero_with_positive_scales_and_nan_is_never_hidden(text):
    fmt = parse(text)
    assert torch.equal(law.fake_quantize(torch.zeros(4, 64), fmt), torch.zeros(4, 64))
    x = torch.randn(4, 128)
    x[1, 3] = float("nan")
    y = law.fake_quantize(x, fmt)
    assert y[1, 3].isnan()
    given = (
        None if fmt.dynamic and not fmt.needs_global else law.find_scales(torch.randn(4, 128), fmt).effective * fmt.element.max
    )
    if given is not None and fmt.zero is None and not fmt.is_two_level:
        assert law.fake_quantize(x, fmt, amax=given)[1, 3].isnan()


def test_fp8_per_tensor_by_hand():
    x = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    scale = np.float32(np.abs(x).max()) / np.float32(448)
    expected = (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    q = law.quantize(torch.from_numpy(x), parse("e4m3[...]*f32"))
    assert q.scales[0].item() == scale
    assert np.array_equal(q.dequantize().numpy(), expected)
    assert np.array_equal(q.codes.numpy(), (x / scale).astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


def test_nvfp4_by_hand():
    x = np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32)
    f32 = np.float32
    top = np.abs(x).max() / f32(6 * 448)
    blocks = x.reshape(8, 4, 16)
    ratio = np.clip(np.abs(blocks).max(-1) / f32(6) / top, f32(2**-9), f32(448))
    stored = ratio.astype(ml_dtypes.float8_e4m3fn)
    scale = stored.astype(f32) * top
    codes = (blocks / scale[..., None]).astype(ml_dtypes.float4_e2m1fn)
    q = law.quantize(torch.from_numpy(x), parse("e2m1[16]~*e4m3[...]*f32"))
    assert q.scales[1].item() == top
    assert np.array_equal(q.scales[0].view(torch.uint8).numpy(), stored.view(np.uint8))
    assert np.array_equal(q.unpacked().numpy(), codes.reshape(8, 64).view(np.uint8))
    nibbles = codes.reshape(8, 64).view(np.uint8)
    assert np.array_equal(q.codes.numpy(), nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)), "even index in the low nibble"


@pytest.mark.parametrize("name", ["e2m1", "e3m2", "e2m3", "e4m3", "e5m2", "i8"])
def test_mx_exponents_by_both_published_rules(name):
    e = element(name)
    x = torch.randn(64, 32) * torch.exp2(torch.randint(-20, 20, (64, 1)).float())
    amax = x.abs().amax(1).double().numpy()
    up = law.quantize(x, parse(f"{name}[32]*e8m0")).scales[0][:, 0].numpy().astype(int) - 127
    assert np.array_equal(up, np.ceil(np.log2(amax / e.max)).astype(int))
    floor = law.quantize(x, parse(f"{name}[32]*e8m0:floor")).scales[0][:, 0].numpy().astype(int) - 127
    largest = {"e2m1": 2, "e3m2": 4, "e2m3": 2, "e4m3": 8, "e5m2": 15, "i8": 6}[name]
    assert np.array_equal(floor, np.floor(np.log2(amax)).astype(int) - largest)


def test_mx_exponent_limits():
    fmt = parse("e2m1[32]*e8m0")
    x = torch.zeros(4, 32)
    x[1, 0], x[2, 0], x[3, 0] = 1e-45, 3e38, float("inf")
    codes = law.quantize(x, fmt).scales[0][:, 0]
    assert codes.tolist()[0] == 0 and 0 <= codes[1] <= 1 and codes[2] == 253 and codes[3] == 255
    assert law.e8m0_values(torch.tensor([0, 1, 127, 254, 255], dtype=torch.uint8)).tolist()[:4] == [
        2.0**-127,
        2.0**-126,
        1.0,
        2.0**127,
    ]


def test_four_over_six_is_never_worse_and_sometimes_better():
    x = torch.randn(64, 256)
    one, two = parse("e2m1[16]*e4m3[...]*f32"), parse("e2m1[16]*e4m3:46[...]*f32")
    six = law.compute_scales(law.block_amax(x, two), two, law.global_amax(x))
    plain = (law.apply_scales(x, six, two) - x).square().view(64, 16, 16).sum(-1)
    best = (law.fake_quantize(x, two) - x).square().view(64, 16, 16).sum(-1)
    assert (best <= plain).all() and (best < plain).any()
    assert (law.fake_quantize(x, two) - x).norm() < (law.fake_quantize(x, one) - x).norm()


def test_zero_points_by_hand():
    x = torch.rand(8, 64) * 3 - 1
    q = law.quantize(x, parse("u4[64]*f32+u4"))
    lo, hi = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True)
    scale = (hi - lo) / 15
    zero = torch.round(-lo / scale).clamp(0, 15)
    codes = (torch.round(x / scale) + zero).clamp(0, 15)
    assert torch.equal(q.unpacked().float(), codes)
    assert torch.equal(q.dequantize(), (codes - zero) * scale)


def test_compressed_tensors_decompresses_our_groups_to_our_values():
    forward = pytest.importorskip(
        "compressed_tensors.quantization.lifecycle.forward", reason="compressed-tensors is not installed"
    )
    from compressed_tensors.quantization import QuantizationArgs

    x = torch.randn(64, 256)
    table = [
        ("i8[1,...]*f32", {"num_bits": 8, "type": "int", "strategy": "channel"}),
        ("i4[64]*f32", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}),
        ("i3[128]*f32", {"num_bits": 3, "type": "int", "strategy": "group", "group_size": 128}),
        ("e4m3[...]*f32", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        ("e4m3[128,128]*f32", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}),
        ("e2m1[16]~*e4m3[...]*f32", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
        ("u4[64]*f32+u4", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": False}),
    ]
    for text, kwargs in table:
        fmt = parse(text)
        q = law.quantize(x, fmt)
        codes = fmt.element.decode(q.unpacked())
        zero = None
        if fmt.zero is not None:  # theirs is signed: shift codes and zero points by 2^(bits - 1)
            codes, zero = codes - 8, q.zero.float() - 8
        scale, outer = q.scales[0].float(), None
        if fmt.is_two_level:
            outer = 1.0 / q.scales[1].reshape(1)
        theirs = forward.dequantize(codes, scale, zero, QuantizationArgs(**kwargs), dtype=torch.float32, global_scale=outer)
        ours = q.dequantize()
        if fmt.is_two_level:  # theirs divides by the reciprocal of our global scale: one rounding more
            assert torch.allclose(theirs, ours, rtol=3e-7, atol=0)
        else:
            assert torch.equal(theirs, ours), text


def test_scales_underflow_to_something_positive():
    assert law.quantize(torch.full((4, 64), 1e-12), parse("i4[64]*f16")).scales[0].gt(0).all()
    assert law.quantize(torch.full((4, 64), 1e-44), parse("e4m3[...]*f32")).scales[0].gt(0).all()
    x = torch.randn(4, 64)
    x[0] *= 1e-9
    assert law.quantize(x, parse("e2m1[16]*e4m3[...]*f32")).scales[0].float().min() == 2.0**-9


def test_wrong_ranges_are_refused_with_the_shapes():
    with pytest.raises(ShapeError, match=r"scales of shape \(4, 1\).*amax has \(3,\)"):
        law.fake_quantize(torch.randn(4, 8), parse("i8[1,...]*f32"), amax=torch.ones(3))
    with pytest.raises(ShapeError, match="one element"):
        law.fake_quantize(torch.randn(4, 16), parse("e2m1[16]*e4m3[...]*f32"), torch.ones(4), torch.ones(2))
    with pytest.raises(FormatError, match="floating-point"):
        law.fake_quantize(torch.ones(4, dtype=torch.int32), parse("i8[...]*f32"))
