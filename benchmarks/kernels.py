"""Memory-bound ops on a CUDA device, as shares of ceilings measured in the same run.

    python -m benchmarks.kernels [--json out.json] [--sizes 16384 4096] [--only fake_quantize] [--first-calls]

Effective bandwidth counts the bytes an op must move: each input read once, each output written once. The ceiling of ops that
write is a device copy of 2 GiB; that of amax and histogram a load-only kernel over 2 GiB. Times are those of a CUDA graph over
copies of the tensor that together exceed the L2 cache; "eager" is the median of single calls by device events, launch included.
--first-calls measures instead what `benchmarks.first_calls` does.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.testing import do_bench

from benchmarks import first_calls
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
    """Return the median time of one call, launch included where the device waits for it."""
    return float(do_bench(run, warmup=10, rep=repeat, return_mode="median")) / 1e3


def graph_seconds(runs: list[Callable[[], object]]) -> float:
    """Return the time of one of `runs`, captured together in a CUDA graph that is replayed for about 30 ms."""
    for run in runs:
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run() for run in runs]
    times = []
    for _ in range(7):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(5):
            graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 5e3 / len(runs))
    del kept
    return sorted(times)[len(times) // 2]


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


HADAMARD = (16, 64, 128, 256, 1024, 4096, 16384)
HADAMARD_WIDTHS = (12288, 5120, 14336)  # 12, 20 and 28 times a power of two
OPS = ("fake_quantize", "quantize", "dequantize", "clipped_gradient", "amax")
ROTATED_OPS = ("rotated_fake_quantize", "rotated_quantize")
ROTATED = {"NVFP4 dynamic": 16, "MXFP4": 32, "INT4 block 128": 128, "FP8 per token dynamic": 256}


class Table:
    """Rows of figures of ops on tensors of one size."""

    def __init__(self, n: int, only: str, roof: dict[str, float]) -> None:
        self.n, self.only, self.roof = n, only, roof
        self.rows: list[dict[str, Any]] = []

    def add(self, op: str, name: str, run: Callable[[int], object], moved: int, ceiling: str = "copy") -> None:
        """Measure `run(i)`, which works on the i-th copy of its input."""
        if self.only and self.only not in op:
            return
        copies = max(1, min(8, 2**28 // (self.n * self.n)))
        time = graph_seconds([functools.partial(run, i) for i in range(copies)])
        row = {"op": op, "format": name, "size": self.n, "us": time * 1e6, "TB/s": moved / time / 1e12}
        row |= {"share": moved / time / self.roof[ceiling], "of": ceiling, "eager_us": seconds(lambda: run(0), 20) * 1e6}
        self.rows.append(row)
        print(
            f"| {op} | {name} | {self.n} | {time * 1e6:.1f} | {row['share']:.2f} | {ceiling} | {row['eager_us']:.1f} |",
            flush=True,
        )


def measure(n: int, only: str, roof: dict[str, float]) -> list[dict[str, Any]]:
    """Return one row per op and format for a bf16 tensor of n x n."""
    table = Table(n, only, roof)
    copies = max(1, min(8, 2**28 // (n * n)))
    xs = [torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    for name, text in FORMATS.items():
        if any(only in op for op in (*OPS, *(ROTATED_OPS if name in ROTATED else ()))):
            measure_format(table, name, text, xs)
    measure_hadamard(table, xs)
    moved = xs[0].nbytes
    limit = kernels.amax(xs[0], "i8[...]*f32")
    table.add("histogram", "2048 logarithmic bins and amax", lambda i: kernels.histogram(xs[i]), moved, "read")
    table.add("histogram", "2048 equal bins", lambda i: kernels.histogram(xs[i], 2048, limit), moved, "read")
    return table.rows


def measure_format(table: Table, name: str, text: str, xs: list[torch.Tensor]) -> None:
    """Add the rows of one format."""
    x = xs[0]
    given = given_ranges(text, x)
    extra = size(given.values())
    table.add("fake_quantize", name, lambda i: kernels.fake_quantize(xs[i], text, **given), 2 * x.nbytes + extra)
    parts = [kernels.quantize(x, text, **given) for x in xs]
    packed = size(parts[0])
    table.add("quantize", name, lambda i: kernels.quantize(xs[i], text, **given), x.nbytes + extra + packed)
    table.add("dequantize", name, lambda i: kernels.dequantize(parts[i], text, x.shape, x.dtype), x.nbytes + packed)
    if name in CLIP:
        ranges = (text, given.get("amax"), given.get("global_amax"), given.get("amin"))
        backward = torch.ops.modelopt.clipped_gradient
        grad = torch.randn_like(x)
        table.add("clipped_gradient", name, lambda i: backward(grad, xs[i], *ranges), 3 * x.nbytes + extra)
    if name in AMAX:
        out = kernels.amax(x, text)
        table.add("amax", name, lambda i: kernels.amax(xs[i], text), x.nbytes + out.nbytes, "read")
    if name in ROTATED:
        block = ROTATED[name]
        rotated, codes = kernels.rotated_fake_quantize, kernels.rotated_quantize
        label = f"{name}, Hadamard {block}"
        table.add("rotated_fake_quantize", label, lambda i: rotated(xs[i], block, text, **given), 2 * x.nbytes + extra)
        table.add("rotated_quantize", label, lambda i: codes(xs[i], block, text, **given), x.nbytes + extra + packed)


def measure_hadamard(table: Table, xs: list[torch.Tensor]) -> None:
    """Add the rows of the transform: blocks, whole rows of a power of two, and other widths with about as many elements."""
    n = table.n
    for block in HADAMARD:
        if block <= n:
            table.add("hadamard", f"{block}", lambda i, block=block: kernels.hadamard(xs[i], block), 2 * xs[0].nbytes)
    for width in HADAMARD_WIDTHS:
        wide = [x.view(-1)[: n * n // width * width].view(-1, width) for x in xs]
        table.add("hadamard", f"{width}", lambda i, wide=wide: kernels.hadamard(wide[i]), 2 * wide[0].nbytes)


def write(path: str, about: dict[str, Any]) -> None:
    """Write what was measured so far; without a path, nothing."""
    if path:
        with open(path, "w") as file:
            json.dump(about, file, indent=1)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Memory-bound ops against the device's own bandwidth.")
    parser.add_argument("--json", default="")
    parser.add_argument("--only", default="", help="part of an op's name")
    parser.add_argument("--sizes", type=int, nargs="*", default=[16384, 4096])
    parser.add_argument("--first-calls", action="store_true")
    options = parser.parse_args()
    about: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    if options.first_calls:
        about["first_calls"] = first_calls.measure()
    else:
        about["ceilings"] = ceilings()
        print(about)
        print("| op | format | size | us | share | of | eager, us |")
        print("|---|---|---|---|---|---|---|")
        about["rows"] = []
        for n in options.sizes:
            about["rows"] += measure(n, options.only, about["ceilings"])
            write(options.json, about)
    write(options.json, about)


if __name__ == "__main__":
    main()
