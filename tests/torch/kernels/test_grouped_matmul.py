"""quantized_grouped_linear: the law, its gradient and its graph on any device; the kernels against it on a GPU."""

from __future__ import annotations

import pytest
import torch

from modelopt.core.errors import ShapeError
from modelopt.numerics import parse
from modelopt.torch import kernels
from modelopt.torch.kernels.matmul.grouped import reference

FORMATS = [
    "i4[128]*f32",
    "i4[32]*bf16",
    "u4[64]*f16+u4",
    "e2m1[16]~*e4m3[...]*f32",
    "e2m1[32]~*e8m0",
    "i8[1,...]*f32",
    "e4m3[...]*f32",
]
OP = torch.ops.modelopt.quantized_grouped_linear.default


def stacked(experts: int, n: int, k: int, text: str, device: str = "cpu") -> list[torch.Tensor]:
    torch.manual_seed(0)
    matrices = [kernels.quantize(torch.randn(n, k, device=device) * (e + 1), text) for e in range(experts)]
    return [torch.stack(parts) for parts in zip(*matrices, strict=True)]


def matrices(parts: list[torch.Tensor], text: str, n: int, k: int) -> torch.Tensor:
    return torch.stack([kernels.dequantize([p[e] for p in parts], text, (n, k), torch.float32) for e in range(parts[0].shape[0])])


def offsets_of(counts: list[int], device: str = "cpu") -> torch.Tensor:
    return torch.tensor([0, *counts], device=device).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("text", FORMATS)
def test_every_row_meets_its_expert(text):
    parts, offsets, x, bias = stacked(3, 24, 256, text), offsets_of([2, 0, 3]), torch.randn(6, 256), torch.randn(3, 24)
    weight = matrices(parts, text, 24, 256)
    y = kernels.quantized_grouped_linear(x, offsets, parts, text, 24, bias)
    for row, e in enumerate((0, 0, 2, 2, 2)):
        assert torch.allclose(y[row], x[row] @ weight[e].t() + bias[e], rtol=1e-4, atol=1e-3)
    assert torch.equal(y[5], torch.zeros(24))
    assert kernels.explain_grouped(x, parts, text, 24) == "reference: the tensor is on cpu"


def test_gradient_graph_and_errors():
    parts, offsets = stacked(3, 24, 256, "i4[64]*f32"), offsets_of([2, 0, 3])
    x, bias = torch.randn(6, 256, requires_grad=True), torch.randn(3, 24, requires_grad=True)
    kernels.quantized_grouped_linear(x, offsets, parts, "i4[64]*f32", 24, bias, "i8[-1]~*f32").sum().backward()
    weight = matrices(parts, "i4[64]*f32", 24, 256)
    assert torch.allclose(x.grad[0], weight[0].sum(0), atol=1e-3) and torch.allclose(x.grad[4], weight[2].sum(0), atol=1e-3)
    assert torch.equal(x.grad[5], torch.zeros(256)) and torch.equal(bias.grad[:, 0], torch.tensor([2.0, 0.0, 3.0]))
    torch.library.opcheck(OP, (x.detach(), offsets, parts, "i4[64]*f32", 24, None, "", None))
    with pytest.raises(ShapeError, match="needs 3 weight"):
        kernels.quantized_grouped_linear(torch.randn(5, 128), offsets, parts, "i4[64]*f32", 24)
    with pytest.raises(ShapeError, match="int32 offsets"):
        kernels.quantized_grouped_linear(x, offsets.long(), parts, "i4[64]*f32", 24)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("text", [*FORMATS, "e4m3[128,128]*f32", "e4m3[1,...]*f32"])
def test_kernels_multiply_what_the_law_says(text, dtype):
    for n, k, experts in ((328, 1024, 5), (64, 640, 3), (512, 128, 1)):
        if "128,128" in text and n % 128:
            continue
        parts = stacked(experts, n, k, text, "cuda")
        bias = torch.randn(experts, n, device="cuda", dtype=dtype)
        for counts in ([1] * experts, [0] * (experts - 1) + [3], [7, 0, 300, 1, 40][:experts], [200] * experts):
            offsets = offsets_of(counts, "cuda")
            x = torch.randn(sum(counts) + 2, k, device="cuda", dtype=dtype)
            for given in ("", "e4m3[-1]~*f32", "i8[-1]~*f32"):
                name = kernels.explain_grouped(x, parts, text, n, given)
                assert not name.startswith("reference"), name
                want = reference(x.double().float(), offsets, parts, parse(text), n, bias.float(), given, None)
                got = kernels.quantized_grouped_linear(x, offsets, parts, text, n, bias, given)
                assert got.dtype == dtype and relative(got, want) < (6e-3 if dtype == torch.bfloat16 else 2e-3), (
                    n,
                    k,
                    counts,
                    given,
                    name,
                )
                assert torch.equal(got[sum(counts) :], torch.zeros_like(got[sum(counts) :]))
                assert torch.equal(got, kernels.quantized_grouped_linear(x, offsets, parts, text, n, bias, given))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", [*FORMATS, "e4m3[128,128]*f32", "e4m3[1,...]*f32", "i8[...]*f32"])
def test_decoded_matrices_are_the_law_s(text, dtype):
    from modelopt.torch.kernels.matmul import triton_decode

    for n, k in ((256, 640), (128, 1280)):
        parts, offsets = stacked(3, n, k, text, "cuda"), offsets_of([2, 0, 3], "cuda")
        assert triton_decode.why_not(parse(text), n, k, dtype) is None
        got = triton_decode.decoded(offsets, parts, parse(text), n, k, dtype)
        for e in (0, 2):
            assert torch.equal(got[e], kernels.dequantize([p[e] for p in parts], text, (n, k), dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("text", ["e2m1[16]~*e4m3[...]*f32", "e2m1[32]~*e8m0"])
def test_scales_that_are_no_numbers(text):
    from modelopt.torch.kernels.matmul import triton_decode

    parts, offsets = stacked(2, 256, 512, text, "cuda"), offsets_of([40, 40], "cuda")
    parts[1].view(torch.uint8)[0, 3, 2] = 0x7F if "e4m3" in text else 255
    got = triton_decode.decoded(offsets, parts, parse(text), 256, 512, torch.bfloat16)
    want = kernels.dequantize([p[0] for p in parts], text, (256, 512), torch.bfloat16)
    assert want.isnan().sum() == parse(text).block.sizes((256, 512))[-1]
    assert torch.equal(got[0].isnan(), want.isnan()) and torch.equal(got[0].nan_to_num(), want.nan_to_num())
    x = torch.randn(80, 512, device="cuda", dtype=torch.bfloat16)
    assert kernels.explain_grouped(x, parts, text, 256) == "tiles"
    y = kernels.quantized_grouped_linear(x, offsets, parts, text, 256)
    assert y[:40, 3].isnan().all() and y.isnan().sum() == 40


@pytest.mark.gpu
def test_paths_by_rows():
    parts = stacked(4, 256, 512, "e4m3[1,...]*f32", "cuda")
    for rows, given, path in ((8, "", "few"), (64, "", "tiles"), (4096, "", "dequantize"), (4096, "e4m3[-1]~*f32", "codes")):
        x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
        assert kernels.explain_grouped(x, parts, "e4m3[1,...]*f32", 256, given) == path
    x = torch.randn(4096, 512, device="cuda", dtype=torch.float16)
    assert kernels.explain_grouped(x, parts, "e4m3[1,...]*f32", 256) == "tiles"


@pytest.mark.gpu
def test_few_rows_of_many_experts():
    for text in ("i4[64]*f32", "e4m3[1,...]*f32"):
        parts = stacked(70, 64, 512, text, "cuda")
        for rows in ([], [69], [0, 33], [31, 32, 32, 63], list(range(5, 20))):
            counts = torch.bincount(torch.tensor(rows, dtype=torch.long), minlength=70).tolist()
            offsets, x = offsets_of(counts, "cuda"), torch.randn(len(rows) + 1, 512, device="cuda", dtype=torch.bfloat16)
            assert kernels.explain_grouped(x, parts, text, 64) == "few"
            want = reference(x.float(), offsets, parts, parse(text), 64, None, "", None)
            got = kernels.quantized_grouped_linear(x, offsets, parts, text, 64)
            assert torch.equal(got[len(rows) :], torch.zeros_like(got[len(rows) :]))
            assert not rows or relative(got, want) < 6e-3


@pytest.mark.gpu
def test_a_layer_of_experts_in_a_graph():
    """No step of the product needs the host, so one capture serves any routing."""
    text, experts = "i4[64]*f32", 4
    parts, x = stacked(experts, 256, 512, text, "cuda"), torch.randn(1000, 512, device="cuda", dtype=torch.bfloat16)
    offsets = offsets_of([250] * 4, "cuda")
    kernels.quantized_grouped_linear(x, offsets, parts, text, 256)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernels.quantized_grouped_linear(x, offsets, parts, text, 256)
    for counts in ([1000, 0, 0, 0], [1, 500, 0, 400], [0, 0, 0, 0]):
        offsets.copy_(offsets_of(counts, "cuda"))
        graph.replay()
        want = reference(x.float(), offsets, parts, parse(text), 256, None, "", None)
        assert (y.float() - want).norm() <= 6e-3 * want.norm()
