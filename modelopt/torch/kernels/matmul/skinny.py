"""y = q(x) W^T + b for few rows of x: plans and launches `skinny.cu`."""

from __future__ import annotations

import functools
import itertools
import math
import pathlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modelopt.torch.kernels.matmul import cuda, tables
from modelopt.torch.kernels.matmul.locks import take
from modelopt.torch.kernels.matmul.plan import Plan

_KINDS = {"i4": 0, "u4": 1, "e2m1": 2, "i8": 3, "e4m3": 4}
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float8_e4m3fn: 3, torch.uint8: 4}
_POST = {"none": 0, "one": 1, "rows": 2}
_BYTES = (4, 2, 2, 1, 1)


@functools.cache
def text(name: str) -> str:
    """Return the text of a file beside this one."""
    return pathlib.Path(__file__).with_name(name).read_text()


@functools.cache
def source() -> str:
    """Return the CUDA C++ source."""
    return text("pieces.cu") + text("skinny.cu")


def _scaled(read: Plan, sums: bool) -> int:
    """Return where scales of blocks meet the product: 0 nowhere, 1 the sums of a step, 2 the weights."""
    on_sums = sums and read.scale == "f32" and read.group % (4 * read.each) == 0
    return 0 if read.scale == "none" else 1 if on_sums else 2


def _groups(read: Plan, spans: list[tuple[int, int]], k: int = 0) -> list[tuple[int, int]]:
    """Return (number, first) of the groups of each span of steps; only those of the first `k` columns, if given."""
    step, g = 4 * read.each, read.group
    return [((min(e * step, k or e * step) - 1) // g - b * step // g + 1, b * step // g) for b, e in spans]


def scale_bytes(read: Plan, stype: int, sums: bool, tiles: int, spans: list[tuple[int, int]]) -> int:
    """Return the shared memory for the scales and zero points of 16 `tiles` rows and the longest of the `spans` of steps."""
    most = max(g for g, _ in _groups(read, spans))
    zeros = _padded(most) if read.kind == "u4" else 0
    return 16 * tiles * (_padded(most * _BYTES[stype]) + zeros) if _scaled(read, sums) else 0


def constants(
    read: Plan,
    half: bool,
    stype: int,
    s_row: int,
    quantizer: tuple[int, int],
    sums: bool,
    spans: list[tuple[int, int]],
    k: int = 0,
) -> dict[str, int | str]:
    """Return the constants that all kernels share."""
    size, groups = _BYTES[stype], _groups(read, spans, k)
    return {
        "KIND": _KINDS[read.kind],
        "HALF": int(half),
        "SCALED": _scaled(read, sums),
        "STYPE": stype,
        "G": read.group,
        "SROWS": read.scale_rows,
        "POST": _POST[read.post],
        "FACTOR": f"{read.factor}f",
        "XKIND": quantizer[0],
        "XRANGE": quantizer[1],
        "SVECTOR": _vector([s_row * size, *(g * size for g, _ in groups), *(b * size for _, b in groups)]),
        "ZVECTOR": _vector([s_row, *(g for g, _ in groups), *(b for _, b in groups)]),
    }


@dataclass(frozen=True)
class Launch:
    """One launch, planned: constants of the kernel and sizes."""

    constants: tuple[tuple[str, str], ...]
    grid: tuple[int, int, int]
    block: int
    shared: int
    x_bytes: int
    s_bytes: int
    tiles: int
    parts: int


@functools.lru_cache(maxsize=4096)
def planned(
    read: Plan,
    m: int,
    n: int,
    k: int,
    half: bool,
    stype: int,
    s_row: int,
    quantizer: tuple[int, int],
    experts: int,
    c: tables.Skinny,
) -> Launch:
    """Return how to launch the kernel for `m` rows of x, with `c` rows of tiles and warps."""
    step, nt = 4 * read.each, math.ceil(m / 8)
    steps = math.ceil(k / step)
    begins = [s * steps // c.splits for s in range(c.splits + 1)]
    wide = list(zip(begins, begins[1:], strict=False))
    spans = [(b + w * (e - b) // c.WK, b + (w + 1) * (e - b) // c.WK) for b, e in wide for w in range(c.WK)]
    s_bytes, longest = scale_bytes(read, stype, c.sums, c.R, spans), max(e - b for b, e in wide)
    sums = (longest * m + 3) // 4 * 16 if read.kind in ("i4", "u4") and _scaled(read, c.sums) == 1 else 0
    x_bytes = (longest * step * m * 2 + sums + 127) // 128 * 128
    shared = x_bytes + c.WK * c.WR * (c.DEPTH * c.S * c.R * 1024 + s_bytes)
    shared = max(shared, c.WR * (c.WK - 1) * c.R * nt * 512)
    tiles = math.ceil(n / (16 * c.R * c.WR))
    own = {"ONE": int(m == 1 and not experts), "EXPERTS": experts, "NT": nt, "R": c.R, "S": c.S, "DEPTH": c.DEPTH}
    shared_constants = constants(read, half, stype, s_row, quantizer, c.sums, spans, k)
    values = {**shared_constants, **own, "WK": c.WK, "WR": c.WR, "RAGGED": int(k % step > 0)}
    named = tuple((name, str(value)) for name, value in values.items())
    parts = tiles * c.WR * c.splits * c.R * nt * 128 if c.splits > 1 else 0
    grid = (tiles, c.splits, max(min(experts, m), 1))  # no more experts than rows have any
    return Launch(named, grid, 32 * c.WK * c.WR, shared, x_bytes, s_bytes, tiles * c.WR, parts)


@functools.lru_cache(maxsize=4096)
def choose(
    read: Plan, m: int, n: int, k: int, processors: int, memory: tuple[int, int], experts: int = 0
) -> tables.Skinny | None:
    """Return the configuration for `m` rows of x on a GPU with `memory` (a block's, a multiprocessor's shared bytes), or None.

    Blocks should fill the processors evenly, with warps enough to unpack while others wait; one that holds x is as large as fits.
    """
    steps, stype = math.ceil(k / (4 * read.each)), type_of(read)
    heavy = _scaled(read, True) == 2
    found: list[tuple[float, tables.Skinny]] = []
    for wk, wr, splits in itertools.product(tables.ALONG_K, tables.ALONG_ROWS, (1,) if experts else (1, 2, 4, 8)):
        warps, mine, uneven = wk * wr, math.ceil(steps / (wk * splits)), steps % (wk * splits) > 0
        if not 4 <= warps <= (28 if heavy and m == 1 else 16) or wk * splits > steps or uneven and steps >= tables.MANY_STEPS:
            continue
        for stage, depth in tables.STAGES[0 if warps > 16 else 4 if read.each == 32 else 8]:
            if (mine % stage and not uneven) or mine < stage * depth:
                continue
            c = tables.Skinny(1, wk, wr, stage, depth, splits)
            launch = planned(read, m, n, k, False, stype, max(k // read.group, 1), (0, 0), experts, c)
            if launch.shared > memory[0] - 1024:
                continue
            fit = min(memory[1] // (launch.shared + 2048), 48 // warps, 20)
            each = launch.grid[0] * splits * max(experts, 1) / processors
            rounds = math.ceil(each / fit)
            even = (each / math.ceil(each) if each <= fit else each / fit / rounds) * steps / (wk * splits * mine)
            active = min(fit, math.ceil(each)) * warps
            target = tables.WARPS[heavy]
            score = (
                even * min(1.0, active / target)
                - 0.02 * math.ceil(each)
                - 0.001 * max(target - active, (active - target) / 4 - 1)
            )
            score -= 0.5 * (splits > 1) + 0.1 * (rounds > 1) + 0.06 * (stage * depth < 4) + 0.1 * (stage == 1)
            if steps < tables.MANY_STEPS:  # latency is all: few steps in a row, blocks on every processor
                score = -0.35 * mine - 0.3 * max(each - 1, 0) - 0.02 * warps - 0.5 * (splits > 1)
            found.append((score, c))
            break
    return max(found, key=lambda f: f[0])[1] if found else None


def type_of(read: Plan) -> int:
    """Return the constant STYPE of the usual storage of a plan's scales."""
    return {"e4m3": 3, "e8m0": 4}.get(read.scale, 0)


@functools.cache
def memory(device: torch.device) -> tuple[int, int]:
    """Return the shared bytes of a block at most, and of a multiprocessor."""
    found: Any = torch.cuda.get_device_properties(device)
    return found.shared_memory_per_block_optin, found.shared_memory_per_multiprocessor


@functools.cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def why_not(x: Tensor) -> str | None:
    """Return why the kernel cannot serve inputs like `x`, or None."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"the input is {x.dtype}; the kernels for few rows take bfloat16 and float16"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "the kernels for few rows need compute capability 8"
    return cuda.why_not(x.device)


def scales_of(weight: list[Tensor], read: Plan) -> tuple[Tensor, Tensor]:
    """Return (scales of blocks, float32 scales of rows or of the matrix) among the parts of a packed weight."""
    post = weight[2] if read.scale == "e4m3" else weight[1]
    return weight[1], post.float() if read.post != "none" else post


def _padded(size: int) -> int:
    return (size + 15) // 16 * 16 | 16


def _vector(sizes: list[int]) -> int:
    return next(v for v in (16, 4, 1) if all(s % v == 0 for s in sizes))


def boxes_of(codes: Tensor, n: int, k: int, read: Plan, rows: int, steps: int) -> cuda.Boxes:
    """Return the map of the codes [n, k] for boxes of `rows` rows and `steps` steps; of one step where K ends within one."""
    size = k * (4 if read.each == 32 else 8) // 8
    if size % 64:
        return cuda.boxes(codes, (size, n), (size,), (64, rows))
    return cuda.boxes(codes, (64, n, size // 64), (size, 64), (64, rows, steps))


def product(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    post: Tensor,
    bias: Tensor | None,
    n: int,
    read: Plan,
    config: tables.Skinny,
    quantizer: tuple[int, int] = (0, 0),
    amax: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Return q(x) W^T + bias, [M, n] in the dtype of `x` [M, K].

    With `offsets` [E + 1] the other parts are stacked over E experts, each of which multiplies its own rows of x.
    """
    m, k = x.shape
    experts = 0 if offsets is None else offsets.shape[0] - 1
    s_row = scales.shape[-1] if scales.dim() >= (3 if experts else 2) else 1
    s_expert = scales.numel() // experts if experts else 0
    plan = planned(read, m, n, k, x.dtype == torch.float16, TYPES[scales.dtype], s_row, quantizer, experts, config)
    kernel = cuda.compiled(source(), "skinny", plan.constants, x.device)
    y = (torch.zeros if experts else torch.empty)((m, n), dtype=x.dtype, device=x.device)
    parts = torch.empty(plan.parts, device=x.device) if plan.parts else None
    locks = take(x.device, plan.tiles) if plan.parts else None
    stream = torch.cuda.current_stream(x.device).cuda_stream
    boxes = boxes_of(codes, max(experts, 1) * n, k, read, 16 * config.R, config.S) if kernel.overlapped else cuda.Boxes()
    tensors = (boxes, x, codes, scales, zeros, post, amax, bias, y, parts, locks, offsets)
    kernel.launch(plan.grid, plan.block, plan.shared, stream, (*tensors, m, n, k, s_row, s_expert, plan.x_bytes, plan.s_bytes))
    return y
