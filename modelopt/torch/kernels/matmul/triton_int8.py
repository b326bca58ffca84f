"""INT8 codes times INT8 codes:  y[m, n] = sx[m] sw[n] sum_k x[m, k] w[n, k] + b[n],  the sum exact in int32.

Both operands are read by the tensor memory accelerator; programs walk the tiles in groups of rows, so that a wave of them shares
its operands in the L2 cache.
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


@triton.jit
def _int8(
    x_desc,
    w_desc,
    y_ptr,
    sx_ptr,
    sw_ptr,
    bias_ptr,
    M,
    N,
    K,
    PER_ROW: tl.constexpr,
    PER_COLUMN: tl.constexpr,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    pid = tl.program_id(0)
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = pid // (GROUP * columns) * GROUP
    high = min(rows - first, GROUP)
    i = first + pid % (GROUP * columns) % high
    j = pid % (GROUP * columns) // high
    acc = tl.zeros((BM, BN), tl.int32)
    for k in range(0, tl.cdiv(K, BK)):
        a = x_desc.load([i * BM, k * BK])
        b = w_desc.load([j * BN, k * BK])
        acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)
    m, n = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN)
    sx = tl.load(sx_ptr + m, mask=m < M, other=0.0)[:, None] if PER_ROW else tl.load(sx_ptr)
    sw = tl.load(sw_ptr + n, mask=n < N, other=0.0)[None, :] if PER_COLUMN else tl.load(sw_ptr)
    y = acc.to(tl.float32) * sx * sw
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    offsets = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptr + offsets, y.to(tl.bfloat16), mask=(m < M)[:, None] & (n < N)[None, :])


def int8_product(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, config: tables.Int8Config | None = None
) -> Tensor:
    """Return the scaled product of int8 `x` [M, K] and `w` [N, K] as bfloat16 [M, N]; scales: one, or one per row."""
    (m, k), n = x.shape, w.shape[0]
    c = config or tables.int8_config(m, n, k)
    y = torch.empty((m, n), dtype=torch.bfloat16, device=x.device)
    _int8[(math.ceil(m / c.BM) * math.ceil(n / c.BN),)](
        TensorDescriptor(x, [m, k], [k, 1], [c.BM, c.BK]),
        TensorDescriptor(w, [n, k], [k, 1], [c.BN, c.BK]),
        y,
        x_scale,
        w_scale,
        y if bias is None else bias,
        m,
        n,
        k,
        PER_ROW=x_scale.numel() > 1,
        PER_COLUMN=w_scale.numel() > 1,
        BIAS=bias is not None,
        BM=c.BM,
        BN=c.BN,
        BK=c.BK,
        GROUP=c.group,
        num_warps=c.warps,
        num_stages=c.stages,
    )
    return y
