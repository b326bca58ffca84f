"""The first call of each op on a CUDA device, and how often it compiles for five widths of one power-of-two class.

    python -m benchmarks.first_calls [op]

Each op is measured in a fresh process with empty caches, after the CUDA context was made; several processes run at
once.
A compilation is a kernel that Triton or the CUDA run-time compiler made.
"""

from __future__ import annotations

import concurrent.futures
import functools
import glob
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modelopt.torch import kernels
from modelopt.torch.kernels.matmul import cuda

NVFP4, FOUR_OVER_SIX = "e2m1[16]~*e4m3[...]*f32", "e2m1[16]~*e4m3:46[...]*f32"
WIDTHS = (4096, 2560, 3072, 2056, 4000)  # multiples of 16 or not, one power-of-two class
ROWS, AT_ONCE = 64, 5


def packed(text: str, x: Tensor) -> object:
    """Dequantize codes of a width near that of `x`, made without a kernel."""
    width = x.shape[1] // 128 * 128
    codes = torch.zeros(ROWS, width // 2, dtype=torch.uint8, device=x.device)
    return kernels.dequantize([codes, torch.ones(ROWS, width // 128, device=x.device)], text, (ROWS, width), torch.bfloat16)


def clipped(x: Tensor) -> object:
    """The gradient of a clipped range."""
    return torch.ops.modelopt.clipped_gradient(x, x, "i8[...]*f32", x.new_ones((), dtype=torch.float32), None, None)


def blocks(x: Tensor, block: int) -> Tensor:
    """The first columns of `x`, a multiple of a block."""
    return x[:, : x.shape[1] // block * block].contiguous()


OPS: dict[str, Callable[[Tensor], object]] = {
    "fake_quantize INT8": lambda x: kernels.fake_quantize(x, "i8[1,...]*f32"),
    "fake_quantize INT8 last dim": lambda x: kernels.fake_quantize(x, "i8[...,1]*f32"),
    "fake_quantize FP8 per token": lambda x: kernels.fake_quantize(x, "e4m3[-1]~*f32"),
    "fake_quantize NVFP4": lambda x: kernels.fake_quantize(x, NVFP4),
    "fake_quantize four-over-six": lambda x: kernels.fake_quantize(x, FOUR_OVER_SIX),
    "fake_quantize FP8 tile": lambda x: kernels.fake_quantize(x, "e4m3[128,128]*f32"),
    "clipped_gradient INT8": clipped,
    "quantize NVFP4": lambda x: kernels.quantize(x, NVFP4),
    "quantize FP8 per token": lambda x: kernels.quantize(x, "e4m3[-1]~*f32"),
    "quantize INT4 block 128": lambda x: kernels.quantize(x, "i4[128]*f32"),
    "quantize MXFP6": lambda x: kernels.quantize(blocks(x, 32), "e3m2[32]~*e8m0"),
    "dequantize INT4 block 128": functools.partial(packed, "i4[128]*f32"),
    "amax per channel": lambda x: kernels.amax(x, "i8[1,...]*f32"),
    "amax last dim": lambda x: kernels.amax(x, "i8[...,1]*f32"),
    "hadamard 128": lambda x: kernels.hadamard(blocks(x, 128), 128),
    "hadamard 512": lambda x: kernels.hadamard(blocks(x, 512), 512),
    "hadamard 28 x 512": lambda x: kernels.hadamard(x.flatten()[: 28 * 512]),
    "rotated_fake_quantize INT4": lambda x: kernels.rotated_fake_quantize(blocks(x, 128), 128, "i4[128]*f32"),
    "rotated_quantize FP8 per token": lambda x: kernels.rotated_quantize(blocks(x, 256), 256, "e4m3[-1]~*f32"),
    "histogram": kernels.histogram,
    "histogram, equal bins": lambda x: kernels.histogram(x, 2048, 4.0),
}


def compiled(cache: str) -> int:
    """Return how many kernels were compiled until now."""
    return len(glob.glob(f"{cache}/*/*.cubin")) + cuda.compiled.cache_info().misses


def first_call(op: str) -> dict[str, Any]:
    """Return the seconds of the first call of `op` in this process and of other widths, and the compilations after each."""
    inputs = [torch.randn(ROWS, width, device="cuda", dtype=torch.bfloat16) for width in WIDTHS]
    torch.cuda.synchronize()
    seconds, counts = [], []
    for x in inputs:
        start = time.perf_counter()
        OPS[op](x)
        torch.cuda.synchronize()
        seconds.append(round(time.perf_counter() - start, 3))
        counts.append(compiled(os.environ["TRITON_CACHE_DIR"]))
    return {"op": op, "seconds": seconds, "compilations": counts}


def measure() -> list[dict[str, Any]]:
    """Return what `first_call` does for each op, each from a process of its own, and print it."""

    def run(op: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as cache:
            environment = os.environ | {"TRITON_CACHE_DIR": cache, "CUDA_CACHE_PATH": cache, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "benchmarks.first_calls", op]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            return {"op": op, "seconds": [], "compilations": [], "error": done.stderr[-500:]}
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))

    rows = []
    print(f"| op | first call, s | other widths {WIDTHS[1:]}, s | kernels compiled until then |", flush=True)
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        for done in concurrent.futures.as_completed([pool.submit(run, op) for op in OPS]):
            rows.append(row := done.result())
            times = row["seconds"] or ["failed"]
            print(f"| {row['op']} | {times[0]} | {times[1:]} | {row['compilations']} |{row.get('error', '')}", flush=True)
    return rows


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(first_call(sys.argv[1])))
    else:
        measure()
