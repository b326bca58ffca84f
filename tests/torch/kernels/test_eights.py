"""Codes times codes for up to 128 rows: configurations fit the machine; each way of dealing the work gives the law's product."""

from __future__ import annotations

import dataclasses
import math
import types

import pytest
import torch

from modelopt.numerics import parse
from modelopt.numerics import reference as law
from modelopt.torch import kernels
from modelopt.torch.kernels.matmul import locks, tables
from modelopt.torch.kernels.matmul.plan import Plan, plan

PAIRS = {  # weight, input, (XKIND, XRANGE), range of x
    "fp8 static": ("e4m3[...]*f32", "e4m3[...]*f32", (1, 0), 4.0),
    "fp8 token": ("e4m3[1,...]*f32", "e4m3[-1]~*f32", (1, 1), None),
    "int8 static": ("i8[1,...]*f32", "i8[...]*f32", (2, 0), 4.0),
    "int8 token": ("i8[1,...]*f32", "i8[-1]~*f32", (2, 1), None),
}
SHAPES = (
    (14336, 4096),
    (4096, 14336),
    (10240, 8192),
    (1024, 4096),
    (576, 1536),
    (64, 640),
    (328, 1024),
    (28672, 8192),
    (8192, 28672),
)
MEMORY = (227 << 10, 228 << 10)
WAYS = [  # blocks: 0 one for a tile, -2 two, else their number
    tables.Eights(2, 128, 1, 3, 2, 1, 0),
    tables.Eights(4, 104, 1, 3, 3, 1, 5),
    tables.Eights(8, 64, 1, 4, 2, 2, 0),
    tables.Eights(2, 32, 2, 2, 1, 2, -2),
    tables.Eights(16, 72, 1, 3, 2, 1, -3),
    tables.Eights(1, 112, 2, 5, 3, 1, 7),
]


def way_for(way: tables.Eights, n: int) -> tables.Eights:
    """Return `way` with its blocks for `n` rows of W."""
    return way if way.blocks > 0 else dataclasses.replace(way, blocks=math.ceil(n / way.ROWS) * max(-way.blocks, 1))


def read_of(text: str, n: int, k: int) -> Plan:
    read = plan(parse(text), n, k)
    assert isinstance(read, Plan)
    return read


@pytest.mark.parametrize("name", PAIRS)
def test_configurations_fit_the_machine(name):
    from modelopt.torch.kernels.matmul import eights

    text, _, quantizer, _ = PAIRS[name]
    for n, k in SHAPES:
        read = read_of(text, n, k)
        for m in (2, 8, 9, 16, 33, 64, 100, 128):
            c = eights.choose(m, n, k, 132, MEMORY)
            assert c is not None and 8 * c.NT >= m
            launch = eights.planned(read, n, k, False, quantizer, c)
            assert launch.shared <= MEMORY[0] - 2048 and launch.grid <= 132 and c.DEPTH <= 32 and c.ROWS % 8 == 0
            assert c.PAIR == 1 or (c.NT % 2 == 0 and c.blocks % math.ceil(n / c.ROWS) == 0)
        assert eights.choose(129, n, k, 132, MEMORY) is None


def test_every_step_belongs_to_one_block():
    """The dealing of steps in `eights.cu`, and the number of parts of a tile, for which memory is kept."""
    from modelopt.torch.kernels.matmul import eights

    for n, k, blocks in ((1000, 1024, 7), (4096, 14336, 132), (300, 640, 25), (128, 4096, 13)):
        c = tables.Eights(2, 128, 1, 3, 2, 1, blocks)
        launch = eights.planned(read_of("e4m3[...]*f32", n, k), n, k, False, (1, 0), c)
        steps, tiles = math.ceil(k / 128), math.ceil(n / 128)
        units = tiles * steps
        blocks = min(blocks, units)
        assert launch.grid == blocks
        owners = [next(b for b in range(blocks) if (b + 1) * units // blocks > u) for u in range(units)]
        assert owners == [((u + 1) * blocks - 1) // units for u in range(units)]
        assert launch.most == max(owners[(t + 1) * steps - 1] - owners[t * steps] + 1 for t in range(tiles))


def inputs(name: str, m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16):
    """Return (x, parts of W, range, exact product with the law's codes)."""
    text, given, _, top = PAIRS[name]
    torch.manual_seed(m + n)
    parts = law.quantize(torch.randn(n, k, device="cuda", dtype=torch.bfloat16), parse(text)).parts
    x = torch.randn(m, k, device="cuda", dtype=dtype) * torch.rand(m, 1, device="cuda", dtype=dtype)
    amax = None if top is None else torch.tensor(top, device="cuda")
    values = law.dequantize(law.Quantized.from_parts(parts, parse(text), torch.Size((n, k)), torch.float32))
    return x, parts, amax, law.fake_quantize(x.float(), parse(given), amax).double() @ values.double().t()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_every_way_gives_the_product(name, way):
    from modelopt.torch.kernels.matmul import eights, skinny

    text, _, quantizer, _ = PAIRS[name]
    for n, k in ((328, 1024), (72, 160), (133, 4000)) if way.BOXES == 1 else ((328, 1024), (133, 4096)):
        c, read = way_for(way, n), read_of(text, n, k)
        bias = torch.randn(n, device="cuda", dtype=torch.bfloat16)
        for m in (1, 8 * way.NT - 3, 8 * way.NT):
            x, parts, amax, expected = inputs(name, m, n, k)
            post = skinny.scales_of(parts, read)[1]
            y = eights.product(x, parts[0], post, bias, n, read, c, quantizer, amax)
            assert relative(y, expected + bias.double()) < 3e-3, (m, n, k)
            for _ in range(3):  # in one order, every time
                assert torch.equal(y, eights.product(x, parts[0], post, bias, n, read, c, quantizer, amax))


@pytest.mark.gpu
@pytest.mark.parametrize("name", PAIRS)
def test_float16_and_values_that_are_not_finite(name):
    from modelopt.torch.kernels.matmul import eights, skinny

    (text, given, quantizer, _), n, k = PAIRS[name], 328, 1024
    read = read_of(text, n, k)
    c = way_for(WAYS[0], n)
    x, parts, amax, expected = inputs(name, 13, n, k, torch.float16)
    post = skinny.scales_of(parts, read)[1]
    y = eights.product(x, parts[0], post, None, n, read, c, quantizer, amax)
    assert y.dtype == torch.float16 and relative(y, expected) < (1e-3 if quantizer[0] == 2 else 2e-3)
    x[1], x[2, 5], x[3, 7], x[4] = 0.0, float("inf"), float("nan"), 6e-8
    y = eights.product(x, parts[0], post, None, n, read, c, quantizer, amax)
    law_x = law.fake_quantize(x.float(), parse(given), amax).double()
    values = law.dequantize(law.Quantized.from_parts(parts, parse(text), torch.Size((n, k)), torch.float32)).double()
    expected = law_x @ values.t()
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert not y[1].any() and relative(y[expected.isfinite()], expected[expected.isfinite()]) < 3e-3


@pytest.mark.gpu
@pytest.mark.parametrize("name", [p for p in PAIRS if p.startswith("int8")])
def test_int8_sums_are_exact(name):
    from modelopt.torch.kernels.matmul import eights, skinny

    text, given, quantizer, _ = PAIRS[name]
    for n, k in ((328, 16384), (256, 4096)):
        read = read_of(text, n, k)
        for way in WAYS:
            x, parts, amax, _ = inputs(name, 8 * way.NT, n, k)
            codes, sx = kernels.quantize(x, given, amax)
            post = skinny.scales_of(parts, read)[1]
            sums = codes.view(torch.int8).double() @ parts[0].reshape(n, k).view(torch.int8).double().t()
            expected = sums.float() * sx.reshape(-1, 1) * post.reshape(1, -1)
            y = eights.product(x, parts[0], post, None, n, read, way_for(way, n), quantizer, amax)
            assert torch.equal(y, expected.to(torch.bfloat16)), way


@pytest.mark.gpu
@pytest.mark.parametrize("name", PAIRS)
def test_the_op_chooses_it(name):
    text, given, _, _ = PAIRS[name]
    for n, k in ((4096, 2048), (600, 8192)):
        x, parts, amax, expected = inputs(name, 48, n, k)
        assert kernels.explain_linear(x, parts, text, n, given) == "eights"
        strided = torch.stack([x, -x], -1)[..., 0].reshape(3, 16, k)
        assert not strided.is_contiguous()
        bias = torch.randn(n, device="cuda", dtype=x.dtype)
        y = kernels.quantized_linear(strided, parts, text, n, bias, given, amax)
        assert y.shape == (3, 16, n) and relative(y.reshape(48, n), expected + bias.double()) < 3e-3
        assert kernels.quantized_linear(x[:0], parts, text, n, bias, given, amax).shape == (0, n)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PAIRS)
def test_streams_and_graphs(name):
    (text, given, _, _), n = PAIRS[name], 4096
    for m in (16, 64):
        x, parts, amax, _ = inputs(name, m, n, n)
        expected = x
        for _ in range(3):  # a chain: each launch may start while the one ahead ends
            expected = kernels.quantized_linear(expected, parts, text, n, None, given, amax) / 64
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = x
            for _ in range(3):
                out = kernels.quantized_linear(out, parts, text, n, None, given, amax) / 64
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fp8 static", "int8 token"])
def test_a_weight_may_be_written_right_ahead(name):
    """W is fetched before the kernels ahead have ended only if they cannot have written it."""
    (text, given, _, _), n, k = PAIRS[name], 4096, 4096
    banks = [inputs(name, 16, n + i, k)[1:3] for i in range(3)]
    banks = [([p[0][:n].contiguous(), *(s[:n] if s.numel() > 1 else s for s in p[1:])], amax) for p, amax in banks]
    x = torch.randn(16, k, device="cuda", dtype=torch.bfloat16)
    expected = [kernels.quantized_linear(x, parts, text, n, None, given, amax) for parts, amax in banks]
    assert len({y.double().sum().item() for y in expected}) == 3
    live = [p.clone() for p in banks[0][0]]

    def chain() -> list[tuple[int, torch.Tensor]]:
        results = []
        for i in range(24):
            for part, new in zip(live, banks[i % 3][0], strict=True):
                part.copy_(new)
            for _ in range(1 + i % 2):  # the second one of two follows a product
                results.append((i % 3, kernels.quantized_linear(x, live, text, n, None, given, banks[0][1])))
        return results

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        assert all(torch.equal(y, expected[i]) for i, y in chain())
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            results = chain()
    for _ in range(5):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(y, expected[i]) for i, y in results)


def test_what_captured_calls_share_is_made_before_any_capture(monkeypatch):
    stream = types.SimpleNamespace(cuda_stream=7, synchronize=lambda: None)
    captured: dict[str, bool] = {"now": False}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured["now"])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(locks.cuda, "capture", lambda handle: 3)
    for name in ("_streams", "_captured", "_gates"):
        monkeypatch.setattr(locks, name, {})
    device = torch.device("cpu")
    own = locks.gate(device)
    assert own is locks.gate(device) and own.tolist() == [0, 0]
    captured["now"] = True
    first = locks.gate(device)
    assert first is locks.gate(device) and first.data_ptr() != own.data_ptr()
    assert first.untyped_storage().data_ptr() == locks._captured[device][0].untyped_storage().data_ptr()
