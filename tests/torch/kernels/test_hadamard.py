"""The Walsh-Hadamard transform: Paley's matrices, law and kernel, inverse, gradient, compile and export, fused with rounding."""

from __future__ import annotations

import math

import pytest
import torch

from modelopt.core.errors import FormatError, ShapeError
from modelopt.numerics import parse
from modelopt.numerics import reference as law
from modelopt.torch import kernels
from modelopt.torch.kernels.hadamard import matrices, reference

SIZES = (1, 2, 16, 64, 256, 24, 12, 20, 28, 40, 112)


def on_gpu(test):
    """Mark a test for a CUDA device."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: Triton kernels run on one only")
    return pytest.mark.gpu(skip(test))


def dense(size: int) -> torch.Tensor:
    """H of a size, float64, built from its definition."""
    m, power = matrices.factors(size)
    i = torch.arange(power)
    ones = sum(((i[:, None] & i[None, :]) >> bit) & 1 for bit in range(15))
    sylvester = 1.0 - 2.0 * (ones % 2)
    return torch.kron(matrices.matrix(m) if m > 1 else torch.ones(1, 1), sylvester).double()


@pytest.mark.parametrize("order", matrices.ORDERS)
def test_paley_matrices_are_hadamard(order):
    h = matrices.matrix(order)
    assert set(h.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(h @ h.T, order * torch.eye(order))


@pytest.mark.parametrize("size", SIZES)
def test_law_equals_the_matrix_and_the_inverse_undoes_it(size):
    x = torch.randn(3, 2, 2 * size)
    signs = torch.randint(0, 2, (size,)) * 2.0 - 1
    y = kernels.hadamard(x, size, signs)
    expected = (x.double().reshape(-1, size) * signs) @ dense(size).T / math.sqrt(size)
    assert torch.allclose(y.double().reshape(-1, size), expected, atol=2e-6)
    assert torch.allclose(kernels.hadamard(y, size, signs, inverse=True), x, atol=2e-6)


def test_gradient_is_the_inverse_and_what_does_not_fit_is_refused():
    x = torch.randn(4, 48, requires_grad=True)
    signs = torch.randint(0, 2, (24,)) * 2.0 - 1
    grad = torch.randn(4, 48)
    kernels.hadamard(x, 24, signs).backward(grad)
    assert torch.equal(x.grad, kernels.hadamard(grad, 24, signs, inverse=True))
    torch.library.opcheck(torch.ops.modelopt.hadamard.default, (x, 24, signs, False))
    with pytest.raises(ShapeError, match="36"):
        kernels.hadamard(torch.randn(2, 36))
    with pytest.raises(ShapeError, match="divide"):
        kernels.hadamard(torch.randn(2, 36), 8)
    with pytest.raises(ShapeError, match="signs"):
        kernels.hadamard(torch.randn(2, 16), 8, torch.ones(16))
    with pytest.raises(FormatError):
        kernels.hadamard(torch.ones(2, 16, dtype=torch.int32))
    assert kernels.hadamard(torch.randn(0, 16)).shape == (0, 16)


def test_rotated_ops_are_the_two_steps():
    x = torch.randn(8, 64, requires_grad=True)
    y = kernels.rotated_fake_quantize(x, 32, "e2m1[32]~*e8m0")
    assert torch.equal(y, kernels.fake_quantize(kernels.hadamard(x, 32), "e2m1[32]~*e8m0"))
    grad = torch.randn(8, 64)
    y.backward(grad)
    assert torch.equal(x.grad, kernels.hadamard(grad, 32, inverse=True))
    parts = kernels.rotated_quantize(x.detach(), 16, "i4[32]*f32")
    for a, b in zip(parts, kernels.quantize(kernels.hadamard(x.detach(), 16), "i4[32]*f32"), strict=True):
        assert torch.equal(a, b)
    torch.library.opcheck(torch.ops.modelopt.rotated_fake_quantize.default, (x, 32, "i4[32]*f32"))
    torch.library.opcheck(torch.ops.modelopt.rotated_quantize.default, (x.detach(), 32, "i4[32]*f32"))


def test_compiles_in_one_graph_and_exports_as_one_node():
    class Step(torch.nn.Module):
        def forward(self, x):
            return kernels.hadamard(x * 2, 16) + 1

    x = torch.randn(8, 64)
    assert torch.equal(torch.compile(Step(), fullgraph=True, backend="aot_eager")(x), Step()(x))
    program = torch.export.export(Step(), (x,), strict=False)
    assert len([n for n in program.graph.nodes if "modelopt.hadamard" in str(n.target)]) == 1


@on_gpu
@pytest.mark.parametrize(
    "size", [2, 16, 32, 128, 256, 512, 1024, 4096, 8192, 16384, 32768, 12, 24, 96, 12288, 20, 5120, 28, 14336, 28672]
)
def test_kernel_equals_the_law(size):
    """Bit for bit for powers of two; else within the float32 rounding of m sums (a bfloat16 result: one step of it)."""
    x = torch.randn(40 if size < 32 else 37, 2 * size if size < 512 else size, device="cuda")
    signs = torch.randint(0, 2, (size,), device="cuda") * 2.0 - 1
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for inverse in (False, True):
            y = kernels.hadamard(x.to(dtype), size, signs, inverse=inverse)
            expected = reference.hadamard(x.to(dtype), size, signs, inverse)
            if matrices.factors(size)[0] == 1:
                assert torch.equal(y, expected)
            else:
                step = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
                assert torch.allclose(y.float(), expected.float(), rtol=step, atol=4e-6)


@on_gpu
@pytest.mark.parametrize("size", [16, 256, 1024, 4096, 24])
def test_kernel_takes_any_tensor(size):
    """Slices, tensors that are not contiguous or not aligned, infinities and NaN, a single block."""
    x = torch.randn(31, 3, 4 * size, device="cuda", dtype=torch.bfloat16)
    x[3, 1, 5], x[4, 2, 7] = float("inf"), float("nan")
    for part in (x[:, 1], x.transpose(0, 1), x[1:2, 0, :size], x.flatten()[size + 1 : 4 * size + 1], x[..., ::2]):
        y, expected = kernels.hadamard(part, size).float(), reference.hadamard(part, size).float()
        if size == 24:
            assert torch.allclose(y, expected, rtol=2**-7, atol=4e-6, equal_nan=True)
        else:
            assert torch.equal(y.nan_to_num(nan=7e30), expected.nan_to_num(nan=7e30))


@on_gpu
@pytest.mark.parametrize("size", [128, 2048])
def test_more_than_two_to_the_31_elements(size):
    x = torch.zeros(2**31 + 8 * size, device="cuda", dtype=torch.bfloat16)
    x[-size:] = torch.randn(size, device="cuda")
    y = kernels.hadamard(x, size)
    assert torch.equal(y[-size:], reference.hadamard(x[-size:], size)) and not y[:-size].any()


FUSED = ["i4[128]*f32", "i8[...]*f32", "i8[1,...]*f32", "e2m1[16]~*e4m3[...]*f32", "e2m1[16]*e4m3[...]*f32", "e2m1[32]~*e8m0"]
FUSED += [
    "e2m1[32]~*e8m0:floor",
    "e4m3[32]~*e8m0:nearest",
    "e4m3[-1]~*f32",
    "i8[-1]~*f32",
    "e3m2[32]~*e8m0",
    "i4[64]~*f32",
    "e4m3[128]*f32",
]

FUSED_SIZES = {torch.bfloat16: ((16, 1120), (256, 4096)), torch.float16: ((2, 1024), (128, 3072)), torch.float32: ((64, 14336),)}


def spread_out(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Random rows, among them zeros, tiny and large ones."""
    x = torch.randn(rows, width, device="cuda")
    x[0] = 0
    x[2] *= 1e-38
    x[3] *= 1e3 if dtype == torch.float16 else 1e34
    return x.to(dtype)


@on_gpu
@pytest.mark.parametrize("text", FUSED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fused_kernel_equals_the_two_steps(text, dtype):
    fmt = parse(text)
    for size, width in FUSED_SIZES[dtype]:
        x = spread_out(29, width, dtype)
        y = reference.hadamard(x, size)
        if fmt.why_not(x.shape) is not None:
            continue
        given = {"global_amax": law.global_amax(y) * 0.7} if fmt.needs_global else {}
        given |= {} if fmt.dynamic else {"amax": law.block_amax(y, fmt) * 0.7}
        for ranges in (given, {k: v for k, v in given.items() if k != "amax"}):
            for a, b in zip(kernels.rotated_quantize(x, size, text, **ranges), law.quantize(y, fmt, **ranges).parts, strict=True):
                assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
            x[1, 5], x[4, 7] = float("inf"), float("nan")
            values = kernels.rotated_fake_quantize(x, size, text, **ranges).float()
            expected = law.fake_quantize(reference.hadamard(x, size), fmt, **ranges).float()
            assert torch.equal(values.nan_to_num(nan=7e30), expected.nan_to_num(nan=7e30))
            x[1, 5], x[4, 7] = 0.5, 0.5
            y = reference.hadamard(x, size)
