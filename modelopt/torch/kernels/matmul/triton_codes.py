"""Codes times codes, INT8 or FP8:  y[m, n] = sx[m] sw[n] sum_k x[m, k] w[n, k] + b[n],  int8 sums exact in int32.

    legend  M x K codes of x, N x K of W; a program has BM x BN sums, BK columns of K a step; with experts, matrix e for rows
            offsets[e] to offsets[e + 1]

Both operands are read by the tensor memory accelerator. Programs walk the tiles in groups of rows, so that a wave of them shares
its operands in the L2 cache. Where tiles are too few for the processors, K is dealt to SPLITS programs, the last of which to
arrive adds the partial sums, in a fixed order.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-return"
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from modelopt.torch.kernels.matmul import tables
from modelopt.torch.kernels.matmul.locks import take


@triton.jit
def _expert(offsets_ptr, tile, E, EXPERTS: tl.constexpr, BM: tl.constexpr):
    """Return (expert, first row, row after the last) of a tile; an expert E has no rows."""
    experts = tl.arange(0, EXPERTS)
    begins = tl.load(offsets_ptr + experts, mask=experts < E, other=0)
    ends = tl.load(offsets_ptr + experts + 1, mask=experts < E, other=0)
    tiles = (ends - begins + BM - 1) // BM
    e = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(experts < e, tiles, 0), 0)
    first = tl.sum(tl.where(experts == e, begins, 0), 0) + (tile - before) * BM
    return tl.minimum(e, E), first, tl.sum(tl.where(experts == e, ends, 0), 0)


@triton.jit
def _codes(
    x_desc,
    w_desc,
    y_ptr,
    sx_ptr,
    sw_ptr,
    bias_ptr,
    offsets_ptr,
    parts_ptr,
    locks_ptr,
    M,
    N,
    K,
    E,
    rows,
    INT: tl.constexpr,
    PER_ROW: tl.constexpr,
    PER_COLUMN: tl.constexpr,
    BIAS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
):
    pid, split, columns = tl.program_id(0), tl.program_id(1), tl.cdiv(N, BN)
    top = pid // (GROUP * columns) * GROUP
    high = min(rows - top, GROUP)
    tile = top + pid % (GROUP * columns) % high
    j = pid % (GROUP * columns) // high
    if EXPERTS:
        e, first, last = _expert(offsets_ptr, tile, E, EXPERTS, BM)
        if e == E:
            return
    else:
        e, first, last = 0, tile * BM, M
    steps = tl.cdiv(K, BK)
    begin, count = split * steps // SPLITS, (split + 1) * steps // SPLITS - split * steps // SPLITS
    acc = tl.zeros((BM, BN), tl.int32 if INT else tl.float32)
    for i in range(begin, begin + count):
        a = x_desc.load([first, i * BK])
        b = w_desc.load([e * N + j * BN, i * BK])
        acc = tl.dot(a, b.T, acc, out_dtype=tl.int32 if INT else tl.float32)
    m, n = first + tl.arange(0, BM), j * BN + tl.arange(0, BN)
    if SPLITS > 1:
        size = BM * BN
        parts = parts_ptr + (pid * SPLITS).to(tl.int64) * size + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        tl.store(parts + split * size, acc)
        tl.debug_barrier()
        if tl.atomic_add(locks_ptr + pid, 1, sem="acq_rel") != SPLITS - 1:
            return
        acc = tl.zeros((BM, BN), tl.int32 if INT else tl.float32)
        for s in tl.static_range(SPLITS):
            acc += tl.load(parts + s * size, cache_modifier=".cg")
        tl.store(locks_ptr + pid, 0)
    sx = tl.load(sx_ptr + m, mask=m < last, other=0.0)[:, None] if PER_ROW else tl.load(sx_ptr)
    if PER_COLUMN:
        sw = tl.load(sw_ptr + e * N + n, mask=n < N, other=0.0)[None, :]
    else:
        sw = tl.load(sw_ptr + e)
    y = acc.to(tl.float32) * sx * sw
    if BIAS:
        y += tl.load(bias_ptr + e * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    offsets = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=(m < last)[:, None] & (n < N)[None, :])


def codes_product(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    config: tables.Codes,
    offsets: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Return the scaled product of codes `x` [M, K] and `w` [N, K] (int8 or e4m3) in `dtype` [M, N]; scales: one, or one per row.

    With `offsets` [E + 1] `w` is [E, N, K] and `w_scale` has one scale, or N, for each expert; rows of nobody are zero.
    """
    (m, k), n, c = x.shape, w.shape[-2], config
    experts = 0 if offsets is None else offsets.shape[0] - 1
    y = (torch.zeros if experts else torch.empty)((m, n), dtype=dtype, device=x.device)
    rows, columns, integer = math.ceil(m / c.BM) + experts, math.ceil(n / c.BN), x.dtype == torch.int8
    split = c.splits > 1
    size = rows * columns * c.splits * c.BM * c.BN if split else 1
    parts = torch.empty(size, dtype=torch.int32 if integer else torch.float32, device=x.device)
    _codes[(rows * columns, c.splits)](
        TensorDescriptor(x, [m, k], [k, 1], [c.BM, c.BK]),
        TensorDescriptor(w, [w.numel() // k, k], [k, 1], [c.BN, c.BK]),
        y,
        x_scale,
        w_scale,
        y if bias is None else bias,
        y if offsets is None else offsets,
        parts,
        take(x.device, rows * columns) if split else parts,
        m,
        n,
        k,
        experts,
        rows,
        INT=integer,
        PER_ROW=x_scale.numel() > 1,
        PER_COLUMN=w_scale.numel() > max(experts, 1),
        BIAS=bias is not None,
        EXPERTS=max(2 ** math.ceil(math.log2(experts)), 2) if experts else 0,
        BM=c.BM,
        BN=c.BN,
        BK=c.BK,
        GROUP=c.group,
        SPLITS=c.splits,
        num_warps=c.warps,
        num_stages=c.stages,
    )
    return y
