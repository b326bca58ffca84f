"""The CUDA sources for codes of four and six bits, compiled for the host and run by threads, against the law.

What the device does in assembly is written out in host_words.h; copies that overlap on the device happen at once here.
"""

from __future__ import annotations

import ctypes
import pathlib
import shutil
import subprocess

import pytest
import torch

from modelopt.numerics import Format, packing, parse
from modelopt.numerics import reference as law
from modelopt.torch.kernels import subbyte
from modelopt.torch.kernels.subbyte import constants

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")]
HEADER = pathlib.Path(__file__).with_name("host_words.h")


def compiled(fmt: Format, dtype: torch.dtype, found: bool, codes: bool, ahead: int, folder: pathlib.Path):
    """Return (the kernel as a function of pointers and a count, values of a thread)."""
    name, block = str(constants.family(fmt)), fmt.block.sizes((1, 1024))[-1]
    if name == "sixes":
        given, arguments = constants.of_sixes(fmt, dtype, found, block), "x, out, (unsigned char*)scales, amax, count"
    else:
        given = getattr(constants, f"of_{name}")(fmt, dtype, found, codes, block)
        arguments = "x, out, scales, outer, amax, top, count"
    options = dict(given) | {"AHEAD": str(ahead)}
    body = subbyte.source(name).partition("\n#define WORDS")  # after the words in assembly
    text = "".join(f"#define {key} {value}\n" for key, value in options.items()) + f'#include "{HEADER}"\n' + "".join(body[1:])
    text = text.replace("extern __shared__ uint4 staged[];", "uint4* staged = pool;").replace('extern "C" __global__', "static")
    text += 'extern "C" void run(const uint4* x, uint4* out, void* scales, float* outer, const float* amax, const float* top,'
    text += " u32 count)"
    text += f" {{ launch(2, THREADS, [=] {{ {name}({arguments}); }}); }}\n"
    (folder / "kernel.cpp").write_text(text)
    flags = "-w -O1 -std=c++20 -pthread -ffp-contract=off -frounding-math -shared -fPIC"
    library = folder / f"kernel{codes}{found}{ahead}.so"
    subprocess.run(["g++", *flags.split(), "-o", str(library), str(folder / "kernel.cpp")], check=True)
    return ctypes.CDLL(str(library)).run, int(options["EACH"])


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Return a copy that begins at a multiple of 16 bytes."""
    room = torch.empty(x.numel() + 16, dtype=x.dtype)
    start = -room.data_ptr() % 16 // x.element_size()
    return room[start : start + x.numel()].view(x.shape).copy_(x)


def run(kernel, x, fmt, given, codes):
    """Return [codes, scales] or the values."""
    amax, top, _ = law.given_range(x.shape, fmt, given.get("amax"), given.get("global_amax"), None)
    function, each = kernel
    out = aligned(torch.zeros(x.numel() * fmt.element.bits // 8, dtype=torch.uint8) if codes else torch.zeros_like(x))
    scales, outer = torch.empty(fmt.grid(x.shape), dtype=fmt.stored_scale.dtype), torch.empty(1)
    tensors = [aligned(x), out, scales, outer, amax, top]
    function(*(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors), x.numel() // each)
    return [out.view(*x.shape[:-1], -1), scales] if codes else out


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in bits; one NaN is as good as another."""
    if a.element_size() == 1:
        return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a[~nan], b[~nan]) and torch.equal(a[~nan].signbit(), b[~nan].signbit())


def inputs(dtype):
    """A normal tensor, one with NaN, infinities and zeros, and finite numbers of the type in any order."""
    x = (torch.randn(19, 512) * 3).to(dtype)
    odd = x.clone()
    odd[10:], odd[1, 5], odd[3, 7], odd[5, 9] = 0, float("nan"), float("inf"), float("-inf")
    every = torch.arange(65536).to(torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    return x, odd, every[torch.randperm(every.numel())][: 37 * 512].reshape(37, 512)


def ranges(x, fmt):
    """Ranges to be found or given, ordinary and extreme."""
    if not fmt.dynamic:
        blocks = law.block_amax(torch.randn(x.shape), fmt)
        top = {"global_amax": torch.tensor(4.3)} if fmt.needs_global else {}
        return [{"amax": blocks * factor, **top} for factor in (1.0, 2.0**-70, 2.0**-135)]
    tops = (9.7, 1e-41, 1e38, float("inf"), float("nan")) if fmt.needs_global else ()
    return [{"global_amax": torch.tensor(top)} for top in tops] or [{}]


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("e2m1[16]~*e4m3[...]*f32", torch.bfloat16),
        ("e2m1[16]*e4m3[...]*f32", torch.float16),
        ("e2m1[128]*f32", torch.bfloat16),
        ("nf4[64]*f32", torch.bfloat16),
        ("nf4[16]~*f32", torch.float16),
        ("e3m2[32]~*e8m0", torch.bfloat16),
        ("e2m3[64]*e8m0:nearest", torch.float16),
    ],
)
def test_equal_to_the_law(text, dtype, ahead, tmp_path):
    torch.manual_seed(0)
    fmt = parse(text)
    four = constants.family(fmt) != "sixes"
    kernels = {codes: compiled(fmt, dtype, fmt.dynamic, codes, ahead, tmp_path) for codes in ((True, False) if four else (True,))}
    sign = 1 << (fmt.element.bits - 1) if fmt.element.kind == "float" else 0
    for x in inputs(dtype):
        for given in ranges(x, fmt):
            values = law.fake_quantize(x, fmt, **given)
            if four:
                assert same(run(kernels[False], x, fmt, given, False), values), given
            expected = law.quantize(x, fmt, **given)
            codes, scales = run(kernels[True], x, fmt, given, True)
            assert same(scales, expected.scales[0]), given
            a, b = packing.unpack_bits(codes, fmt.element.bits, x.shape[-1]), expected.unpacked()
            assert torch.equal(torch.where(values.isnan(), a & ~sign, a), torch.where(values.isnan(), b & ~sign, b)), given


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_four_over_six(dtype, tmp_path):
    """Both errors may be equal to the last bits; elsewhere the choice is the law's."""
    torch.manual_seed(0)
    fmt = parse("e2m1[16]~*e4m3:46[...]*f32")
    kernels = [compiled(fmt, dtype, True, codes, 0, tmp_path) for codes in (False, True)]
    halves = torch.randint(-6, 7, (20, 512)).to(dtype) / 2
    wide = torch.randn(40, 512).to(dtype) * 2.0 ** torch.randint(-12, 12, (40, 1)).to(dtype)
    for x in (torch.randn(40, 512).to(dtype), halves, wide, torch.zeros(3, 512, dtype=dtype)):
        for factor in (1.0, 0.3, 2.7):
            given = {"global_amax": law.global_amax(x) * factor}
            values, expected = run(kernels[0], x, fmt, given, False), law.fake_quantize(x, fmt, **given)
            other = (values != expected).reshape(-1, 16).any(dim=1)
            errors = [(v.double() - x.double()).square().reshape(-1, 16).sum(1)[other] for v in (values, expected)]
            assert other.double().mean() < 1e-3
            assert torch.allclose(errors[0], errors[1], rtol=1e-5)
            parts = [*run(kernels[1], x, fmt, given, True), law.quantize(x, fmt, **given).scales[1]]
            assert same(law.Quantized.from_parts(parts, fmt, x.shape, dtype).dequantize(), values)
