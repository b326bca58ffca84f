"""Block-scaled products: the layout of the scales, the operands that torch gets, and their product by emulation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from modelopt.core.errors import FormatError, ShapeError
from modelopt.numerics import parse
from modelopt.torch import kernels
from modelopt.torch.kernels import scaled_mm
from modelopt.torch.kernels.scaled_mm import layout, operands, reference

FORMATS = {"NVFP4": "e2m1[16]~*e4m3[...]*f32", "MXFP4": "e2m1[32]~*e8m0", "MXFP8": "e4m3[32]~*e8m0"}


def documented_offset(row: int, block: int, blocks: int) -> int:
    """The offset that cuBLAS documents for the scale of a row and a block: tiles of 128 x 4, row-major, 512 bytes each."""
    tile = row // 128 * -(-blocks // 4) + block // 4
    return tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + block % 4


@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (128, 4), (128, 8), (200, 5), (300, 12), (31, 3)])
def test_every_scale_lies_where_it_is_documented(rows, blocks):
    scales = torch.randint(1, 255, (rows, blocks), dtype=torch.uint8)
    flat = layout.swizzle_scales(scales)
    high, wide = layout.padded(rows, blocks)
    assert flat.shape == (high * wide,) and high % 128 == 0 and wide % 4 == 0
    for row in range(rows):
        for block in range(blocks):
            assert flat[documented_offset(row, block, blocks)] == scales[row, block]
    assert int((flat != 0).sum()) == rows * blocks  # the rest is padding
    assert torch.equal(layout.unswizzle_scales(flat, rows, blocks), scales)


def test_offsets_of_the_documentations_examples():
    scales = torch.zeros(128, 8, dtype=torch.uint8)  # NVFP4, 128 x 128
    scales[5, 2], scales[5, 5] = 1, 2
    flat = layout.swizzle_scales(scales)
    assert flat[82] == 1 and flat[593] == 2


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint8])
def test_dtypes_survive(dtype):
    scales = torch.randint(1, 120, (40, 6), dtype=torch.uint8).view(dtype)
    flat = scaled_mm.swizzle_scales(scales)
    back = scaled_mm.unswizzle_scales(flat, 40, 6)
    assert flat.dtype == back.dtype == dtype and torch.equal(back.view(torch.uint8), scales.view(torch.uint8))


def test_other_shapes_are_refused():
    with pytest.raises(ShapeError, match="one byte"):
        scaled_mm.swizzle_scales(torch.ones(4, 4))
    with pytest.raises(ShapeError, match="take 512 bytes"):
        scaled_mm.unswizzle_scales(torch.zeros(100, dtype=torch.uint8), 4, 4)


def pair(kind: str, m: int = 40, n: int = 48, k: int = 160) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None]:
    torch.manual_seed(0)
    x, w = torch.randn(m, k, dtype=torch.bfloat16), torch.randn(n, k, dtype=torch.bfloat16)
    amax = torch.tensor(4.5) if kind == "NVFP4" else None
    return x, kernels.quantize(w, FORMATS[kind]), amax


@pytest.mark.parametrize("kind", FORMATS)
def test_operands_are_what_torch_documents(kind):
    x, weight, amax = pair(kind)
    side = operands.operand(kernels.quantize(x, FORMATS[kind], amax), kind)
    size = 16 if kind == "NVFP4" else 32
    assert side.values.shape == (40, 160 if kind == "MXFP8" else 80)
    assert side.values.dtype == (torch.float8_e4m3fn if kind == "MXFP8" else torch.float4_e2m1fn_x2)
    assert side.scales[0].dtype == (torch.float8_e4m3fn if kind == "NVFP4" else torch.float8_e8m0fnu)
    assert side.scales[0].numel() == 128 * (-(-160 // size // 4) * 4) and side.scales[0].is_contiguous()
    assert len(side.scales) == len(side.recipes) == len(side.swizzles) == (2 if kind == "NVFP4" else 1)
    assert side.swizzles[0] == F.SwizzleType.SWIZZLE_32_4_4
    values = kernels.dequantize(kernels.quantize(x, FORMATS[kind], amax), FORMATS[kind], (40, 160), torch.float32)
    scaled = reference.values(side) * (side.scales[1] if kind == "NVFP4" else 1.0)
    assert torch.allclose(scaled, values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", FORMATS)
def test_torch_accepts_their_shapes(kind):
    x, weight, amax = pair(kind, k=128)  # torch's meta function counts the bytes of MXFP4 as columns; its CUDA code does not

    def meta(parts):
        side = operands.operand(parts, kind)
        return operands.Operand(kind, side.values.to("meta"), tuple(s.to("meta") for s in side.scales))

    y = scaled_mm.product(meta(kernels.quantize(x, FORMATS[kind], amax)), meta(weight), None, torch.bfloat16)
    assert y.shape == (40, 48) and y.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", FORMATS)
def test_the_product_of_the_operands_is_the_law(kind, monkeypatch):
    x, weight, amax = pair(kind)
    bias, fmt = torch.randn(48), parse(FORMATS[kind])
    seen = []

    def emulated(a, b, scale_a, recipe_a, scale_b, recipe_b, swizzle_a, swizzle_b, bias, dtype):
        seen.append((recipe_a, swizzle_b, bias))
        left, right = operands.Operand(kind, a, tuple(scale_a)), operands.Operand(kind, b.t(), tuple(scale_b))
        assert recipe_a == left.recipes and recipe_b == right.recipes and swizzle_a == left.swizzles
        return reference.product(left, right, bias, dtype)

    monkeypatch.setattr(F, "scaled_mm", emulated)
    y = scaled_mm.block_scaled_linear(x.reshape(2, 20, 160), weight, fmt, 48, bias, FORMATS[kind], amax)
    q = kernels.fake_quantize(x.float(), FORMATS[kind], amax)
    expected = F.linear(q, kernels.dequantize(weight, fmt, (48, 160), torch.float32), bias)
    assert y.shape == (2, 20, 48) and y.dtype == torch.bfloat16
    assert torch.allclose(y.reshape(40, 48).float(), expected, rtol=2**-7, atol=0.05)
    assert (seen[0][2] is None) == (kind == "MXFP4")  # torch's kernel for it takes no bias
    left, right = operands.operand(kernels.quantize(x, FORMATS[kind], amax), kind), operands.operand(weight, kind)
    exact = reference.product(left, right, bias, torch.float32)
    assert torch.allclose(exact, expected, rtol=1e-5, atol=1e-4)


def test_tiles_of_a_weight_are_kept_until_it_changes():
    _, weight, _ = pair("NVFP4")
    first = scaled_mm.tiles_of(weight[1])
    assert scaled_mm.tiles_of(weight[1]) is first
    weight[1].view(torch.uint8)[0, 0] = 7
    second = scaled_mm.tiles_of(weight[1])
    assert second is not first and int(second.view(torch.uint8)[0]) == 7


def test_why_it_does_not_serve():
    x, weight, _ = pair("NVFP4")
    fmt, text = parse(FORMATS["NVFP4"]), FORMATS["NVFP4"]
    assert scaled_mm.why_not(x, weight, fmt, 48, text) == "the tensor is on cpu"
    assert scaled_mm.why_not(x, weight, fmt, 48, "") == "the input is not quantized"
    assert "none of NVFP4" in scaled_mm.why_not(x, weight, fmt, 48, FORMATS["MXFP4"])
    assert "float32" in scaled_mm.why_not(x.float(), weight, fmt, 48, text)
    assert "multiples of 16 and 32" in scaled_mm.why_not(x, weight, fmt, 40, text)
    assert "empty" in scaled_mm.why_not(x[:0], weight, fmt, 48, text)
    with pytest.raises(FormatError):
        scaled_mm.block_scaled_linear(x, weight, parse("i4[32]*f32"), 48, None, text, None)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("e2m1[16]*e4m3[...]*f32", "NVFP4"),
        ("e2m1[16]*e4m3:46[...]*f32", "NVFP4"),
        ("e2m1[16]*e4m3", None),
        ("e2m1[32]~*e8m0:floor", "MXFP4"),
        ("e2m1[16]~*e8m0", None),
        ("e4m3[32]~*e8m0", "MXFP8"),
        ("e3m2[32]~*e8m0", None),
        ("e2m1[4,16]*e4m3[...]*f32", None),
        ("i8[32]~*e8m0", None),
    ],
)
def test_families(text, kind):
    assert operands.family(parse(text), 64, 128) == kind


def test_capable_hardware_takes_it_and_says_so(monkeypatch):
    """With a device that reports compute capability 10, `quantized_linear` goes to torch's product for each of the three."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    scaled_mm._unfit.cache_clear()
    try:
        device = torch.device("cuda", 0)
        assert all(scaled_mm._unfit(device, kind) is None for kind in FORMATS)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (12, 0))
        scaled_mm._unfit.cache_clear()
        assert scaled_mm._unfit(device, "NVFP4") is None and "10 only" in scaled_mm._unfit(device, "MXFP4")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        scaled_mm._unfit.cache_clear()
        assert "compute capability 9" in scaled_mm._unfit(device, "MXFP8")
    finally:
        scaled_mm._unfit.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FORMATS)
def test_dispatch_on_a_gpu(kind, monkeypatch):
    """On any GPU: `explain_linear` names the product where it serves, and the op then calls it, here with the emulation."""
    x, weight, amax = pair(kind)
    x, weight = x.cuda(), [p.cuda() for p in weight]
    amax = None if amax is None else amax.cuda()
    text = FORMATS[kind]
    capable = torch.cuda.get_device_capability()[0] >= 10
    assert (kernels.explain_linear(x, weight, text, 48, text) == "scaled_mm") == capable
    law = kernels.quantized_linear(x, weight, text, 48, None, text, amax)
    monkeypatch.setattr(scaled_mm, "_unfit", lambda device, kind: None)
    if not capable:
        monkeypatch.setattr(scaled_mm, "product", reference.product)
    assert kernels.explain_linear(x, weight, text, 48, text) == "scaled_mm"
    got = kernels.quantized_linear(x, weight, text, 48, None, text, amax)
    assert ((got - law).float().norm() / law.float().norm()).item() < 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("config", ["NVFP4_DEFAULT_CFG", "MXFP4_DEFAULT_CFG", "MXFP8_DEFAULT_CFG"])
def test_compressed_models_take_it(config, monkeypatch):
    """A compressed model with FP4 or MX activations goes to torch's product on capable hardware, and `explain` says so."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.backends import explain

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 128)).to("cuda", torch.bfloat16).eval()
    x = torch.randn(3, 70, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        mtq.compress(mtq.quantize(model, getattr(mtq, config), [x]))
        law = model(x)
        if torch.cuda.get_device_capability()[0] < 10:
            assert explain(model[0], x) != "scaled_mm"
            monkeypatch.setattr(scaled_mm, "_unfit", lambda device, kind: None)
            monkeypatch.setattr(scaled_mm, "product", reference.product)
        assert explain(model[0], x) == "scaled_mm"
        got = model(x)
    assert got.shape == law.shape and ((got - law).float().norm() / law.float().norm()).item() < 4e-3
