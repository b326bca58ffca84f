"""The CUDA sources of the transform, compiled for the host and run by threads, against the law: indices and arithmetic.

What the device does in assembly is written out in host_cuda.h; copies that overlap on the device happen at once here.
"""

from __future__ import annotations

import ctypes
import pathlib
import re
import shutil
import subprocess

import pytest
import torch

from modelopt.numerics import parse
from modelopt.numerics import reference as law
from modelopt.torch.kernels.hadamard import cuda, fused, reference

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")]
HEADERS = {words: pathlib.Path(__file__).with_name(f"host_{name}.h") for words, name in ((False, "cuda"), (True, "words"))}
WORDS = "../subbyte/words.cu"
BY_HEADER = ("fetch(", "fetch_group(", "fetched(", "larger(", "smaller(", "from_e4m3(")
IN_ASSEMBLY = {
    r'asm\("rcp[^;]*;" : "=f"\((.*?)\) : "f"\((.*?)\)\);': r"\1 = 1.0f / \2;",
    r'asm\("cvt.rn.bf16x2[^;]*;" : "=r"\(word\).*?\);\n': "word = bfloat16(first) | bfloat16(second) << 16;\n",
    r'asm volatile\("ld.global[^;]*;" : "=f"\((.*?)\) : "l"\((.*?)\)\);': r"\1 = *(\2);",
    r'asm\(FMA : "\+r"\(sum\) : .*?\);': "sum |= 1;",
    r"extern __shared__ uint4 (\w+)\[\];": r"uint4* \1 = pool;",
    r'extern "C" __global__': "static",
}


def host_source(files: tuple[str, ...]) -> str:
    """The device's source with what the header stands in for taken out."""
    text = cuda.source(*(name for name in files if name != WORDS))
    for name in BY_HEADER:
        text = re.sub(
            r"(template <int pending> )?__device__ __forceinline__ \w+ " + re.escape(name) + r"(.*\}\n|.*?\n\}\n)", "", text
        )
        text = re.sub(r"__device__ __forceinline__ \w+ " + re.escape(name) + r".*?\n\}\n", "", text, flags=re.S)
    for pattern, instead in IN_ASSEMBLY.items():
        text = re.sub(pattern, instead, text)
    return text


def run(how: cuda.Plan, folder: pathlib.Path, *arguments: torch.Tensor | int | None) -> None:
    """Compile the kernel of a plan and run two thread blocks of it."""
    types = ["void*" if isinstance(a, torch.Tensor) or a is None else "int" for a in arguments]
    given = ", ".join(f"({t})a{i}" if t == "int" else f"Any{{a{i}}}" for i, t in enumerate(types))
    declared = ", ".join(f"{t} a{i}" for i, t in enumerate(types))
    constants = "".join(f"#define {name} {value}\n" for name, value in how.constants)
    code = f'{constants}#include "{HEADERS[WORDS in how.files]}"\n{host_source(how.files)}\n'
    code += "struct Any { void* p; template <class T> operator T*() const { return (T*)p; } };\n"
    code += f'extern "C" void run(int count, {declared}) {{ launch(count, {how.threads}, [=] {{ {how.name}({given}); }}); }}\n'
    (folder / "kernel.cpp").write_text(code)
    flags = "-w -O0 -std=c++20 -pthread -ffp-contract=off -shared -fPIC"
    subprocess.run(["g++", *flags.split(), "-o", str(folder / "kernel.so"), str(folder / "kernel.cpp")], check=True)
    values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
    ctypes.CDLL(str(folder / "kernel.so")).run(2, *values)


@pytest.mark.parametrize(
    ("size", "count", "dtype", "signs"),
    [
        (256, 75, torch.bfloat16, 0),
        (1024, 9, torch.float32, -1),
        (5120, 2, torch.float32, 1),
        (24, 700, torch.bfloat16, 0),
        (2048, 5, torch.bfloat16, 0),
        (16384, 2, torch.bfloat16, 1),
        (14336, 3, torch.bfloat16, -1),
    ],
)
def test_transform(size, count, dtype, signs, tmp_path):
    x = torch.randn(count, size).to(dtype)
    each = torch.randint(0, 2, (size,)) * 2.0 - 1
    out = torch.zeros_like(x)
    how = cuda.plan(size, dtype, signs, signs < 0)
    run(how, tmp_path, x, each, out, x.numel() // cuda.TYPES[dtype][1], 0)
    expected = reference.hadamard(x, size, each if signs else None, signs < 0)
    if size & (size - 1):
        assert torch.allclose(out.float(), expected.float(), rtol=2**-7 if dtype == torch.bfloat16 else 2e-6, atol=4e-6)
    else:
        assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("text", "size", "shape", "codes", "found"),
    [
        ("i8[1,...]*f32", 16, (7, 1120), True, False),
        ("e4m3[-1]~*f32", 256, (5, 1536), True, True),
        ("e2m1[16]~*e4m3[...]*f32", 64, (9, 1152), True, True),
        ("i4[128]*f32", 128, (9, 1152), False, False),
        ("i4[128]*f32", 128, (9, 1152), True, False),
        ("e2m1[32]~*e8m0", 32, (9, 1152), True, True),
        ("i8[64]~*e8m0", 64, (9, 1152), True, True),
        ("i8[1,...]*f32", 128, (7, 1152), True, False),
        ("e4m3[-1]~*f32", 256, (5, 1536), False, True),
    ],
)
def test_transform_and_rounding(text, size, shape, codes, found, tmp_path):
    fmt = parse(text)
    x = torch.randn(shape).to(torch.bfloat16)
    x[0], x[1] = 0, x[1] * 1e-38
    y = reference.hadamard(x, size)
    top = law.global_amax(y) * 0.8 if fmt.needs_global else None
    amax = None if found else law.block_amax(y, fmt) * 0.7
    ranges = {"amax": amax, "global_amax": top}
    expected = law.quantize(y, fmt, **ranges).parts if codes else [law.fake_quantize(y, fmt, **ranges)]
    how, chunks = fused.plan(x.shape, x.dtype, size, text, codes, found)
    out, scales = fused._outputs(x, fmt, codes)
    stored = [*scales, None, None][:2]
    run(how, tmp_path, x, out, *stored, amax, top, chunks, x.numel() // 8, 0)
    for ours, theirs in zip([out, *scales], expected, strict=True):
        assert torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))
