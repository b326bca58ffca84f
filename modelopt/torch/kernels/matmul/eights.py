"""y = q(x) W^T + b, codes of 8 bits times codes of 8 bits: plans and launches `eights_x.cu` and `eights.cu`."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt.torch.kernels.matmul import cuda, skinny, tables
from modelopt.torch.kernels.matmul.locks import gate, take
from modelopt.torch.kernels.matmul.plan import Plan

_RESERVED = 3072  # bytes of shared memory that a block does not get
_PIECE = 16  # columns of x that a thread rounds at a time
_LONGEST = 1 << 16  # columns whose products of INT8 codes an int32 holds, and of which a block of threads holds a row


def why_not(x: Tensor, read: Plan, quantizer: tuple[int, int] | None, n: int) -> str | None:
    """Return why the kernels cannot serve q(x) W^T, [M, n], or None. `quantizer`: the constants XKIND and XRANGE, or None."""
    k = x.shape[-1]
    m = x.numel() // k
    if torch.cuda.get_device_capability(x.device)[0] != 9:
        return "the kernels for codes times codes need the tensor cores of compute capability 9 (Hopper)"
    if quantizer is None or read.scale != "none" or {1: "e4m3", 2: "i8"}.get(quantizer[0]) != read.kind:
        return (
            "codes times codes are FP8 x FP8 and INT8 x INT8, with a scale per row or one, static for the tensor or found per row"
        )
    if not tables.EIGHTS_ROWS[0] <= m <= tables.EIGHTS_ROWS[1]:
        return f"{m} rows are not between {tables.EIGHTS_ROWS[0]} and {tables.EIGHTS_ROWS[1]}"
    if k > _LONGEST:
        return f"K = {k} is too long for the sums, or for a block that sees the range of a row"
    found = choose(m, n, k, skinny.processors(x.device), skinny.memory(x.device))
    if found is None:
        return f"a weight of {n} x {k} does not fit"
    if quantizer[0] == 1 and found.PAIR == 1 and m > tables.EIGHTS_WIDE:
        return f"torch's product is faster for FP8, {m} rows, where there are as many tiles as processors"
    return skinny.why_not(x)


def wgmma(tiles: int, integer: bool) -> str:
    """Return the type of sums and the device function of m64nNk32 with both operands in shared memory, for N = 8 `tiles`."""
    count, kind = 4 * tiles, "r" if integer else "f"
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+{kind}"(d[{i}])' for i in range(count))
    types, signs = ("s32.s8.s8", "") if integer else ("f32.e4m3.e4m3", ", 1, 1")
    return (
        f"typedef {'int' if integer else 'float'} Sum;\n"
        f'#define SETTLED(v) asm volatile("" : "+{kind}"(v)::"memory")  // read behind a wait, which the compiler does not know\n'
        "__device__ __forceinline__ void wgmma(Sum* d, u64 a, u64 b) {\n"
        f'  asm volatile("{{ .reg .pred p; setp.eq.b32 p, 0, 0;\\n"\n'
        f'      "wgmma.mma_async.sync.aligned.m64n{8 * tiles}k32.{types} {{{sums}}}, %{count}, %{count + 1}, p{signs}; }}"\n'
        f'      : {outputs} : "l"(a), "l"(b));\n}}\n'
    )


@functools.cache
def source(tiles: int, integer: bool) -> str:
    """Return the CUDA C++ source of the product for 8 `tiles` rows of x."""
    return skinny.text("pieces.cu") + wgmma(tiles, integer) + skinny.text("eights.cu")


@functools.cache
def preparing() -> str:
    """Return the CUDA C++ source of what makes the codes of x."""
    return skinny.text("pieces.cu") + skinny.text("eights_x.cu")


@dataclass(frozen=True)
class Launch:
    """Both launches, planned: constants, sizes, and the parts that a tile has at most."""

    preparing: tuple[tuple[str, str], ...]
    threads: int
    pieces: int
    constants: tuple[tuple[str, str], ...]
    block: int
    grid: int
    shared: int
    locks: int
    most: int
    parts: int


@functools.lru_cache(maxsize=4096)
def planned(read: Plan, n: int, k: int, half: bool, quantizer: tuple[int, int], c: tables.Eights) -> Launch:
    """Return how to launch the kernels with x rounded by `quantizer` (constants XKIND and XRANGE)."""
    tiles, steps, warps = math.ceil(n / c.ROWS), math.ceil(k / 128 / c.BOXES), 4 * math.ceil(c.ROWS / 64)
    units, sums = tiles * steps, c.NT // c.PAIR
    blocks = c.blocks if c.PAIR == 2 else min(c.blocks, units)  # none has nothing to do
    owner = [((u + 1) * blocks - 1) // units for t in range(tiles) for u in (t * steps, (t + 1) * steps - 1)]
    most = max(e - b + 1 for b, e in zip(owner[::2], owner[1::2], strict=True))
    shared = {**skinny.constants(read, half, 0, 1, quantizer, False, [(0, 1)]), "NT": c.NT, "R": 1}
    pieces = math.ceil(k / 128) * (128 // _PIECE)
    whole = quantizer != (1, 0)  # a block sees the range of a whole row
    threads = min(math.ceil(pieces / 32) * 32, 1024 if whole else 128)
    hold = math.ceil(pieces / threads) if whole else 1
    own = {"ROWS": c.ROWS, "BOXES": c.BOXES, "DEPTH": c.DEPTH, "AHEAD": c.AHEAD, "PAIR": c.PAIR, "MOST": most}
    behind = (64 * warps // 4 - c.ROWS) * 128  # what the last warpgroup reads behind its rows
    memory = c.DEPTH * c.BOXES * (c.ROWS * 128 + c.NT * 1024) + max(behind, warps * sums * 512 if c.PAIR == 2 else 0)
    count = tiles * c.PAIR * warps if most > 1 else 0
    return Launch(
        tuple((name, str(v)) for name, v in {**shared, "THREADS": threads, "HOLD": hold}.items()),
        threads,
        math.ceil(pieces / threads / hold),
        tuple((name, str(v)) for name, v in {**shared, **own}.items()),
        32 * warps + 32,
        blocks * c.PAIR,
        memory,
        count,
        most,
        count * most * sums * 128,
    )


@functools.lru_cache(maxsize=4096)
def choose(m: int, n: int, k: int, processors: int, memory: tuple[int, int]) -> tables.Eights | None:
    """Return the configuration for `m` rows of x on a GPU with `memory` (a block's, a multiprocessor's shared bytes), or None.

    One block a multiprocessor, each with equally many steps, in whole tiles if possible; see the estimates in `tables.py`.
    """
    nt, steps = next((t for t in tables.TILES if 8 * t >= m), 0), math.ceil(k / 128)
    if not nt:
        return None
    found: list[tuple[float, tables.Eights]] = []
    for pair, rows in itertools.product((1, 2), range(128, 8, -8)):
        tiles, most, stage = math.ceil(n / rows), processors // pair, rows * 128 + nt * 1024
        if pair == 2 and tiles > most:  # a pair has one tile at most
            continue
        boxes = 2 if steps % 2 == 0 and stage <= tables.SMALL_STAGE else 1
        depth = _depth(rows, nt, pair, boxes * stage, memory[0])
        for parts in {1, max(min(most // tiles, steps // (pair * boxes)), 1)}:
            blocks = tiles * parts if tiles <= most else max(d for d in range(1, most + 1) if tiles % d == 0)
            if depth < 3 or steps * blocks * tiles >= 1 << 31:
                continue
            share = math.ceil(tiles * steps / (blocks * pair))
            mine = share * (rows * 128 + tables.X_COST * nt * 1024) / tables.RATE
            adding = (pair == 2) * (tables.PAIRED[0] + tables.PAIRED[1] * nt) + (parts > 1) * (
                tables.ADDED[0] + tables.ADDED[1] * nt
            )
            c = tables.Eights(nt, rows, boxes, depth, math.ceil(tables.AHEAD * depth), pair, blocks)
            found.append((max(n * k / tables.STREAM, mine) + 0.05 * mine + tables.STEP * share + adding, c))
    return min(found, key=lambda f: f[0])[1] if found else None


def _depth(rows: int, nt: int, pair: int, stage: int, memory: int) -> int:
    """Return how many stages of a block fit; behind them is what the last warpgroup reads, or what the other block sends."""
    groups = math.ceil(rows / 64)
    behind = max((64 * groups - rows) * 128, groups * nt * 1024 if pair == 2 else 0)
    return min((min(memory - _RESERVED, tables.RING) - behind) // stage, 32)


def product(
    x: Tensor,
    codes: Tensor,
    post: Tensor,
    bias: Tensor | None,
    n: int,
    read: Plan,
    config: tables.Eights,
    quantizer: tuple[int, int],
    amax: Tensor | None = None,
) -> Tensor:
    """Return q(x) W^T + bias, [M, n] in the dtype of `x` [M, K]. Arguments as in `skinny.product`."""
    (m, k), half, c, device = x.shape, x.dtype == torch.float16, config, x.device
    plan = planned(read, n, k, half, quantizer, c)
    prepare = cuda.compiled(preparing(), "eights_x", plan.preparing, device)
    kernel = cuda.compiled(source(c.NT, quantizer[0] == 2), "eights", plan.constants, device)
    ready = torch.empty(8 * c.NT * math.ceil(k / 128) * 128, dtype=torch.uint8, device=device)
    scales = torch.empty(m, device=device)
    y = torch.empty((m, n), dtype=x.dtype, device=device)
    parts = torch.empty(plan.parts, device=device) if plan.parts else None
    locks = take(device, plan.locks) if plan.parts else None
    stream = torch.cuda.current_stream(device).cuda_stream
    boxes = cuda.boxes(codes, (k, n), (k,), (128, c.ROWS), 3)
    door = gate(device)
    tensors = (boxes, ready, scales, post, bias, y, parts, locks, door)
    prepare.launch((m, plan.pieces, 1), plan.threads, 0, stream, (x, amax, ready, scales, door, k))
    kernel.launch((plan.grid, 1, 1), plan.block, plan.shared, stream, (*tensors, m, n, k))
    return y
