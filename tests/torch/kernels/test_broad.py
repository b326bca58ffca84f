"""The kernel of some tens of rows: its configurations fit the machine; each way of dealing the work gives the law's product."""

from __future__ import annotations

import pytest
import torch

from modelopt.numerics import parse
from modelopt.numerics import reference as law
from modelopt.torch.kernels.matmul import tables
from modelopt.torch.kernels.matmul.plan import Plan, plan

FORMATS = ["i4[128]*f32", "i4[32]*f32", "i4[128]*bf16", "u4[128]*f16+u4", "u4[64]*f32+u4", "e2m1[16]~*e4m3[...]*f32"]
FORMATS += ["e2m1[32]~*e8m0", "i8[1,...]*f32", "i8[32]~*e8m0", "e4m3[...]*f32", "e4m3[128,128]*f32"]
SHAPES = ((14336, 4096), (4096, 14336), (10240, 8192), (1024, 4096), (576, 1536), (64, 640), (328, 1024))
WAYS = [
    tables.Broad(8, 2, 4, 1, True),
    tables.Broad(8, 2, 3, 3, True),
    tables.Broad(8, 1, 4, 2, False),
    tables.Broad(4, 2, 4, 1, True),
    tables.Broad(4, 1, 3, 1, True),
    tables.Broad(2, 1, 8, 2, True),
    tables.Broad(16, 2, 3, 2, False),
]


@pytest.mark.parametrize("text", FORMATS)
def test_configurations_fit_the_machine(text):
    from modelopt.torch.kernels.matmul import broad, skinny

    for n, k in SHAPES:
        read = plan(parse(text), n, k)
        assert isinstance(read, Plan)
        for m in (17, 32, 33, 64, 65, 128):
            c = broad.choose(read, m, n, k, 132, (227 << 10, 228 << 10))
            assert c is not None
            launch = broad.planned(read, m, n, k, False, skinny.type_of(read), k // read.group, (0, 0), c)
            assert launch.shared <= (227 << 10) - 2048 and launch.grid[0] * 64 * c.GROUPS - n < 64 * c.GROUPS


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


def check(text: str, m: int, n: int, k: int, way: tables.Broad, biased: bool, dtype=torch.bfloat16, bound: float = 4e-3) -> None:
    from modelopt.torch.kernels.matmul import broad, skinny

    torch.manual_seed(m + n)
    parts = law.quantize(torch.randn(n, k, device="cuda", dtype=torch.bfloat16), parse(text)).parts
    x, read = torch.randn(m, k, device="cuda", dtype=dtype), plan(parse(text), n, k)
    assert isinstance(read, Plan)
    scales, post = skinny.scales_of(parts, read)
    given = (x, parts[0], scales, parts[-1] if read.kind == "u4" else None, post)
    bias = torch.randn(n, device="cuda", dtype=dtype) if biased else None
    y = broad.product(*given, bias, n, read, way)
    values = law.dequantize(law.Quantized.from_parts(parts, parse(text), torch.Size((n, k)), torch.float32))
    expected = x.double() @ values.double().t() + (bias.double() if bias is not None else 0.0)
    assert y.dtype == dtype and relative(y, expected) < bound, (m, n, k)
    assert torch.equal(y, broad.product(*given, bias, n, read, way))  # in one order, every time


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("text", FORMATS)
def test_every_way_gives_the_product(text, way):
    for n, k in ((328, 1024), (72, 512), (1000, 2048)):  # an odd number of blocks, too; fewer steps than stages
        for m in (17, 8 * way.NT, 8 * way.NT + 5):
            check(text, m, n, k, way, biased=m != 17)


@pytest.mark.gpu
@pytest.mark.parametrize("text", ["i4[128]*f32", "u4[64]*f16+u4", "e4m3[...]*f32"])
def test_float16(text):
    for way in WAYS[:4]:
        check(text, 40, 328, 1024, way, biased=True, dtype=torch.float16, bound=1e-3)
