"""fake_quantize on CPU cores, as multiples of `y.copy_(x)` into a preallocated y, measured in turns in the same run.

    python -m benchmarks.cpu_kernels [--threads 2] [--size 4096] [--dtype bfloat16] [--strided] [--rounds 8] [--json out.json]

"law" is the law applied chunk by chunk (`chunks.chunked_fake_quantize`), "op" what `kernels.fake_quantize` does, "fresh" a copy
into a new tensor made as the op makes its result, whose pages the first write has to fault in: no op that returns a new tensor
can be faster. Least times of several rounds, in each of which everything is run once (the law only twice in all).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from typing import Any

import torch

from modelopt.numerics import parse
from modelopt.numerics import reference as law
from modelopt.torch import kernels
from modelopt.torch.kernels import chunks
from modelopt.torch.kernels.fake_quantize import lanes

FORMATS = {
    "INT8 per tensor": ("i8[...]*f32", 4),
    "INT8 per channel": ("i8[1,...]*f32", 4),
    "INT8 last dim": ("i8[...,1]*f32", 4),
    "FP8 per tensor": ("e4m3[...]*f32", 4),
    "FP8 per channel": ("e4m3[1,...]*f32", 4),
    "INT8 per token dynamic": ("i8[-1]~*f32", 0),
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


def given_ranges(text: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return calibrated ranges for a static format, the tensor-wide one for a dynamic two-level one."""
    fmt = parse(text)
    if fmt.dynamic:
        return {"amax": law.global_amax(x)} if fmt.needs_global else {}
    if fmt.zero is not None:
        low, high = law.block_range(x, fmt)
        return {"amax": high, "amin": low}
    return {"amax": law.block_amax(x, fmt)}


def measure(x: torch.Tensor, text: str, rounds: int) -> dict[str, float]:
    """Return the least seconds of a copy, a copy into a new tensor, the law and the op."""
    fmt, given = parse(text), given_ranges(text, x)
    y = torch.empty(x.shape, dtype=x.dtype).zero_()

    def by_law() -> torch.Tensor:
        scales = chunks.find_scales(x, fmt, given.get("amax"), None, given.get("amin"))
        return chunks.chunked_fake_quantize(x, fmt, scales)

    runs = {
        "copy": lambda: y.copy_(x),
        "fresh": lambda: lanes.new_output(x).copy_(x),
        "law": by_law,
        "op": lambda: kernels.fake_quantize(x, fmt, **given),
    }
    if not torch.equal(runs["law"](), runs["op"]()):
        raise SystemExit(f"{text}: the op does not equal the law.")
    best = dict.fromkeys(runs, float("inf"))
    for i in range(rounds):
        for name, run in runs.items():
            if name != "law" or i < 2:
                start = time.perf_counter()
                run()
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="fake_quantize on CPU cores against a copy.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--strided", action="store_true", help="every row is half of a longer one")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    x = torch.randn(options.size, options.size * (2 if options.strided else 1)).to(getattr(torch, options.dtype))
    x = x[:, : options.size]
    about: dict[str, Any] = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    about |= {"threads": options.threads, "dtype": options.dtype, "strided": options.strided, "size": options.size}
    print(about)
    print("| format | copy, ms | fresh | law | op | goal |")
    print("|---|---|---|---|---|---|")
    rows = []
    for name, (text, goal) in FORMATS.items():
        best = measure(x, text, options.rounds)
        copy = best.pop("copy")
        row = {"format": name, "copy_ms": copy * 1e3} | {key: seconds / copy for key, seconds in best.items()}
        rows.append(row)
        cells = " | ".join(f"{row[key]:.1f}" for key in best)
        print(f"| {name} | {copy * 1e3:.1f} | {cells} | {goal or ''} |", flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(about | {"rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
