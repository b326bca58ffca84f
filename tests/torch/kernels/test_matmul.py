"""quantized_linear: the law, its gradient and its graph on any device; the kernels against it on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import modelopt.torch.quantization as mtq
from modelopt.core.errors import ShapeError
from modelopt.numerics import parse
from modelopt.numerics import reference as law
from modelopt.torch import kernels
from modelopt.torch.kernels.matmul import tables
from modelopt.torch.quantization.backends import find_kernel
from modelopt.torch.quantization.backends.packed_gemm import packed_linear

FORMATS = [
    "i4[128]*f32",
    "i4[64]*f32",
    "i4[32]*f32",
    "i4[128]*bf16",
    "u4[128]*f16+u4",
    "u4[64]*f32+u4",
    "u4[32]*f32+u4",
    "e2m1[16]~*e4m3[...]*f32",
    "e2m1[32]~*e4m3[...]*f32",
    "e2m1[32]~*e8m0",
    "i8[1,...]*f32",
    "i8[...]*f32",
    "i8[32]~*e8m0",
    "e4m3[...]*f32",
    "e4m3[1,...]*f32",
    "e4m3[128,128]*f32",
    "e4m3[32]~*e8m0",
]
INPUTS = ["", "e4m3[...]*f32", "e4m3[-1]~*f32", "i8[-1]~*f32", "e2m1[16]~*e4m3[...]*f32", "e2m1[32]~*e8m0", "e4m3[32]~*e8m0"]
OP = torch.ops.modelopt.quantized_linear.default


def packed(n: int, k: int, text: str, device: str = "cpu", seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return law.quantize(torch.randn(n, k, device=device, dtype=torch.bfloat16), parse(text)).parts


def values(parts: list[torch.Tensor], text: str, n: int, k: int) -> torch.Tensor:
    return law.dequantize(law.Quantized.from_parts(parts, parse(text), torch.Size((n, k)), torch.float32))


@pytest.mark.parametrize("text", FORMATS)
def test_it_is_linear_on_the_dequantized_weight(text):
    parts, x, bias = packed(24, 256, text), torch.randn(2, 3, 256), torch.randn(24)
    expected = F.linear(x, values(parts, text, 24, 256), bias)
    assert torch.equal(kernels.quantized_linear(x, parts, text, 24, bias), expected)
    assert kernels.explain_linear(x, parts, text, 24) == "reference: the tensor is on cpu"


@pytest.mark.parametrize("given", INPUTS[1:])
def test_the_input_is_quantized_first(given):
    parts, x, amax = packed(24, 256, "i8[1,...]*f32"), torch.randn(5, 256), torch.tensor(3.0)
    amax = None if parse(given).dynamic and not parse(given).needs_global else amax
    expected = F.linear(kernels.fake_quantize(x, given, amax), values(parts, "i8[1,...]*f32", 24, 256))
    assert torch.equal(kernels.quantized_linear(x, parts, "i8[1,...]*f32", 24, None, given, amax), expected)


def test_gradient_and_graph():
    parts, x = packed(24, 256, "i4[64]*f32"), torch.randn(5, 256, requires_grad=True)
    bias = torch.randn(24, requires_grad=True)
    kernels.quantized_linear(x, parts, "i4[64]*f32", 24, bias, "i8[-1]~*f32").sum().backward()
    assert torch.allclose(x.grad, values(parts, "i4[64]*f32", 24, 256).sum(0).expand(5, 256), atol=1e-4)
    assert torch.equal(bias.grad, torch.full((24,), 5.0))
    torch.library.opcheck(OP, (x.detach(), parts, "i4[64]*f32", 24, None, "", None))


def test_the_registry_offers_it():
    assert find_kernel("bfloat16", "i4[128]*f32", "bfloat16") is packed_linear
    assert find_kernel("e4m3[...]*f32", "e4m3[...]*f32", "bfloat16") is packed_linear


@pytest.mark.parametrize("scheme", ["INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", "INT8_DEFAULT_CFG"])
def test_a_module_gives_the_same_through_the_op(scheme):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(256, 48)).to(torch.bfloat16).eval(), torch.randn(3, 256, dtype=torch.bfloat16)
    mtq.compress(mtq.quantize(model, getattr(mtq, scheme), [x]))
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(packed_linear(x, model[0]), expected)
        model[0].input_quantizer.pre_quant_scale = torch.rand(256)
        assert torch.equal(packed_linear(x, model[0]), model(x))


SHAPES = ((14336, 4096), (4096, 14336), (8192, 28672), (1024, 4096), (4096, 4096), (48, 128), (64, 640), (328, 1024))


@pytest.mark.parametrize("text", FORMATS)
def test_configurations_fit_the_machine(text):
    from modelopt.torch.kernels.matmul import broad, one, skinny
    from modelopt.torch.kernels.matmul.plan import Plan, plan

    for n, k in SHAPES:
        read = plan(parse(text), n, k)
        assert isinstance(read, Plan)
        for block, whole in ((227 << 10, 228 << 10), (163 << 10, 164 << 10), (99 << 10, 100 << 10)):
            alone = one.choose(read, n, k, 132, (block, whole))
            if alone is not None:
                launch = one.planned(read, n, k, False, skinny.type_of(read), k // read.group, (0, 0), alone)
                assert launch.shared <= block - 1024 and launch.block <= 512
            assert alone is not None or k > 14336
            for m in (1, 2, 8, 9, 16):
                few = skinny.choose(read, m, n, k, 132, (block, whole))
                if few is not None:
                    launch = skinny.planned(read, m, n, k, False, skinny.type_of(read), k // read.group, (0, 0), 0, few)
                    assert launch.shared <= block - 1024 and launch.block <= 1024
                assert few is not None or m > 8 or k > 4096 or block < 200 << 10
            for m in (9, 17, 64, 100, 128):
                tens = broad.choose(read, m, n, k, 132, (block, whole))
                if tens is not None:
                    launch = broad.planned(read, m, n, k, False, skinny.type_of(read), k // read.group, (0, 0), tens)
                    assert launch.shared <= block - 1024
                assert tens is not None or block < 200 << 10


@pytest.mark.parametrize(("n", "k"), [(32, 64), (32, 256), (16, 128), (64, 128)])
def test_codes_of_another_weight_are_refused(n, k):
    parts = torch.ops.modelopt.quantize(torch.ones(32, 128), "i8[1,...]*f32")
    with pytest.raises(ShapeError, match="needs 1 weight"):
        kernels.quantized_linear(torch.ones(2, k), parts, "i8[1,...]*f32", n)


def test_columns_are_a_multiple_of_32():
    from modelopt.torch.kernels.matmul.plan import Plan, plan

    for text, k, ragged in (
        ("i4[64]*f32", 576, True),
        ("i4[64]*f32", 640, False),
        ("i4[128]*f32", 576, True),
        ("e4m3[128,128]*f32", 576, False),
        ("e2m1[32]~*e8m0", 96, True),
        ("e4m3[...]*f32", 96, True),
    ):
        read = plan(parse(text), 576, k)
        assert isinstance(read, Plan) and read.ragged == ragged
    for text, k in (("i4[64]*f32", 608), ("i4[16]*f32", 80), ("i8[1,...]*f32", 72)):
        assert isinstance(plan(parse(text), 576, k), str)


def test_scales_are_copied_in_the_largest_units_that_divide_them():
    from modelopt.torch.kernels.matmul import skinny
    from modelopt.torch.kernels.matmul.plan import Plan, plan

    read = plan(parse("i4[128]*f32"), 4096, 11008)  # 86 groups a row: rows of scales begin at multiples of 8 bytes
    assert isinstance(read, Plan)
    assert skinny.constants(read, False, 0, 86, (0, 0), True, [(0, 86)])["SVECTOR"] == 4
    assert skinny.constants(read, False, 0, 88, (0, 0), True, [(0, 44), (44, 88)])["SVECTOR"] == 16


def test_without_the_compiler_there_is_a_reason_and_an_error(monkeypatch):
    from modelopt.core.errors import MissingDependencyError
    from modelopt.torch.kernels.matmul import cuda, skinny

    monkeypatch.setattr(cuda, "_nvrtc", lambda: None)
    assert "libnvrtc" in str(cuda.why_not())
    with pytest.raises(MissingDependencyError, match="libnvrtc"):
        cuda.binary(skinny.source(), (), "sm_90a")


def test_a_thread_without_a_context_gets_one(monkeypatch):
    import ctypes

    from modelopt.core.errors import ModelOptError
    from modelopt.torch.kernels.matmul import cuda

    answers, asked = [201, 0, 201, 201], []
    driver = type("Driver", (), {"cuLaunchKernelEx": lambda self, *given: answers.pop(0)})()
    monkeypatch.setattr(cuda, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: asked.append(1))
    kernel = cuda.Kernel(ctypes.c_void_p(1), ctypes.c_void_p(1), True)
    kernel.launch((1, 1, 1), 32, 0, 0, (None, 1))
    assert len(asked) == 1
    with pytest.raises(ModelOptError, match="201"):
        kernel.launch((1, 1, 1), 32, 0, 0, (None, 1))


def test_a_device_that_the_compiler_does_not_know(monkeypatch):
    from modelopt.torch.kernels.matmul import cuda

    monkeypatch.setattr(cuda, "_nvrtc", lambda: object())
    monkeypatch.setattr(cuda, "_driver", lambda: object())
    monkeypatch.setattr(cuda, "_capabilities", lambda: frozenset({80, 90, 100}))
    for capability, reason in {(9, 0): None, (10, 3): "libnvrtc does not know compute capability 10.3"}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert cuda._unknown.__wrapped__(torch.device("cuda", 7)) == reason
    assert cuda.why_not() is None


def test_what_kernels_read_as_bytes_has_the_right_type_and_place(monkeypatch):
    from modelopt.torch.kernels.matmul import triton as kernel

    seen = []

    def packed(x, weight, fmt, n, bias, *rest):
        seen.append((x.data_ptr() % 16, bias))
        return x.new_zeros(x.shape[0], n)

    monkeypatch.setattr(kernel, "route", lambda *given: "few")
    monkeypatch.setattr(kernel, "_packed", packed)
    text, x = "i8[1,...]*f32", torch.ones(65, dtype=torch.bfloat16)[1:].reshape(1, 64)
    parts = law.quantize(torch.randn(32, 64), parse(text)).parts
    kernel.quantized_linear(x, parts, parse(text), 32, torch.ones(64, dtype=torch.bfloat16)[::2], "", None)
    assert seen[0][0] == 0 and seen[0][1].is_contiguous()
    with pytest.raises(RuntimeError):  # torch says that the types differ
        kernel.quantized_linear(x, parts, parse(text), 32, torch.ones(32), "", None)
    assert len(seen) == 1


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.gpu
@pytest.mark.parametrize("text", FORMATS)
def test_kernels_multiply_what_the_law_says(text):
    for n, k in ((328, 1024), (64, 640), (4096, 2048)):
        parts = packed(n, k, text, "cuda")
        weight, bias = values(parts, text, n, k).double(), torch.randn(n, device="cuda", dtype=torch.bfloat16)
        for m in (1, 3, 8, 13, 40, 64, 100, 200):
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            expected = x.double() @ weight.t()
            name = kernels.explain_linear(x, parts, text, n)
            assert name in ("few", "tens", "dequantize"), name
            assert name == "few" or m > 8 or (m > 4 and n * k >= 1 << 23), (n, k, m)
            for b in (None, bias):
                want = expected if b is None else expected + b.double()
                got = kernels.quantized_linear(x, parts, text, n, b)
                assert got.dtype == torch.bfloat16 and relative(got, want) < 4e-3, (n, k, m, name)
                assert torch.equal(got, kernels.quantized_linear(x, parts, text, n, b))  # in one order, every time


@pytest.mark.gpu
@pytest.mark.parametrize("text", [*FORMATS, "i4[256]*f32"])
def test_columns_that_end_within_a_step_or_a_block(text):
    from modelopt.torch.kernels.matmul.plan import plan

    for n, k in ((576, 576), (192, 576), (256, 640), (40, 96), (8, 32)):
        if isinstance(plan(parse(text), n, k), str):
            assert k == 96  # blocks of 64 and 96 columns
            continue
        parts = packed(n, k, text, "cuda")
        weight = values(parts, text, n, k).double()
        for m in (1, 2, 8, 9, 16, 40):
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            name = kernels.explain_linear(x, parts, text, n)
            assert m > 8 or name == "few", (n, k, m, name)
            got = kernels.quantized_linear(x, parts, text, n)
            assert relative(got, x.double() @ weight.t()) < 4e-3, (n, k, m, name)
            beside = torch.cat((x, torch.full_like(x, float("nan"))))  # what lies beyond the columns is not touched
            assert torch.equal(kernels.quantized_linear(beside[:m], parts, text, n), got)


@pytest.mark.gpu
@pytest.mark.parametrize("text", FORMATS)
def test_one_row_of_any_range(text):
    n, k = 328, 1024
    parts = packed(n, k, text, "cuda")
    weight = values(parts, text, n, k).double()
    for scale in (1e-37, 1e-20, 1.0, 1e20, 1e33):
        x = (torch.randn(1, k, device="cuda") * torch.logspace(-6, 0, k, device="cuda") * scale).to(torch.bfloat16)
        got = kernels.quantized_linear(x, parts, text, n)
        assert relative(got, x.double() @ weight.t()) < 4e-3, scale
    assert torch.equal(kernels.quantized_linear(torch.zeros_like(x), parts, text, n), torch.zeros_like(got))
    for bad in (float("nan"), float("inf")):
        x[0, 77] = bad
        assert not kernels.quantized_linear(x, parts, text, n).isfinite().any()


@pytest.mark.gpu
@pytest.mark.parametrize("given", INPUTS[1:])
@pytest.mark.parametrize(
    "text",
    [
        "e4m3[...]*f32",
        "e4m3[1,...]*f32",
        "i8[1,...]*f32",
        "i4[64]*f32",
        "e2m1[16]~*e4m3[...]*f32",
        "e2m1[32]~*e8m0",
    ],
)
def test_quantized_inputs(text, given):
    n, k = 512, 1024
    parts, amax = packed(n, k, text, "cuda"), torch.tensor(4.0, device="cuda")
    amax = None if parse(given).dynamic and not parse(given).needs_global else amax
    weight = values(parts, text, n, k).double()
    for m in (1, 16, 64, 256, 1000):
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        rounded = law.fake_quantize(x.float(), parse(given), amax)
        got = kernels.quantized_linear(x, parts, text, n, None, given, amax)
        assert relative(got, rounded.double() @ weight.t()) < 6e-3, (m, kernels.explain_linear(x, parts, text, n, given))


def test_tiles_of_codes_fit():
    for m in (1, 5, 16, 17, 64, 65, 128, 129, 256, 384, 400, 1024, 5000):
        for n, k in ((14336, 4096), (4096, 14336), (64, 64), (336, 16), (28672, 8192), (512, 131072)):
            c = tables.codes(m, n, k)
            assert c.splits <= max(k // c.BK, 1) and c.stages * (c.BM + c.BN) * c.BK <= 227 * 1024
            assert c.BM * c.BN <= 64 * 32 * c.warps * 2


@pytest.mark.gpu
def test_int8_sums_are_exact():
    from modelopt.torch.kernels.matmul.triton_codes import codes_product

    for m, n, k in ((256, 512, 1024), (100, 336, 4096), (1, 64, 64), (40, 336, 4096), (128, 256, 16384), (1000, 512, 256)):
        x, w = (torch.randint(-128, 128, (r, k), device="cuda", dtype=torch.int8) for r in (m, n))
        sx, sw = torch.rand(m, 1, device="cuda"), torch.rand(n, 1, device="cuda")
        bias = torch.randn(n, device="cuda", dtype=torch.bfloat16)
        sums = x.double() @ w.double().t()
        expected = (sums.float() * sx * sw.t() + bias.float()).to(torch.bfloat16)
        config = tables.codes(m, n, k)
        for c in (config, dataclasses.replace(config, splits=1)):
            got = codes_product(x, w, sx, sw, bias, c)
            assert torch.allclose(got.float(), expected.float(), rtol=8e-3, atol=1e-3 * k), (m, n, k, c)
        assert torch.equal(got, codes_product(x, w, sx, sw, bias, config))


@pytest.mark.gpu
@pytest.mark.parametrize("text", [f for f in FORMATS if "e8m0" not in f])
def test_float16(text):
    for n, k in ((328, 1024), (4096, 2048)):
        parts = packed(n, k, text, "cuda")
        weight = values(parts, text, n, k).double()
        for m in (1, 8, 16, 64, 200):
            x = torch.randn(m, k, device="cuda", dtype=torch.float16)
            name = kernels.explain_linear(x, parts, text, n)
            assert name in ("few", "tens", "dequantize"), name
            assert relative(kernels.quantized_linear(x, parts, text, n), x.double() @ weight.t()) < 1e-3, (n, k, m, name)


@pytest.mark.gpu
def test_what_has_to_be_dequantized():
    parts = packed(64, 256, "i4[32]*f32", "cuda")
    for x, reason in (
        (torch.randn(2, 256, device="cuda"), "float32"),
        (torch.randn(0, 256, device="cuda", dtype=torch.bfloat16), "empty"),
    ):
        named = kernels.explain_linear(x, parts, "i4[32]*f32", 64)
        assert named.startswith("dequantize: ") and reason in named
        expected = F.linear(x, values(parts, "i4[32]*f32", 64, 256).to(x.dtype))
        assert torch.allclose(kernels.quantized_linear(x, parts, "i4[32]*f32", 64), expected, rtol=1e-4, atol=1e-4)
    odd = packed(64, 80, "i4[16]*f32", "cuda")
    x = torch.randn(2, 80, device="cuda", dtype=torch.bfloat16)
    assert "K = 80" in kernels.explain_linear(x, odd, "i4[16]*f32", 64)
    expected = x.double() @ values(odd, "i4[16]*f32", 64, 80).double().t()
    assert relative(kernels.quantized_linear(x, odd, "i4[16]*f32", 64), expected) < 6e-3


@pytest.mark.gpu
def test_streams_and_graphs():
    parts = packed(4096, 4096, "i4[128]*f32", "cuda")
    for m in (1, 16, 64):
        x = torch.randn(m, 4096, device="cuda", dtype=torch.bfloat16)
        expected = x
        for _ in range(3):  # a chain: each launch may start while the one ahead ends
            expected = kernels.quantized_linear(expected, parts, "i4[128]*f32", 4096) / 64
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = x
            for _ in range(3):
                out = kernels.quantized_linear(out, parts, "i4[128]*f32", 4096) / 64
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", "INT8_DEFAULT_CFG"])
def test_compressed_models_use_it(scheme):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 256)).cuda().to(torch.bfloat16).eval()
    x = torch.randn(32, 512, device="cuda", dtype=torch.bfloat16)
    mtq.quantize(model, getattr(mtq, scheme), [x])
    with torch.no_grad():
        expected = model(x)
        mtq.compress(model)
        assert relative(model(x), expected.double()) < 3e-2  # a rounding apart, the next layer's input may take another code
        compiled = torch.compile(model, fullgraph=True)
        assert relative(compiled(x), expected.double()) < 3e-2
