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

_FACTORS = {"i4": 0.0625, "u4": 0.0625, "e2m1": 64.0, "i8": 1.0, "e4m3": 1.0}  # values over what the tensor cores multiply
_LONGEST = 1 << 16  # columns whose products with INT8 weights an int32 holds
_HOLD = 8  # pieces of eight columns of x that a thread can hold


@functools.cache
def source() -> str:
    """Return the CUDA C++ source."""
    return skinny.text("pieces.cu") + skinny.text("digits.cu") + skinny.text("one.cu")


def x_bytes(read: Plan, quantizer: tuple[int, int]) -> int:
    """Return the shared memory of one step of x, with what stands beside it. Names as in `one.cu`."""
    floats, four, scaled = read.kind in ("e2m1", "e4m3"), read.each == 32, read.scale != "none"
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
        "FACTOR": f"{_FACTORS[read.kind]}f",
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


def _time(read: Plan, n: int, k: int, launch: skinny.Launch, c: tables.One, processors: int, memory: int) -> float:
    """Return about how many microseconds a launch takes; the numbers reproduce the order of times measured on an H200."""
    warps, mine = c.WK * c.WR, math.ceil(k / (4 * read.each)) / (c.WK * c.splits)
    fit = min(memory // (launch.shared + 2048), 48 // warps, 20)
    each = launch.grid[0] * c.splits / processors
    blocks = each + fit / 2 if each > fit else math.ceil(each)  # of a multiprocessor
    active = min(fit, math.ceil(each)) * warps
    size = warps * math.ceil(mine) * blocks * (1 + 0.03 * (mine % c.S > 0) + 0.08 * (c.S == 1 and mine > 4))  # KB of W
    under_way = size if mine <= c.S * c.DEPTH else active * c.S * c.DEPTH * (0.75 if c.DEPTH == 1 else 1.0)
    unpack = size / active * {"e2m1": 0.25, "i4": 0.12, "u4": 0.12}.get(read.kind, 0.08)
    order = blocks * math.ceil(k / 8 / c.splits / launch.block) * warps * (0.01 if read.kind in ("e2m1", "e4m3") else 0.03)
    alone = each > 1 and fit == 1  # nothing goes on while the next block starts
    flow = max(n * k / (2 if read.each == 32 else 1) / 4.5e6, size / (38 * min(1.0, under_way / 56)), unpack)
    pair = 0.3 * (1 < each <= 2 and read.kind in ("e4m3", "e2m1"))  # FP8 28672 x 8192: 62 to 108 us, not 58
    start = 0.8 + pair + (math.ceil(each) - 1) * (1.5 if alone else 0.1 * warps) + 2.0 * (c.splits > 1)
    uneven = 0.3 * (read.kind == "e2m1" and active % 4 > 0)  # one of the four schedulers has less to unpack
    return start + flow + 0.2 * unpack + uneven + order * (1.0 if alone else 0.5) + 0.02 * mine + 0.04 * active


@functools.lru_cache(maxsize=4096)
def choose(read: Plan, n: int, k: int, processors: int, memory: tuple[int, int]) -> tables.One | None:
    """Return the configuration on a GPU with `memory` (a block's, a multiprocessor's shared bytes), or None.

    Blocks should fill the processors evenly, with enough of W under way; each brings x into its order anew.
    """
    steps, stype = math.ceil(k / (4 * read.each)), skinny.type_of(read)
    found: list[tuple[float, tables.One]] = []
    for wk, wr, splits in itertools.product(tables.ALONG_K, tables.ALONG_ROWS, (1, 2)):
        mine = steps / (wk * splits)
        if not 4 <= wk * wr <= 16 or mine < 1 or k > _LONGEST:
            continue
        for i, (stage, depth) in enumerate(tables.ONE_STAGES[read.kind]):
            c = tables.One(wk, wr, stage, depth, splits)
            launch = planned(read, n, k, False, stype, max(k // read.group, 1), (0, 0), c)
            if math.ceil(mine) >= stage * depth and launch.shared <= memory[0] - 2048:
                found.append((_time(read, n, k, launch, c, processors, memory[1]) + 0.01 * i, c))
    return min(found, key=lambda f: f[0])[1] if found else None


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
