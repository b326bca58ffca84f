"""Fused FP8 layers, and NVFP4 weights times FP8 activations: `python -m benchmarks.mlp [--large] [--json FILE]`.

Two linear layers (K -> N -> K) with an activation between them, or the gated form with three. Microseconds a call in a CUDA graph
of several calls that take copies of the weights in turn (median of replays); the quantization of the input is included.

    bf16      F.linear, activation, F.linear            modules   quantized_linear, as a compressed model calls it
    unfused   torch._scaled_mm, activation, quantize, torch._scaled_mm            pass, epilogue   the two ways of fp8_mlp
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import measure
from modelopt.torch import kernels
from modelopt.torch.kernels.fused_mlp import reference, tables
from modelopt.torch.kernels.fused_mlp import triton as fused
from modelopt.torch.quantization.backends.nvfp4_gemm import NVFP4Kernel

E4M3 = "e4m3[...]*f32"
CASES = (("relu", False), ("gelu", False), ("gelu_tanh", False), ("silu", True))
ROWS = (1, 16, 64, 256, 512, 1024, 4096)
COPIES = 3


def layers(n: int, k: int, gated: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Return (codes and scales, bf16 weights) of first, up, second."""
    shapes = [(n, k), *([(n, k)] if gated else []), (k, n)]
    dense = [torch.randn(s, device="cuda", dtype=torch.bfloat16) * 0.02 for s in shapes]
    return [t for w in dense for t in kernels.quantize(w, E4M3)], dense


def ways(
    x: Tensor, weights: list[Tensor], dense: list[Tensor], bias: list[Tensor | None], name: str, top: Tensor, hidden: Tensor
):
    """Return what is measured, by name, for one copy of the weights."""
    pairs = [list(p) for p in zip(weights[::2], weights[1::2], strict=True)]

    def chain(first: Callable[[int], Tensor], last: Callable[[Tensor], Tensor]) -> Tensor:
        h = reference.activate(first(0), name)
        return last(h * first(1) if len(pairs) == 3 else h)

    def bf16() -> Tensor:
        return chain(lambda i: F.linear(x, dense[i], bias[i]), lambda h: F.linear(h, dense[-1], bias[-1]))

    def modules() -> Tensor:
        return chain(
            lambda i: kernels.quantized_linear(x, pairs[i], E4M3, pairs[i][0].shape[0], bias[i], E4M3, top),
            lambda h: kernels.quantized_linear(h, pairs[-1], E4M3, x.shape[1], bias[-1], E4M3, hidden),
        )

    def multiply(codes: list[Tensor], i: int) -> Tensor:
        return fused.product(
            codes[0].view(torch.float8_e4m3fn), codes[1], pairs[i][0].view(torch.float8_e4m3fn), pairs[i][1], bias[i]
        )

    def unfused() -> Tensor:
        q = kernels.quantize(x, E4M3, top)
        return chain(lambda i: multiply(q, i), lambda h: multiply(kernels.quantize(h, E4M3, hidden), -1))

    both = {how: functools.partial(fused.fp8_mlp, x, weights, bias, name, E4M3, top, hidden, how) for how in ("pass", "epilogue")}
    return {"bf16": bf16, "modules": modules, "unfused": unfused, **both}


def chains(n: int, k: int) -> list[dict[str, object]]:
    """Measure every activation at every number of rows and return one record each."""
    found: list[dict[str, object]] = []
    top, hidden = torch.tensor(5.0, device="cuda"), torch.tensor(3.0, device="cuda")
    for name, gated in CASES:
        copies = [layers(n, k, gated) for _ in range(COPIES)]
        bias: list[Tensor | None] = [None] * 3
        if not gated:
            bias = [torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in (n, k)]
        for m in ROWS:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            each = [ways(x, w, d, bias, name, top, hidden) for w, d in copies]
            times = {way: measure([e[way] for e in each], COPIES * (1 if m > 64 else 4)) for way in each[0]}
            record: dict[str, object] = {"case": name, "N": n, "K": k, "M": m, "us": times, "path": tables.route(m, gated)}
            found.append(record)
            best = times[tables.route(m, gated)]
            line = "  ".join(f"{way} {us:7.1f}" for way, us in times.items())
            print(
                f"{name:10}{'gated' if gated else '':6} M={m:5} {line}  unfused / fused {times['unfused'] / best:.2f}", flush=True
            )
    return found


def nvfp4(n: int, k: int) -> list[dict[str, object]]:
    """Measure `NVFP4Kernel.gemm` against bf16 `F.linear`."""
    found: list[dict[str, object]] = []
    dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(4)]
    packed = [NVFP4Kernel.apply_quantization(w) for w in dense * 2]
    for m in (1, 16, 64, 1024, 4096):
        x = torch.randn(m, k, device="cuda").to(torch.float8_e4m3fn)
        wide, count = x.to(torch.bfloat16), 8 if m > 64 else 24
        base = measure([functools.partial(F.linear, wide, w) for w in dense], count)
        times = {
            str(dtype).removeprefix("torch."): measure(
                [functools.partial(NVFP4Kernel.gemm, x, *p, out_dtype=dtype) for p in packed], count
            )
            for dtype in (torch.float32, torch.bfloat16)
        }
        found.append({"case": "NVFP4 x FP8", "N": n, "K": k, "M": m, "bf16": base, "us": times})
        print(
            f"NVFP4 x FP8 {n} x {k} M={m:5} bf16 {base:.1f} "
            + " ".join(f"{d} {us:.1f} ({base / us:.2f})" for d, us in times.items())
        )
    return found


def main() -> None:
    """Measure, print and write the records as JSON."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--large", action="store_true", help="the 70B shape too")
    options.add_argument("--json", default="", help="where to write the records")
    chosen = options.parse_args()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    records = chains(14336, 4096) + nvfp4(14336, 4096) + nvfp4(4096, 14336)
    if chosen.large:
        records += chains(28672, 8192)
    if chosen.json:
        with open(chosen.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "records": records}, file, indent=1)


if __name__ == "__main__":
    main()
