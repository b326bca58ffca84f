"""Every op against the law, opcheck, gradients, compile and export, for every kind of format."""

from __future__ import annotations

import pytest
import torch

from modelopt.core.errors import ConfigError
from modelopt.numerics import parse
from modelopt.numerics import reference as law
from modelopt.torch import kernels
from tests.numerics.test_reference import EVERY

SHAPES = [(), (1,), (7, 200), (3, 5, 64), (0, 4), (300, 1000), (1, 4, 5, 6)]
MAIN = [
    "i8[1,...]*f32",
    "i8[...]*f32",
    "i4[32]*f32",
    "e4m3[...]*f32",
    "e2m1[16]~*e4m3[...]*f32",
    "e4m3[32]~*e8m0",
    "u4[32]*f32+u4",
]


def ranges(text: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Ranges measured on other data, as a static quantizer would hold them."""
    fmt, other = parse(text), torch.randn_like(x)
    if fmt.dynamic:
        return {"amax": law.global_amax(other)} if fmt.needs_global else {}
    if fmt.zero is not None:
        lo, hi = law.block_range(other, fmt)
        return {"amax": hi, "amin": lo}
    given = {"amax": law.block_amax(other, fmt)}
    return given | ({"global_amax": law.global_amax(other)} if fmt.needs_global else {})


@pytest.mark.parametrize("text", EVERY)
def test_ops_equal_the_law_bit_for_bit(text):
    fmt = parse(text)
    for shape in SHAPES:
        if fmt.why_not(shape) is not None:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape, dtype=dtype)
            for given in ({}, ranges(text, x) if x.numel() else {}):
                expected = law.quantize(x, fmt, **given)
                parts = kernels.quantize(x, fmt, **given)
                for a, b in zip(parts, expected.parts, strict=True):
                    assert a.shape == b.shape and a.dtype == b.dtype
                    assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
                values = law.fake_quantize(x, fmt, **given)
                assert torch.equal(kernels.fake_quantize(x, fmt, **given), values)
                assert torch.equal(kernels.dequantize(parts, fmt, x.shape, dtype), values)
            assert torch.equal(kernels.amax(x, fmt), law.block_amax(x, fmt))


def test_views_and_empty_tensors():
    x = torch.randn(64, 48, 4).permute(1, 2, 0)
    for text in MAIN:
        assert torch.equal(kernels.fake_quantize(x, text), law.fake_quantize(x.contiguous(), parse(text)))
        assert kernels.fake_quantize(x[:0], text).shape == (0, 4, 64)


@pytest.mark.parametrize("text", MAIN)
def test_gradient_is_straight_through_or_clipped(text):
    x = torch.randn(8, 64, requires_grad=True)
    given = ranges(text, x.detach())
    grad = torch.randn(8, 64)
    kernels.fake_quantize(x, text, **given).backward(grad)
    assert torch.equal(x.grad, grad)
    x.grad = None
    small = {k: v / 4 for k, v in given.items()}
    kernels.fake_quantize(x, text, **small, clip_grad=True).backward(grad)
    fmt = parse(text)
    scales = law.find_scales(x.detach(), fmt, **small)
    unlimited = x.detach().reshape(8, -1)
    ends = [law.apply_scales(torch.full((8, 64), sign * 1e30), scales, fmt) for sign in (-1.0, 1.0)]
    inside = (unlimited >= ends[0]) & (unlimited <= ends[1])
    assert torch.equal(x.grad, torch.where(inside, grad, 0))
    assert given == {} or "e4m3[...]*f32" == text[9:] or not inside.all(), "the test must reach outside the range"


@pytest.mark.parametrize("text", ["i8[...]*f32", "e2m1[16]~*e4m3[...]*f32", "e2m1[32]~*e8m0", "u4[32]*f32+u4"])
def test_opcheck(text):
    x = torch.randn(8, 64, requires_grad=True)
    given = ranges(text, x.detach())
    arguments = (x, text, given.get("amax"), given.get("global_amax"), given.get("amin"), True)
    torch.library.opcheck(torch.ops.modelopt.fake_quantize.default, arguments)
    torch.library.opcheck(torch.ops.modelopt.quantize.default, (x.detach(), *arguments[1:5]))
    parts = kernels.quantize(x.detach(), text, **given)
    # opcheck's schema test multiplies every input, which torch cannot do in float8: the other tests run.
    float8 = any(p.dtype == torch.float8_e4m3fn for p in parts)
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic") if float8 else "ALL"
    torch.library.opcheck(torch.ops.modelopt.dequantize.default, (parts, text, [8, 64], torch.float32), test_utils=tests)
    torch.library.opcheck(torch.ops.modelopt.amax.default, (x.detach(), text))


@pytest.mark.parametrize("text", MAIN)
def test_compiles_in_one_graph_and_exports_as_one_node(text):
    x = torch.randn(8, 64)
    given = ranges(text, x)

    class Step(torch.nn.Module):
        def forward(self, x):
            return kernels.fake_quantize(x * 2, text, **given) + 1

    expected = Step()(x)
    assert torch.equal(torch.compile(Step(), fullgraph=True, backend="aot_eager")(x), expected)
    program = torch.export.export(Step(), (x,), strict=False)
    nodes = [n for n in program.graph.nodes if "modelopt.fake_quantize" in str(n.target)]
    assert len(nodes) == 1 and nodes[0].args[1] == text
    assert torch.equal(program.module()(x), expected)


@pytest.mark.slow
def test_one_graph_with_inductor():
    f = torch.compile(lambda x: kernels.fake_quantize(x.relu(), "e4m3[32]~*e8m0").sin(), fullgraph=True)
    x = torch.randn(4, 64)
    assert torch.allclose(f(x), law.fake_quantize(x.relu(), parse("e4m3[32]~*e8m0")).sin(), atol=1e-6)


def test_the_choice_of_kernel_is_explained_and_can_be_forced(monkeypatch):
    x = torch.randn(2, 2)
    assert kernels.explain(x, "i8[...]*f32")["amax"].startswith("reference: the tensor is on cpu")
    monkeypatch.setenv("MODELOPT_KERNELS", "reference")
    assert "MODELOPT_KERNELS" in kernels.explain(x, "i8[...]*f32")["quantize"]
    monkeypatch.setenv("MODELOPT_KERNELS", "fast")
    with pytest.raises(ConfigError, match='"fast"'):
        kernels.explain(x, "i8[...]*f32")
