"""fake_quantize on CPU cores, as multiples of `y.copy_(x)` into a preallocated y, both measured in turns in the same run.

    python -m benchmarks.cpu_kernels [--threads 2] [--size 4096] [--json out.json]

"before" is the law applied chunk by chunk (`chunks.chunked_fake_quantize`), "after" what `kernels.fake_quantize` does now, "into"
the same without the allocation of the output, whose pages the first write of a fresh tensor has to fault in. Minima of several.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable

import torch

from modelopt.numerics import parse
from modelopt.numerics import reference as law
from modelopt.torch import kernels
from modelopt.torch.kernels import chunks

FORMATS = {
    "INT8 per tensor": ("i8[...]*f32", 4),
    "INT8 per channel": ("i8[1,...]*f32", 4),
    "INT8 last dim": ("i8[...,1]*f32", 4),
    "FP8 per tensor": ("e4m3[...]*f32", 4),
    "FP8 per channel": ("e4m3[1,...]*f32", 4),
    "INT4 block 128": ("i4[128]*f32", 0),
    "INT4 block 64 zero point": ("u4[64]*f16+u4", 0),
    "FP8 per token dynamic": ("e4m3[-1]~*f32", 0),
    "NVFP4 dynamic": ("e2m1[16]~*e4m3[...]*f32", 10),
    "MXFP4": ("e2m1[32]~*e8m0", 10),
    "MXFP6 e3m2": ("e3m2[32]~*e8m0", 10),
    "MXFP8": ("e4m3[32]~*e8m0", 10),
    "MXINT8": ("i8[32]~*e8m0", 10),
    "NF4 block 64": ("nf4[64]*f32", 0),
}


def fastest(run: Callable[[], object], times: int) -> float:
    """Return the least time of a call, in seconds."""
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def given_ranges(text: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return calibrated ranges for a static format, the tensor-wide one for a dynamic two-level one."""
    fmt = parse(text)
    if fmt.dynamic:
        return {"amax": law.global_amax(x)} if fmt.needs_global else {}
    if fmt.zero is not None:
        low, high = law.block_range(x, fmt)
        return {"amax": high, "amin": low}
    return {"amax": law.block_amax(x, fmt)}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="fake_quantize on CPU cores against a copy.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    x = torch.randn(options.size, options.size)
    y = torch.empty_like(x)
    about = {"torch": torch.__version__, "machine": platform.processor() or platform.machine(), "threads": options.threads}
    rows = []
    print(about)
    print("| format | copy, ms | before | after | into | goal |")
    print("|---|---|---|---|---|---|")
    for name, (text, goal) in FORMATS.items():
        fmt, given = parse(text), given_ranges(text, x)

        def before() -> torch.Tensor:
            full = (given.get("amax"), None, given.get("amin"))  # noqa: B023
            return chunks.chunked_fake_quantize(x, fmt, chunks.find_scales(x, fmt, *full))  # noqa: B023

        def after() -> torch.Tensor:
            return kernels.fake_quantize(x, fmt, **given)  # noqa: B023

        same = torch.equal(before(), after())
        copy = fastest(lambda: y.copy_(x), 5)
        slow, fast = fastest(before, 2), fastest(after, 6)
        copy = min(copy, fastest(lambda: y.copy_(x), 5))
        fresh = fastest(lambda: torch.empty_like(x).copy_(x), 5) - copy
        rows.append(
            {"format": name, "copy_ms": copy * 1e3, "before": slow / copy, "after": fast / copy, "into": (fast - fresh) / copy}
        )
        r = rows[-1]
        print(
            f"| {name} | {copy * 1e3:.1f} | {r['before']:.1f} | {r['after']:.1f} | {r['into']:.1f} | {goal or ''} |", flush=True
        )
        if not same:
            raise SystemExit(f"{name}: the two do not agree.")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(about | {"rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
