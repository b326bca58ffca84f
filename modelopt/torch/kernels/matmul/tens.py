"""y = x W^T + b for up to some tens of rows of x, in one launch: plans and launches `tens.cu`."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt.torch.kernels.matmul import broad, cuda, skinny, tables
from modelopt.torch.kernels.matmul.locks import take
from modelopt.torch.kernels.matmul.plan import Plan

_FACTOR = "64.0f"  # values of e2m1 over the float16 they become
_RESERVED = 2048  # bytes of shared memory that a block does not get


@functools.cache
def source(tiles: int, half: bool) -> str:
    """Return the CUDA C++ source of the product for 8 `tiles` rows of x a block; half: float16 is multiplied."""
    own = "".join(skinny.text(name) for name in ("operands.cu", "parts.cu", "tens.cu"))
    return skinny.text("pieces.cu") + broad.wgmma(tiles, half) + own


@dataclass(frozen=True)
class Launch:
    """One launch, planned: constants of the kernel and sizes."""

    constants: tuple[tuple[str, str], ...]
    half: bool
    grid: tuple[int, int, int]
    shared: int
    s_bytes: int
    box: tuple[int, int, int]
    swizzle: int
    locks: int
    parts: int


def _scaled(read: Plan, c: tables.Tens) -> int:
    """Return where scales of blocks meet the product: 0 nowhere, 1 sums, of 32 columns at least, 2 the weights."""
    if read.scale == "none":
        return 0
    step, g = 4 * read.each, read.group
    fits = g % step == 0 or (step == 128 and g in (32, 64))
    buffers = 1 if g % 128 == 0 else max(128 // g, 2)
    floats = read.scale == "f32" or (read.scale == "e8m0" and read.kind == "e2m1" and g == 32)
    return 1 if c.sums and floats and fits and buffers * c.NT <= 8 else 2


@functools.lru_cache(maxsize=4096)
def planned(read: Plan, m: int, n: int, k: int, half: bool, stype: int, s_row: int, c: tables.Tens) -> Launch:
    """Return how to launch the kernel for `m` rows of x."""
    each = 1 if read.each == 32 else 2  # steps of the codes in a unit
    steps, units, splits = k // (4 * read.each), math.ceil(k / 128), c.cluster * c.splits
    spans = [(s * units // splits * each, min((s + 1) * units // splits * each, steps)) for s in range(splits)]
    most, scaled = math.ceil(max(e - b for b, e in spans) / each), _scaled(read, c)
    stored = skinny.TYPES[torch.bfloat16] if read.scale == "e8m0" and scaled == 1 else stype
    s_bytes, chunked = skinny.scale_bytes(read, stored, c.sums, 1, spans), int(read.each == 32 and scaled < 2)
    floats = read.kind in ("e2m1", "e4m3") and (scaled < 2 or read.scale == "e4m3")
    warps, tiles, blocks = 4 * c.GROUPS, math.ceil(n / (64 * c.GROUPS)), math.ceil(m / (8 * c.NT))
    exchange = warps * (c.DEPTH * c.UNITS * each * 1024 + s_bytes) + most * 16 * (c.NT * 128 + 16)
    own = {
        **{"NT": c.NT, "R": 1, "GROUPS": c.GROUPS, "UNITS": c.UNITS, "DEPTH": c.DEPTH, "SPLITS": c.cluster, "PARTS": c.splits},
        **{"SCALED": scaled, "SHIFTED": 0, "CHUNKED": chunked, "FLOATS": int(floats), "MOST": most, "EXCHANGE": exchange},
        **({"FACTOR": _FACTOR} if floats and read.kind == "e2m1" else {}),
    }
    count = tiles * c.cluster * blocks * warps
    return Launch(
        tuple((name, str(v)) for name, v in {**skinny.constants(read, half, stype, s_row, (0, 0), c.sums, spans), **own}.items()),
        half or floats,
        (tiles * c.cluster, c.splits, blocks),
        exchange + (warps * c.NT // 2 * 512 if c.cluster > 1 else 0),
        s_bytes,
        (64, 16, c.UNITS * each),
        2 * chunked,
        count if c.splits > 1 else 0,
        count * c.splits * math.ceil(c.NT / c.cluster) * 128 if c.splits > 1 else 0,
    )


@functools.lru_cache(maxsize=4096)
def choose(read: Plan, m: int, n: int, k: int, processors: int, memory: tuple[int, int]) -> tables.Tens | None:
    """Return the configuration for `m` rows of x on a GPU with `memory` (a block's, a multiprocessor's shared bytes), or None.

    One wave of blocks; the less each has to do, the better, but for what adding up the parts of K takes.
    """
    nt, units = next((t for t in tables.TILES if 8 * t >= m), 0), math.ceil(k / 128)
    if not 0 < nt <= tables.TENS_TILES or k % (4 * read.each):
        return None
    found: list[tuple[float, int, int]] = []
    for groups, cost in tables.UNIT_COST.items():
        rows = math.ceil(n / (64 * groups))
        for parts in range(1, max(min(processors // rows, units // 3, 16), 1) + 1):
            adding = 0.0 if parts == 1 else tables.CLUSTER if parts == 2 else tables.ADDING[0] + parts * tables.ADDING[1]
            found.append((math.ceil(rows * parts / processors) * math.ceil(units / parts) * cost + adding, groups, parts))
    for _, groups, parts in sorted(found):
        cluster = 2 if parts % 2 == 0 and (parts == tables.PAIRS[0] or parts >= tables.PAIRS[1]) else 1
        for unit, depth in tables.RINGS[4 if read.each == 32 else 8][groups == 4 :]:
            c = tables.Tens(nt, groups, unit, depth, cluster, parts // cluster)
            launch = planned(read, m, n, k, False, skinny.type_of(read), max(k // read.group, 1), c)
            if launch.shared <= memory[0] - _RESERVED and launch.grid[0] * launch.grid[1] <= processors:
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
    config: tables.Tens,
) -> Tensor:
    """Return x W^T + bias, [M, n] in the dtype of `x` [M, K]. Arguments as in `skinny.product`."""
    (m, k), half, device = x.shape, x.dtype == torch.float16, x.device
    s_row = scales.shape[-1] if scales.dim() >= 2 else 1
    plan = planned(read, m, n, k, half, skinny.TYPES[scales.dtype], s_row, config)
    kernel = cuda.compiled(source(config.NT, plan.half), "tens", plan.constants, device)
    y = torch.empty((m, n), dtype=x.dtype, device=device)
    parts = torch.empty(plan.parts, device=device) if plan.parts else None
    locks = take(device, plan.locks) if plan.parts else None
    size = k * (4 if read.each == 32 else 8) // 8
    boxes = cuda.boxes(codes, (64, n, size // 64), (size, 64), plan.box, plan.swizzle)
    tensors = (boxes, x, scales, zeros, post, bias, y, parts, locks)
    stream = torch.cuda.current_stream(device).cuda_stream
    kernel.launch(plan.grid, 128 * config.GROUPS, plan.shared, stream, (*tensors, m, n, k, s_row, plan.s_bytes))
    return y
