"""y = x W^T for a packed W and up to some hundred rows of x: weights unpacked in registers, x in shared memory, wgmma.

    legend  as in `triton_narrow`, whose loads and column numbering are used; BM rows of x for each program

The warps of a program share the work of bringing a step of x into the renumbered column order. Scales are always applied to the
weights here: fewer registers than scaling the sums.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-return"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from modelopt.torch.kernels.matmul.triton_narrow import (
    combine,
    fetch,
    inputs,
    operand,
    renumber,
    word_layout,
    x_layout,
)


@gluon.jit
def _multiply(
    fetched, x, shared, acc, L: gl.constexpr, H: gl.constexpr, KIND: gl.constexpr, SCALE: gl.constexpr, WHERE: gl.constexpr,
    EACH: gl.constexpr,
):  # fmt: skip
    """Add one step to the sums: the fetched words times x, which goes through `shared`."""
    MMA: gl.constexpr = acc.type.layout
    shared.store(renumber(x, EACH).reshape([x.shape[1], 4 * EACH]))
    fence_async_shared()
    a = operand(fetched, MMA, L, H, KIND, SCALE, WHERE)
    acc = warpgroup_mma(a, shared.permute((1, 0)), acc)
    return acc


@gluon.jit(do_not_specialize=["M", "steps"])
def wide(
    x_ptr,
    w_ptr,
    s_ptr,
    z_ptr,
    post_ptr,
    bias_ptr,
    y_ptr,
    part_ptr,
    lock_ptr,
    M,
    N,
    K,
    W_ROW,
    S_ROW,
    steps,
    KIND: gl.constexpr,
    SCALE: gl.constexpr,
    G: gl.constexpr,
    S_ROWS: gl.constexpr,
    EACH: gl.constexpr,
    POST: gl.constexpr,
    FACTOR: gl.constexpr,
    BIAS: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    SPLITS: gl.constexpr,
    WARPS: gl.constexpr,
):
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 16])
    L: gl.constexpr = word_layout(1, BN, WARPS)
    H: gl.constexpr = word_layout(1, BN, WARPS, True)
    X: gl.constexpr = x_layout(1, BM, EACH, WARPS)
    S: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    WHERE: gl.constexpr = "none" if SCALE == "none" else "weights"
    tile, split = gl.program_id(0), gl.program_id(1)
    x_ptr += gl.program_id(2).to(gl.int64) * BM * K
    y_ptr += gl.program_id(2).to(gl.int64) * BM * N
    M -= gl.program_id(2) * BM
    rows = tile * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, L))))
    rows = gl.minimum(rows, N - 1)
    s_rows = rows // S_ROWS
    first = split * steps // SPLITS
    last = (split + 1) * steps // SPLITS
    shared = gl.allocate_shared_memory(gl.bfloat16, [2, BM, 4 * EACH], S)
    acc = gl.zeros([BN, BM], gl.float32, layout=MMA)
    b0 = fetch(w_ptr, s_ptr, z_ptr, rows, s_rows, rows, first, last, W_ROW, S_ROW, L, H, KIND, WHERE, G, EACH, MMA)
    b1 = fetch(w_ptr, s_ptr, z_ptr, rows, s_rows, rows, first + 1, last, W_ROW, S_ROW, L, H, KIND, WHERE, G, EACH, MMA)
    x0 = inputs(x_ptr, first, first < last, M, K, X)
    for step in range(first, last, 2):
        x1 = inputs(x_ptr, step + 1, step + 1 < last, M, K, X)
        acc = _multiply(b0, x0, shared.index(0), acc, L, H, KIND, SCALE, WHERE, EACH)
        b0 = fetch(w_ptr, s_ptr, z_ptr, rows, s_rows, rows, step + 2, last, W_ROW, S_ROW, L, H, KIND, WHERE, G, EACH, MMA)
        x0 = inputs(x_ptr, step + 2, step + 2 < last, M, K, X)
        acc = _multiply(b1, x1, shared.index(1), acc, L, H, KIND, SCALE, WHERE, EACH)
        b1 = fetch(w_ptr, s_ptr, z_ptr, rows, s_rows, rows, step + 3, last, W_ROW, S_ROW, L, H, KIND, WHERE, G, EACH, MMA)
    slot = tile + gl.program_id(2) * gl.num_programs(0)
    combine(acc, tile, slot, split, post_ptr, bias_ptr, y_ptr, part_ptr, lock_ptr, M, N, POST, FACTOR, BIAS, SPLITS)
