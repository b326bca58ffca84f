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
