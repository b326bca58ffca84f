"""y = q(x) W^T + b for some tens of rows of x: plans and launches `prepare.cu` and `broad.cu`."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt.torch.kernels.matmul import cuda, skinny, tables
from modelopt.torch.kernels.matmul.locks import take
from modelopt.torch.kernels.matmul.plan import Plan


def why_not(x: Tensor) -> str | None:
    """Return why the kernels cannot serve inputs like `x`, or None."""
    if torch.cuda.get_device_capability(x.device)[0] != 9:
        return "the kernels for tens of rows need the tensor cores of compute capability 9 (Hopper)"
    return skinny.why_not(x)


def wgmma(tiles: int, half: bool) -> str:
    """Return the device function of m64nNk16 with A in registers, for N = 8 `tiles`."""
    count, types = 4 * tiles, "f16.f16" if half else "bf16.bf16"
    sums = ", ".join(f"%{i}" for i in range(count))
    a = ", ".join(f"%{count + i}" for i in range(4))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return (
        "__device__ __forceinline__ void wgmma(float* d, const u32* a, u64 b, int add) {\n"
        f'  asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{count + 5}, 0;\\n"\n'
        f'      "wgmma.mma_async.sync.aligned.m64n{8 * tiles}k16.f32.{types} {{{sums}}}, {{{a}}}, %{count + 4}, p, 1, 1, 0; }}"\n'
        f'      : {outputs} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));\n}}\n'
    )


@functools.cache
def source(tiles: int, half: bool) -> str:
    """Return the CUDA C++ source of the product for 8 `tiles` rows of x a block."""
    return skinny.text("pieces.cu") + wgmma(tiles, half) + skinny.text("broad.cu")


@dataclass(frozen=True)
class Launch:
    """Both launches, planned."""

    preparing: tuple[tuple[str, str], ...]
    preparing_grid: tuple[int, int, int]
    threads: int
    constants: tuple[tuple[str, str], ...]
    grid: tuple[int, int, int]
    shared: int
    s_bytes: int
    tiles: int
    parts: int


@functools.lru_cache(maxsize=4096)
def planned(
    read: Plan, m: int, n: int, k: int, half: bool, stype: int, s_row: int, quantizer: tuple[int, int], c: tables.Broad
) -> Launch:
    """Return how to launch the kernels for `m` rows of x."""
    step, steps = 4 * read.each, k // (4 * read.each)
    spans = [(s * steps // c.splits, (s + 1) * steps // c.splits) for s in range(c.splits)]
    shared = {**skinny.constants(read, half, stype, s_row, quantizer, c.sums, spans), "SHIFTED": 0}
    s_bytes = skinny.scale_bytes(read, stype, c.sums, 1, spans)
    tiles, blocks = math.ceil(n / (64 * c.GROUPS)), math.ceil(m / (8 * c.NT))
    constants = {**shared, "NT": c.NT, "R": 1, "GROUPS": c.GROUPS, "DEPTH": c.DEPTH}
    memory = c.DEPTH * (c.GROUPS * 4096 + c.NT * 16 * step) + 4 * c.GROUPS * s_bytes
    count = tiles * blocks * 4 * c.GROUPS
    alone = quantizer[0] > 0 and quantizer[1] == 1  # a row's range is found by one block
    threads = min(math.ceil(steps / 8) * 32, 1024) if alone else 128
    hold = math.ceil(4 * steps / threads) if alone else 1
    return Launch(
        tuple((name, str(v)) for name, v in {**shared, "NT": c.NT, "R": 1, "THREADS": threads, "HOLD": hold}.items()),
        (m, 1, 1) if alone else (math.ceil(m / 8), math.ceil(steps / 4), 1),
        threads,
        tuple((name, str(v)) for name, v in constants.items()),
        (tiles, c.splits, blocks),
        memory,
        s_bytes,
        count,
        count * c.splits * c.NT * 128 if c.splits > 1 else 0,
    )


@functools.lru_cache(maxsize=4096)
def choose(read: Plan, m: int, n: int, k: int, processors: int, memory: tuple[int, int]) -> tables.Broad | None:
    """Return the configuration for `m` rows of x on a GPU with `memory` (a block's, a multiprocessor's shared bytes), or None."""
    stype, steps = skinny.type_of(read), k // (4 * read.each)
    nt = next((t for t in tables.TILES if 8 * t >= m), tables.TILES[-1])
    most = 2 if nt > tables.LONG[4 if read.each == 32 else 8] and n >= tables.BLOCKS[2] * 128 * processors or nt > 8 else 1
    many = 4 < nt <= tables.SUMS_TILES and read.scale == "f32" and read.group % (4 * read.each) == 0
    for groups, splits in itertools.product((most, 1), (1, 2, 4, 8, 16, 32)):
        tiles = math.ceil(n / (64 * groups))
        # many sums of steps are better served by one block with a deep ring, where that keeps nearly all processors busy
        one = many and groups == 1 and tables.BLOCKS[2] * processors <= tiles * splits <= processors
        wanted = tables.BLOCKS[2 if one else groups] * processors / tiles
        room = 2 * splits * tiles <= (2 if groups == 1 else 1) * processors  # for twice as many at once
        if (splits < wanted and steps >= 16 * splits and room) or steps < splits:
            continue
        for depth in (d for d in tables.DEPTHS if d <= 8 or groups == 2):
            c = tables.Broad(nt, groups, depth, splits, nt <= tables.SUMS_TILES)
            launch = planned(read, m, n, k, False, stype, max(k // read.group, 1), (0, 0), c)
            two = groups == 1 and nt <= 8 and depth > 4 and not one
            if launch.shared <= min(memory[0], memory[1] // (2 if two else 1)) - 2048:
                return c
    return None


def product(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    post: Tensor,
    bias: Tensor | None,
    n: int,
    read: Plan,
    config: tables.Broad,
    quantizer: tuple[int, int] = (0, 0),
    amax: Tensor | None = None,
) -> Tensor:
    """Return q(x) W^T + bias, [M, n] in the dtype of `x` [M, K]. Arguments as in `skinny.product`."""
    (m, k), half, c, device = x.shape, x.dtype == torch.float16, config, x.device
    s_row = scales.shape[-1] if scales.dim() >= 2 else 1
    plan = planned(read, m, n, k, half, skinny.TYPES[scales.dtype], s_row, quantizer, c)
    prepare = cuda.compiled(skinny.text("pieces.cu") + skinny.text("prepare.cu"), "prepare", plan.preparing, device)
    kernel = cuda.compiled(source(c.NT, half), "broad", plan.constants, device)
    rows, steps = math.ceil(m / (8 * c.NT)) * 8 * c.NT, k // (4 * read.each)
    ready = torch.empty(rows * k, dtype=x.dtype, device=device)
    x_scales = torch.empty(rows, device=device) if quantizer[0] else None
    y = torch.empty((m, n), dtype=x.dtype, device=device)
    parts = torch.empty(plan.parts, device=device) if plan.parts else None
    locks = take(device, plan.tiles) if plan.parts else None
    size = 64 * steps
    stream = torch.cuda.current_stream(device).cuda_stream
    prepare.launch(plan.preparing_grid, plan.threads, 0, stream, (x, amax, ready, x_scales, k, m))
    boxes = cuda.boxes(codes, (64, n, steps), (size, 64), (64, 64 * c.GROUPS, 1))
    tensors = (boxes, ready, x_scales, scales, zeros, post, bias, y, parts, locks)
    kernel.launch(plan.grid, 128 * c.GROUPS + 32, plan.shared, stream, (*tensors, m, n, k, s_row, plan.s_bytes))
    return y
