"""Memory-bound ops on a CUDA device, as shares of ceilings measured in the same run.

    python -m benchmarks.kernels [--json out.json] [--sizes 16384 4096] [--only fake_quantize]

Effective bandwidth counts the bytes an op must move: each input read once, each output written once. The ceiling of ops that
write is a device copy of 2 GiB; that of amax a load-only kernel over 2 GiB. Times are medians of device events after warm-up.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.testing import do_bench

from modelopt.numerics import parse
from modelopt.numerics import reference as law
from modelopt.torch import kernels

FORMATS: dict[str, str] = {
    "INT8 per tensor": "i8[...]*f32",
    "INT8 per channel": "i8[1,...]*f32",
    "INT8 last dim": "i8[...,1]*f32",
    "INT4 per tensor": "i4[...]*f32",
    "INT4 per channel": "i4[1,...]*f32",
    "INT4 block 128": "i4[128]*f32",
    "INT4 block 64": "i4[64]*f32",
    "INT4 block 64 zero point": "u4[64]*f16+u4",
    "FP8 per tensor": "e4m3[...]*f32",
    "FP8 per channel": "e4m3[1,...]*f32",
    "FP8 block 128": "e4m3[128]*f32",
    "FP8 tile 128x128": "e4m3[128,128]*f32",
    "FP8 per token dynamic": "e4m3[-1]~*f32",
    "INT8 per token dynamic": "i8[-1]~*f32",
    "NVFP4 dynamic": "e2m1[16]~*e4m3[...]*f32",
    "NVFP4 static": "e2m1[16]*e4m3[...]*f32",
    "NVFP4 four-over-six": "e2m1[16]~*e4m3:46[...]*f32",
    "MXFP4": "e2m1[32]~*e8m0",
    "MXFP6 e3m2": "e3m2[32]~*e8m0",
    "MXFP6 e2m3": "e2m3[32]~*e8m0",
    "MXFP8": "e4m3[32]~*e8m0",
    "MXINT8": "i8[32]~*e8m0",
    "NF4 block 64": "nf4[64]*f32",
}
AMAX = ("INT8 per tensor", "INT8 per channel", "INT8 last dim", "INT4 block 128", "MXFP4", "NVFP4 dynamic", "FP8 tile 128x128")
CLIP = ("INT8 per tensor", "FP8 per channel", "INT4 block 128", "NVFP4 dynamic")


@triton.jit
def _load_only(x_ptr, out_ptr, W: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * W + tl.arange(0, W)
    x = tl.load(x_ptr + offset)
    total = tl.sum(x, 0)
    if total == 123456789:
        tl.store(out_ptr, total)


def seconds(run: Callable[[], object], repeat: int = 60) -> float:
    """Return the median time of one call."""
    return float(do_bench(run, warmup=15, rep=repeat, return_mode="median")) / 1e3


def ceilings() -> dict[str, float]:
    """Return bytes per second of a device copy (read plus written) and of a load-only kernel, over 2 GiB."""
    x = torch.randint(-1000, 1000, (2**29,), dtype=torch.int32, device="cuda")
    y = torch.empty_like(x)
    copy = 2 * x.nbytes / seconds(lambda: y.copy_(x), 100)
    best = 0.0
    for w, warps in ((4096, 4), (4096, 8), (8192, 8), (16384, 8), (16384, 16)):
        time = seconds(lambda w=w, warps=warps: _load_only[(x.numel() // w,)](x, y, w, num_warps=warps), 60)
        best = max(best, x.nbytes / time)
    return {"copy": copy, "read": best}


def given_ranges(text: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return calibrated ranges for a static format, the tensor-wide one for a dynamic two-level one."""
    fmt = parse(text)
    if fmt.dynamic:
        return {"amax": kernels.amax(x, "i8[...]*f32")} if fmt.needs_global else {}
    if fmt.zero is not None:
        low, high = law.block_range(x, fmt)
        return {"amax": high, "amin": low}
    given = {"amax": kernels.amax(x, fmt)}
    return given | ({"global_amax": kernels.amax(x, "i8[...]*f32")} if fmt.needs_global else {})


def size(tensors: Any) -> int:
    """Return the bytes of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def measure(n: int, only: str, roof: dict[str, float]) -> list[dict[str, Any]]:
    """Return one row per op and format for a bf16 tensor of n x n."""
    x = torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn_like(x)
    rows: list[dict[str, Any]] = []

    def add(op: str, name: str, run: Callable[[], object], moved: int, ceiling: str) -> None:
        if only and only not in op:
            return
        time = seconds(run)
        rows.append(
            {
                "op": op,
                "format": name,
                "size": n,
                "us": time * 1e6,
                "TB/s": moved / time / 1e12,
                "share": moved / time / roof[ceiling],
                "of": ceiling,
            }
        )

    for name, text in FORMATS.items():
        given = given_ranges(text, x)
        extra = size(given.values())
        add("fake_quantize", name, lambda: kernels.fake_quantize(x, text, **given), 2 * x.nbytes + extra, "copy")  # noqa: B023
        parts = kernels.quantize(x, text, **given)
        add("quantize", name, lambda: kernels.quantize(x, text, **given), x.nbytes + extra + size(parts), "copy")  # noqa: B023
        add("dequantize", name, lambda: kernels.dequantize(parts, text, x.shape, x.dtype), x.nbytes + size(parts), "copy")  # noqa: B023
        if name in CLIP:
            arguments = (grad, x, text, given.get("amax"), given.get("global_amax"), given.get("amin"))
            add("clipped_gradient", name, lambda: torch.ops.modelopt.clipped_gradient(*arguments), 3 * x.nbytes + extra, "copy")  # noqa: B023
        if name in AMAX:
            out = kernels.amax(x, text)
            add("amax", name, lambda: kernels.amax(x, text), x.nbytes + out.nbytes, "read")  # noqa: B023
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a Markdown table."""
    print("| op | format | size | us | TB/s | share | of |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        print(f"| {r['op']} | {r['format']} | {r['size']} | {r['us']:.1f} | {r['TB/s']:.2f} | {r['share']:.2f} | {r['of']} |")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Memory-bound ops against the device's own bandwidth.")
    parser.add_argument("--json", default="")
    parser.add_argument("--only", default="", help="part of an op's name")
    parser.add_argument("--sizes", type=int, nargs="*", default=[16384, 4096])
    options = parser.parse_args()
    roof = ceilings()
    about = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ceilings": roof,
    }
    print(about)
    rows = [row for n in options.sizes for row in measure(n, options.only, roof)]
    print_rows(rows)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(about | {"rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
