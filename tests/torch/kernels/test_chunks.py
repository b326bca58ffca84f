"""The law in chunks: the same bits as the whole, and never more than a chunk of float32 at once."""

from __future__ import annotations

import pytest
import torch

from modelopt.numerics import Quantized, packing, parse
from modelopt.numerics import reference as law
from modelopt.torch import kernels
from modelopt.torch.kernels import chunks

SHAPES = [(700, 1000), (3, 40, 65), (1, 300000), (5,), (2, 1, 7, 9)]
ZERO_POINT = ["u4[64]*f16+u4", "u8[1,...]*f32+u8", "u8[...]*f32+u8", "i4[1,128]*bf16+i4"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fmt", ZERO_POINT)
def test_zero_point_ranges_are_read_in_chunks(fmt: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16() + 1
    if parse(fmt).why_not(shape):
        pytest.skip("the block names more dimensions than the tensor has")
    whole, seen = law.block_range, []
    wanted = whole(x, parse(fmt))
    monkeypatch.setattr(law, "block_range", lambda part, f: (seen.append(part.numel()), whole(part, f))[1])
    low, high = chunks.block_range(x, parse(fmt))
    assert torch.equal(low, wanted[0]) and torch.equal(high, wanted[1])
    assert max(seen) <= max(chunks.CHUNK, x.numel() // shape[0])


@pytest.mark.parametrize(
    "fmt", [*ZERO_POINT, "e3m2[32]~*e8m0", "e2m1[16]~*e4m3:fp8[...]*f32", "i3[1,...]*f32", "nf4[64]*i8[4]*f32"]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_parts_and_values_are_those_of_the_law(fmt: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    if parse(fmt).why_not(shape):
        pytest.skip("the block names more dimensions than the tensor has")
    wanted = law.quantize(x, parse(fmt))
    parts = kernels.quantize(x, fmt)
    assert all(
        torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in zip(parts, wanted.parts, strict=True)
    )
    assert torch.equal(kernels.dequantize(parts, fmt, shape, x.dtype), law.dequantize(wanted))


def test_dequantize_decodes_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(700, 1000)
    whole, seen = law.decode, []
    unpack = packing.unpack_bits
    monkeypatch.setattr(law, "decode", lambda codes, *rest: (seen.append(codes.numel()), whole(codes, *rest))[1])
    monkeypatch.setattr(packing, "unpack_bits", lambda p, bits, n: (seen.append(p.shape[0] * n), unpack(p, bits, n))[1])
    q = Quantized.from_parts(kernels.quantize(x, "e3m2[32]~*e8m0"), parse("e3m2[32]~*e8m0"), x.shape, x.dtype)
    chunks.chunked_values(q)
    assert len(seen) > 4 and max(seen) <= chunks.CHUNK
