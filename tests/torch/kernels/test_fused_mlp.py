"""fp8_mlp: the law on any device, the kernels against it on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from modelopt.core.errors import ConfigError, ShapeError
from modelopt.torch import kernels
from modelopt.torch.kernels import fused_mlp

STATIC, TOKEN, CHANNEL = "e4m3[...]*f32", "e4m3[-1]~*f32", "e4m3[1,...]*f32"
ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def layers(k: int, n: int, gated: bool, weight: str = STATIC, device: str = "cpu", dtype: torch.dtype = torch.bfloat16):
    """Weights (parts and values) and biases of first, up, second."""
    torch.manual_seed(0)
    shapes = [(n, k), *([(n, k)] if gated else []), (k, n)]
    parts = [kernels.quantize(torch.randn(s, device=device) * 0.05, weight) for s in shapes]
    values = [kernels.dequantize(p, weight, s, dtype) for p, s in zip(parts, shapes, strict=True)]
    return [t for p in parts for t in p], values, [torch.randn(s[0], device=device, dtype=dtype) for s in shapes]


def unfused(x, values, biases, activation, text, top, hidden):
    q = kernels.fake_quantize(x, text, top)
    h = ACTIVATIONS[activation](F.linear(q, values[0], biases[0]))
    if len(values) == 3:
        h = h * F.linear(q, values[1], biases[1])
    return F.linear(kernels.fake_quantize(h, STATIC, hidden), values[-1], biases[-1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("text", "weight"), [(STATIC, STATIC), (TOKEN, CHANNEL)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_modules_one_after_the_other(activation, gated, text, weight, dtype):
    weights, values, biases = layers(64, 96, gated, weight, dtype=dtype)
    x, hidden = torch.randn(2, 5, 64, dtype=dtype), torch.tensor(2.5)
    top = torch.tensor(3.0) if text == STATIC else None
    expected = unfused(x, values, biases, activation, text, top, hidden)
    assert torch.equal(fused_mlp.fp8_mlp(x, weights, biases, activation, text, top, hidden), expected)


def test_graph_and_reasons():
    weights, _, biases = layers(32, 48, True)
    x, top = torch.randn(3, 32, dtype=torch.bfloat16), torch.tensor(3.0)
    operation = torch.ops.modelopt.fp8_mlp.default
    torch.library.opcheck(
        operation, (x, weights, biases, "silu", STATIC, top, top), test_utils=["test_schema", "test_faketensor"]
    )
    assert fused_mlp.explain_mlp(x, weights) == "reference: the tensor is on cpu"
    with pytest.raises(ConfigError, match="relu, gelu"):
        fused_mlp.fp8_mlp(x, weights, biases, "tanh", STATIC, top, top)
    with pytest.raises(ConfigError, match="input format"):
        fused_mlp.fp8_mlp(x, weights, biases, "relu", "i8[...]*f32", top, top)
    with pytest.raises(ShapeError, match="two or three"):
        fused_mlp.fp8_mlp(x, weights[:2], biases[:1], "relu", STATIC, top, top)
    with pytest.raises(ShapeError, match="follow"):
        fused_mlp.fp8_mlp(x, weights[:4], biases[:2], "relu", STATIC, top, top)


def test_every_size_has_a_tile():
    from modelopt.torch.kernels.fused_mlp import tables

    for m in (1, 16, 64, 65, 1024, 4096, 100_000):
        for gated in (False, True):
            assert tables.route(m, gated) in ("pass", "epilogue")
            c = tables.choose(m, 14336, gated)
            shared = c.stages * c.BK * (c.BM + c.BN * (2 if gated else 1)) + c.BM * c.BN
            assert shared <= 227 * 1024 and c.BM % 64 == 0


def steps_apart(a: torch.Tensor, b: torch.Tensor) -> tuple[int, float]:
    """The largest distance of E4M3 codes in steps, and the share of codes that differ."""
    ordered = [torch.where(c < 128, c, 128 - c) for c in (t.view(torch.uint8).int() for t in (a, b))]
    apart = (ordered[0] - ordered[1]).abs()
    return int(apart.max()), (apart > 0).float().mean().item()


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_the_pass_rounds_as_the_modules_do(activation, gated):
    from modelopt.torch.kernels.fused_mlp.triton import activate_quantize

    torch.manual_seed(0)
    every = torch.arange(65536, dtype=torch.int32, device="cuda").to(torch.int16).view(torch.bfloat16)
    for a in (torch.randn(333, 1040, device="cuda", dtype=torch.bfloat16) * 3, every[every.isfinite()].reshape(-1, 16)):
        b = torch.randn_like(a) if gated else None
        for top in (1.0, 2.75, 448.0):
            amax = torch.tensor(top, device="cuda")
            h = ACTIVATIONS[activation](a) * (b if gated else 1.0)
            codes, scale = activate_quantize(a, b, activation, amax)
            expected = kernels.quantize(h, STATIC, amax)
            finite = h.isfinite()
            far, share = steps_apart(codes[finite], expected[0].reshape(h.shape)[finite])
            assert scale.item() == expected[1].item()
            assert (far, share) == (0, 0.0) if activation == "relu" else (far <= 1 and share < 2e-3), (far, share)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["pass", "epilogue"])
@pytest.mark.parametrize(("text", "weight"), [(STATIC, STATIC), (TOKEN, CHANNEL)])
@pytest.mark.parametrize(("activation", "gated"), [("relu", False), ("gelu", False), ("gelu_tanh", False), ("silu", True)])
def test_kernels_multiply_what_the_law_says(how, text, weight, activation, gated):
    from modelopt.torch.kernels.fused_mlp.triton import fp8_mlp

    for m, k, n in ((3, 256, 512), (64, 1024, 768), (200, 512, 1296), (1000, 1024, 2048)):
        weights, values, biases = layers(k, n, gated, weight, "cuda", torch.float32)
        biases = [b.to(torch.bfloat16) for b in biases]
        for given in (biases, [None] * len(biases)):
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            top, hidden = torch.tensor(3.0, device="cuda"), torch.tensor(4.0, device="cuda")
            top = top if text == STATIC else None
            got = fp8_mlp(x, weights, given, activation, text, top, hidden, how)
            wide = [v.double() for v in values], [None if b is None else b.double() for b in given]
            expected = unfused(x.double(), *wide, activation, text, top, hidden)
            rough = unfused(x, [v.to(torch.bfloat16) for v in values], given, activation, text, top, hidden)
            error, usual = ((t.double() - expected).norm() / expected.norm() for t in (got, rough))
            # both differ by codes of the intermediate one step apart; torch's fast FP8 sums make them about twice as many
            assert got.dtype == torch.bfloat16 and error < 2 * usual + 2e-3, (m, error, usual)


@pytest.mark.gpu
def test_odd_inputs_and_a_captured_graph():
    weights, values, biases = layers(256, 512, True, device="cuda")
    top = torch.tensor(3.0, device="cuda")
    x = torch.randn(2, 7, 512, device="cuda", dtype=torch.bfloat16)[..., ::2]  # not contiguous
    got = fused_mlp.fp8_mlp(x, weights, biases, "silu", STATIC, top, top)
    assert got.shape == (2, 7, 256) and fused_mlp.explain_mlp(x, weights) == "triton"
    assert torch.equal(got, fused_mlp.fp8_mlp(x.contiguous(), weights, biases, "silu", STATIC, top, top))
    assert fused_mlp.fp8_mlp(x[:0], weights, biases, "silu", STATIC, top, top).shape == (0, 7, 256)
    assert "float32" in fused_mlp.explain_mlp(x.float(), weights)
    fixed = x.contiguous()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused_mlp.fp8_mlp(fixed, weights, biases, "silu", STATIC, top, top)
    graph.replay()
    assert torch.equal(out, got)
