"""Linear layers on packed codes against bf16: `python -m benchmarks.linear [--large] [--experts] [--rows M] [--case PART] ...`.

Each figure is microseconds per call in a CUDA graph of many calls (median of replays), with enough copies of the weight in turn
that none is found in the L2 cache; quantization of the input is included. Ratios are the time of `F.linear` over ours.
Where torchao or gemlite can be imported they are measured too (`benchmarks.peers`). `--experts`: the products of 8 fused experts
against `torch._grouped_mm`, as many rows for each (under 8 rows: one for as many).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from benchmarks import peers
from benchmarks.timing import measure
from modelopt.numerics import parse
from modelopt.torch import kernels

SHAPES = ((14336, 4096), (4096, 14336))
LARGE = ((28672, 8192), (8192, 28672), (10240, 8192))
ROWS = (1, 16, 64, 1024, 4096)
CASES = {  # name -> (weight, input, input amax)
    "INT4 g128": ("i4[128]*f32", "", None),
    "INT4 g64": ("i4[64]*f32", "", None),
    "INT4 g32": ("i4[32]*f32", "", None),
    "INT4 g64 zero point": ("u4[64]*f16+u4", "", None),
    "NVFP4": ("e2m1[16]~*e4m3[...]*f32", "", None),
    "MXFP4": ("e2m1[32]~*e8m0", "", None),
    "INT8": ("i8[1,...]*f32", "", None),
    "FP8": ("e4m3[...]*f32", "", None),
    "FP8 x FP8 static": ("e4m3[...]*f32", "e4m3[...]*f32", 4.0),
    "FP8 x FP8 per channel and token": ("e4m3[1,...]*f32", "e4m3[-1]~*f32", None),
    "INT8 x INT8 per channel and token": ("i8[1,...]*f32", "i8[-1]~*f32", None),
    "NVFP4 x NVFP4 emulated": ("e2m1[16]~*e4m3[...]*f32", "e2m1[16]~*e4m3[...]*f32", 4.0),
    "MXFP4 x MXFP4 emulated": ("e2m1[32]~*e8m0", "e2m1[32]~*e8m0", None),
    "MXFP8 x MXFP8 emulated": ("e4m3[32]~*e8m0", "e4m3[32]~*e8m0", None),
}


def rows_of(shapes: tuple[tuple[int, int], ...], cases: list[str], rows: tuple[int, ...]) -> Iterator[dict[str, object]]:
    """Measure every case at every shape and yield one record each."""
    for n, k in shapes:
        dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(4)]
        inputs = {m: torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for m in rows}
        base = {m: measure([functools.partial(F.linear, x, w) for w in dense], 12 if m > 64 else 24) for m, x in inputs.items()}
        for name in cases:
            for m, us, how in case_of(name, dense[0], inputs):
                yield {"case": name, "N": n, "K": k, "M": m, "us": us, "bf16": base[m], "ratio": base[m] / us, "path": how}


def case_of(name: str, weight: torch.Tensor, inputs: dict[int, torch.Tensor]) -> Iterator[tuple[int, float, str]]:
    """Yield (rows of x, microseconds, path) of one case for each input."""
    text, given, top = CASES[name]
    n = weight.shape[0]
    amax = None if top is None else torch.tensor(top, device="cuda")
    parts = kernels.quantize(weight, parse(text))
    copies = [[p.clone() for p in parts] for _ in range(max(4, 200_000_000 // parts[0].nbytes + 1))]
    for m, x in inputs.items():
        calls = [functools.partial(kernels.quantized_linear, x, p, text, n, None, given, amax) for p in copies]
        yield m, measure(calls, len(copies) * (1 if m > 64 else 4)), kernels.explain_linear(x, parts, text, n, given)


def experts_of(n: int, k: int, cases: list[str], rows: tuple[int, ...], experts: int = 8) -> Iterator[dict[str, object]]:
    """Measure the products of fused experts [experts, n, k] and yield one record for each case and number of rows."""
    dense = torch.randn(experts, n, k, device="cuda", dtype=torch.bfloat16) * 0.02
    for name in cases:
        text, given, top = CASES[name]
        amax = None if top is None else torch.tensor(top, device="cuda")
        parts = [torch.stack(p) for p in zip(*(kernels.quantize(w, text) for w in dense), strict=True)]
        for m in rows:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            counts = [m // experts] * experts if m >= experts else [1] * m + [0] * (experts - m)
            offsets = torch.tensor([0, *counts], device="cuda").cumsum(0).to(torch.int32)
            ends, matrices = offsets[1:].clone(), dense.transpose(1, 2)
            base = measure([functools.partial(torch._grouped_mm, x, matrices, offs=ends)], 6)
            us = measure([functools.partial(kernels.quantized_grouped_linear, x, offsets, parts, text, n, None, given, amax)], 6)
            how = kernels.explain_grouped(x, parts, text, n, given)
            yield {"case": f"8 experts, {name}", "N": n, "K": k, "M": m, "us": us, "bf16": base, "ratio": base / us, "path": how}


def print_table(records: list[dict[str, object]]) -> None:
    """Print the ratios, one line for each case and shape."""
    print("bf16 F.linear, us: " + str({(r["N"], r["K"], r["M"]): round(float(str(r["bf16"])), 1) for r in records}))
    rows = sorted({int(str(r["M"])) for r in records})
    print(f"{'':44}{'N, K':>14}" + "".join(f"{'M=' + str(m):>16}" for m in rows))
    lines: dict[tuple[object, ...], list[str]] = {}
    for r in records:
        cell = f"{float(str(r['ratio'])):.2f} ({float(str(r['us'])):.1f})"
        lines.setdefault((r["case"], r["N"], r["K"]), []).append(f"{cell:>16}")
    for (case, n, k), cells in lines.items():
        print(f"{case:44}{str(n) + ', ' + str(k):>14}" + "".join(cells))


def write(path: str, records: list[dict[str, object]]) -> None:
    """Write what was measured so far; without a path, nothing."""
    if path:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "w") as file:
            json.dump(about | {"records": records}, file, indent=1)


def main() -> None:
    """Measure, print the table, and write the records as JSON."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--large", action="store_true", help="the 70B shapes instead")
    options.add_argument("--experts", action="store_true", help="fused experts instead")
    options.add_argument("--no-peers", action="store_true", help="leave other libraries out")
    options.add_argument("--rows", type=int, action="append", help="only these numbers of rows")
    options.add_argument("--json", default="", help="where to write the records")
    options.add_argument("--case", action="append", help="only these cases (a part of the name)")
    chosen = options.parse_args()
    torch.manual_seed(0)
    cases = [c for c in CASES if not chosen.case or any(part in c for part in chosen.case)]
    rows = tuple(chosen.rows or ROWS)
    shapes = LARGE if chosen.large else SHAPES
    records: list[dict[str, object]] = []
    for record in experts_of(*SHAPES[0], cases, rows) if chosen.experts else rows_of(shapes, cases, rows):
        records.append(record)
        write(chosen.json, records)
    if not chosen.no_peers and not chosen.experts:
        found = peers.rows_of(shapes, rows, tuple(chosen.case or ()))
        records += [r for r in found if "us" in r]
        write(chosen.json, records)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print_table(records)


if __name__ == "__main__":
    main()
