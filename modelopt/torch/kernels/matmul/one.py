"""y = q(x) W^T + b for one row of x: plans and launches `one.cu`."""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

from modelopt.torch.kernels.matmul import cuda, skinny, tables
from modelopt.torch.kernels.matmul.locks import take
from modelopt.torch.kernels.matmul.plan import Plan

_LOOKUP = 0
_FACTORS = {"i4": 0.0625, "u4": 0.0625, "e2m1": 64.0, "i8": 1.0, "e4m3": 1.0}  # values over what the tensor cores multiply
_LONGEST = 1 << 16  # columns whose products with INT8 weights an int32 holds
_HOLD = 8  # pieces of eight columns of x that a thread can hold


@functools.cache
def source() -> str:
    """Return the CUDA C++ source."""
    return skinny.text("pieces.cu") + skinny.text("one.cu")


def x_bytes(read: Plan, quantizer: tuple[int, int]) -> int:
    """Return the shared memory of one step of x, with what stands beside it. Names as in `one.cu`."""
    floats, four, scaled = read.kind == "e4m3" or (read.kind == "e2m1" and not _LOOKUP), read.each == 32, read.scale != "none"
    groups = max(4 * read.each // read.group, 1) if scaled else 1
    digits = 1 if floats or (read.kind == "i8" and quantizer[0] == 2 and not scaled) else 4
    quads = (2 if four else 1) * (2 if floats else 1)
    entries = (2 if groups >= 4 else 1) * (2 if groups == 8 else 1) if read.kind in ("i4", "u4") else 0
    return quads * (digits * 64 + (16 if groups > 1 else 0)) + entries * 64


@functools.lru_cache(maxsize=4096)
def planned(
    read: Plan, n: int, k: int, half: bool, stype: int, s_row: int, quantizer: tuple[int, int], c: tables.One
) -> skinny.Launch:
    """Return how to launch the kernel."""
    step = 4 * read.each
    steps = math.ceil(k / step)
    begins = [s * steps // c.splits for s in range(c.splits + 1)]
    wide = list(zip(begins, begins[1:], strict=False))
    spans = [(b + w * (e - b) // c.WK, b + (w + 1) * (e - b) // c.WK) for b, e in wide for w in range(c.WK)]
    s_bytes, longest = skinny.scale_bytes(read, stype, True, 1, spans), max(e - b for b, e in wide)
    in_x = (longest * x_bytes(read, quantizer) + 127) // 128 * 128
    threads = 32 * c.WK * c.WR
    values = {
        **skinny.constants(read, half, stype, s_row, quantizer, True, spans, k),
        **{"R": 1, "NT": 1, "WK": c.WK, "WR": c.WR, "S": c.S, "DEPTH": c.DEPTH},
        "SCALED": int(read.scale != "none"),
        "FP4INT": _LOOKUP,
        "FACTOR": f"{0.5 if read.kind == 'e2m1' and _LOOKUP else _FACTORS[read.kind]}f",
        "RAGGED": int(k % step > 0),
        "EVEN": int(all((e - b) % c.S == 0 for b, e in spans)),
        "HOLD": min(math.ceil(longest * step / 8 / threads), _HOLD),
    }
    named = tuple((name, str(value)) for name, value in values.items())
    shared = in_x + c.WK * c.WR * (c.DEPTH * c.S * 1024 + s_bytes)
    tiles = math.ceil(n / (16 * c.WR))
    parts = tiles * c.WR * c.splits * 128 if c.splits > 1 else 0
    return skinny.Launch(named, (tiles, c.splits, 1), threads, shared, in_x, s_bytes, tiles * c.WR, parts)


def serves(read: Plan, capability: tuple[int, int]) -> bool:
    """Return whether a GPU of this compute capability has the instructions."""
    return capability >= (8, 9) or read.kind in ("i4", "u4", "i8")


@functools.lru_cache(maxsize=4096)
def choose(read: Plan, n: int, k: int, processors: int, memory: tuple[int, int]) -> tables.One | None:
    """Return the configuration on a GPU with `memory` (a block's, a multiprocessor's shared bytes), or None."""
    steps, stype = math.ceil(k / (4 * read.each)), skinny.type_of(read)
    found: list[tuple[float, tables.One]] = []
    if k > _LONGEST:
        return None
    for wk, wr, splits in itertools.product(tables.ALONG_K, tables.ALONG_ROWS, (1, 2, 4, 8)):
        warps, mine = wk * wr, steps / (wk * splits)
        if not 4 <= warps <= 16 or mine < 1:
            continue
        for stage, depth in tables.STAGES[4 if read.each == 32 else 8]:
            if mine < stage * depth:
                continue
            c = tables.One(wk, wr, stage, depth, splits)
            launch = planned(read, n, k, False, stype, max(k // read.group, 1), (0, 0), c)
            if launch.shared > memory[0] - 4096:
                continue
            fit = min(memory[1] // (launch.shared + 4096), 48 // warps, 20)
            each = launch.grid[0] * splits / processors
            rounds = math.ceil(each / fit)
            even = each / math.ceil(each) if each <= fit else each / fit / rounds
            active = min(fit, math.ceil(each)) * warps
            score = even * min(1.0, active / 14) - 0.02 * math.ceil(each) - 0.001 * max(14 - active, (active - 14) / 4 - 1)
            score *= mine / math.ceil(mine)
            found.append((score - 0.5 * (splits > 1) - 0.1 * (rounds > 1) - 0.02 * (stage * depth < 4 or mine % stage > 0), c))
            break
    return max(found, key=lambda f: f[0])[1] if found else None


def product(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    post: Tensor,
    bias: Tensor | None,
    n: int,
    read: Plan,
    config: tables.One,
    quantizer: tuple[int, int] = (0, 0),
    amax: Tensor | None = None,
) -> Tensor:
    """Return q(x) W^T + bias, [1, n] in the dtype of `x` [1, K]. Arguments as in `skinny.product`."""
    k, device = x.shape[1], x.device
    s_row = scales.shape[-1] if scales.dim() >= 2 else 1
    plan = planned(read, n, k, x.dtype == torch.float16, skinny.TYPES[scales.dtype], s_row, quantizer, config)
    kernel = cuda.compiled(source(), "one", plan.constants, device)
    y = torch.empty((1, n), dtype=x.dtype, device=device)
    parts = torch.empty(plan.parts, device=device) if plan.parts else None
    locks = take(device, plan.tiles) if plan.parts else None
    stream = torch.cuda.current_stream(device).cuda_stream
    boxes = skinny.boxes_of(codes, n, k, read, 16, config.S) if kernel.overlapped else cuda.Boxes()
    tensors = (boxes, x, codes, scales, zeros, post, amax, bias, y, parts, locks)
    kernel.launch(plan.grid, plan.block, plan.shared, stream, (*tensors, n, k, s_row, plan.x_bytes, plan.s_bytes))
    return y
