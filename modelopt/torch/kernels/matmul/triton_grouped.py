"""Products of sorted rows with the packed matrices of their experts, all experts in one launch.

    y[i] = sx[i] (x[i] W_e^T) sw_e + b_e    for offsets[e] <= i < offsets[e + 1]

    legend  T rows of x in all, E experts, N x K their matrices; BM rows x BN columns of y a program, BK columns of K a step

A program finds its expert from the offsets, so the host need not know them: there are ceil(T / BM) + E rows of programs, and
those left over return. Weights are decoded to the law's values (code times scale in float32, rounded to x's dtype), or, CODES,
multiplied as they are. Any GPU that Triton serves, float16, bfloat16 and float32.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-return"
from __future__ import annotations

import triton
import triton.language as tl

NAN = tl.constexpr(0x7FC00000)  # bits of a float32


@triton.jit
def values_of(code, zero, KIND: tl.constexpr):
    """Return the float32 values of codes (unsigned integers): bits in place, for converting integers takes four times as long."""
    c = code.to(tl.int32)
    if KIND == "i8":
        v = ((c ^ 0x80) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0  # 2^23 + 128
    elif KIND == "e4m3":
        v = (((c & 0x7F) << 20) | ((c & 0x80) << 24)).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    elif KIND == "e2m1":
        v = (((c & 7) << 22) | ((c & 8) << 28)).to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
    elif KIND == "u4":
        v = (c | 0x4B000000).to(tl.float32, bitcast=True) - (zero | 0x4B000000).to(tl.float32, bitcast=True)
    else:
        v = ((c ^ 8) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0  # 2^23 + 8
    return v


@triton.jit
def _per_group(pointer, row_n, k0, S_ROW, top, live, ROWS: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, SCALE: tl.constexpr):
    """Load what groups of a tile share, [BN, BK] or [BN, 1]: scales as float32, or (SCALE "zero") int32 zero points."""
    BN: tl.constexpr = row_n.shape[0]
    base = pointer + (row_n // ROWS).to(tl.int64)[:, None] * S_ROW
    if G >= BK:
        raw = tl.load(base + k0 // G, mask=live[:, None], other=0)
    else:
        at = k0 // G + tl.arange(0, BK // G)
        raw = tl.load(base + at[None, :], mask=live[:, None] & (at < S_ROW)[None, :], other=0)
    if SCALE == "zero":
        s = raw.to(tl.int32)
    elif SCALE == "e8m0":
        c = raw.to(tl.int32)
        s = tl.where(c == 0, 0x00400000, tl.where(c == 255, NAN, c << 23)).to(tl.float32, bitcast=True)
    elif SCALE == "e4m3":
        c = raw.to(tl.int32) & 0x7F
        s = tl.where(c == 0x7F, NAN, c << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36 * top
    else:
        s = raw.to(tl.float32)
    if G < BK:
        s = tl.broadcast_to(s[:, :, None], (BN, BK // G, G)).reshape(BN, BK)
    return s


@triton.jit
def grouped(
    x_ptr,
    sx_ptr,
    offsets_ptr,
    w_ptr,
    s_ptr,
    z_ptr,
    top_ptr,
    bias_ptr,
    y_ptr,
    E,
    N,
    K,
    S_ROW,
    S_EXPERT,
    EXPERTS: tl.constexpr,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    G: tl.constexpr,
    CODES: tl.constexpr,
    SX: tl.constexpr,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    tile, n0 = tl.program_id(1), tl.program_id(0) * BN
    experts = tl.arange(0, EXPERTS)
    begins = tl.load(offsets_ptr + experts, mask=experts < E, other=0).to(tl.int32)
    ends = tl.load(offsets_ptr + experts + 1, mask=experts < E, other=0).to(tl.int32)
    tiles = (ends - begins + BM - 1) // BM
    done = tl.cumsum(tiles, 0)
    e = tl.sum((done <= tile).to(tl.int32), 0)
    if e >= E:
        return
    first = tl.sum(tl.where(experts == e, begins, 0), 0)
    last = tl.sum(tl.where(experts == e, ends, 0), 0)
    first += (tile - tl.sum(tl.where(experts < e, tiles, 0), 0)) * BM
    m, n = first + tl.arange(0, BM), n0 + tl.arange(0, BN)
    row_n = tl.minimum(n, N - 1)
    live = n < N
    four: tl.constexpr = KIND == "i4" or KIND == "u4" or KIND == "e2m1"
    per: tl.constexpr = 2 if four else 1
    bytes_k = tl.arange(0, BK // per)
    ks = tl.arange(0, BK)
    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * K + ks[None, :]
    w_ptrs = w_ptr + e.to(tl.int64) * N * (K // per) + row_n.to(tl.int64)[:, None] * (K // per) + bytes_k[None, :]
    s_ptr += e.to(tl.int64) * S_EXPERT
    z_ptr += e.to(tl.int64) * S_EXPERT
    top = tl.load(top_ptr + e).to(tl.float32) if SCALE == "e4m3" else 1.0
    SWAP: tl.constexpr = BM >= 32  # W as the first operand: decoded values go from registers to the tensor cores
    acc = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.int32 if CODES and KIND == "i8" else tl.float32)
    for k0 in range(0, K, BK):
        x = tl.load(x_ptrs + k0, mask=(m < last)[:, None] & (ks < K - k0)[None, :], other=0.0)
        w = tl.load(w_ptrs + k0 // per, mask=(bytes_k < (K - k0) // per)[None, :], other=0)
        if CODES:
            w = w.to(tl.int8 if KIND == "i8" else tl.float8e4nv, bitcast=True)
        else:
            if four:
                w = tl.join(w & 15, w >> 4).reshape(BN, BK)
            zero = 0
            if KIND == "u4":
                zero = _per_group(z_ptr, row_n, k0, S_ROW, top, live, ROWS, G, BK, "zero")
            values = values_of(w, zero, KIND)
            w = (values * _per_group(s_ptr, row_n, k0, S_ROW, top, live, ROWS, G, BK, SCALE)).to(x.dtype)
        if SWAP:
            acc = tl.dot(w, x.T, acc, input_precision="ieee", out_dtype=acc.dtype)
        else:
            acc = tl.dot(x, w.T, acc, input_precision="ieee", out_dtype=acc.dtype)
    y = (acc.T if SWAP else acc).to(tl.float32)
    if CODES:
        y = y * tl.load(s_ptr + row_n // ROWS).to(tl.float32)[None, :]
    if SX:
        y = y * tl.load(sx_ptr + m, mask=m < last, other=0.0)[:, None]
    if BIAS:
        y = y + tl.load(bias_ptr + e.to(tl.int64) * N + row_n).to(tl.float32)[None, :]
    to = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(to, y.to(y_ptr.dtype.element_ty), mask=(m < last)[:, None] & live[None, :])
