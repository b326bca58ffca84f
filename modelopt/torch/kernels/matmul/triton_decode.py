"""The packed matrices of experts back to values, in one launch, for the experts that have rows:  W[e, n, k] = code * scale.

    legend  E experts, N x K their matrices; a program has RUNS runs of 8 T values (T threads, 8 values each)

The values are the law's: code times scale in float32 (with two levels the scale is their product), rounded to the dtype of x. A
thread reads its 8 codes as one word and writes 16 bytes, both without a detour through shared memory. Experts without rows are
left out: nobody reads their values.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-return"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from modelopt.numerics import Format
from modelopt.torch.kernels.matmul.plan import kind_of
from modelopt.torch.kernels.matmul.triton_grouped import NAN, values_of

THREADS = 128
RUNS = 4


def why_not(fmt: Format, n: int, k: int, dtype: torch.dtype) -> str | None:
    """Return why this kernel does not serve matrices [n, k] of `fmt`, or None."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the values are {dtype}"
    _, group = fmt.block.sizes((n, k))
    if k % 8 or min(group, k) % 8:
        return f"blocks of {group} columns in rows of {k}: multiples of 8 are served"
    return None


@triton.jit
def _value(word, AT: tl.constexpr, zero, scale, KIND: tl.constexpr, BITS: tl.constexpr):
    """Return the value of code AT of a word."""
    code = (word >> (AT * BITS)).to(tl.int32) & ((1 << BITS) - 1)
    return values_of(code, zero, KIND) * scale


@triton.jit
def _decode(
    offsets_ptr,
    w_ptr,
    s_ptr,
    z_ptr,
    top_ptr,
    y_ptr,
    SIZE,
    K,
    S_ROW,
    S_EXPERT,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    G: tl.constexpr,
    T: tl.constexpr,
    RUNS: tl.constexpr,
):
    e = tl.program_id(1).to(tl.int64)
    if tl.load(offsets_ptr + e) == tl.load(offsets_ptr + e + 1):
        return
    top = tl.load(top_ptr + e).to(tl.float32) if SCALE == "e4m3" else 1.0
    width, chunks = K // 8, tl.cdiv(K // 8, T * RUNS)
    row, first = tl.program_id(0) // chunks, tl.program_id(0) % chunks * (T * RUNS)
    w_ptr += e * SIZE + row.to(tl.int64) * width
    y_ptr += (e * SIZE + row.to(tl.int64) * width) * 8
    cells = e * S_EXPERT + row // ROWS * S_ROW
    for run in tl.static_range(RUNS):
        at = first + run * T + tl.arange(0, T)
        here = at < width
        word = tl.load(w_ptr + at, mask=here, other=0)
        cell = cells + at * 8 // G
        raw = tl.load(s_ptr + cell, mask=here, other=0)
        zero = tl.load(z_ptr + cell, mask=here, other=0).to(tl.int32) if KIND == "u4" else 0
        if SCALE == "e8m0":
            c = raw.to(tl.int32)
            scale = tl.where(c == 0, 0x00400000, tl.where(c == 255, NAN, c << 23)).to(tl.float32, bitcast=True)
        elif SCALE == "e4m3":
            c = raw.to(tl.int32) & 0x7F
            scale = tl.where(c == 0x7F, NAN, c << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36 * top
        else:
            scale = raw.to(tl.float32)
        # in the order of the codes once it is flat: the last joined is the first bit of the number of a code
        v04 = tl.join(_value(word, 0, zero, scale, KIND, BITS), _value(word, 4, zero, scale, KIND, BITS))
        v26 = tl.join(_value(word, 2, zero, scale, KIND, BITS), _value(word, 6, zero, scale, KIND, BITS))
        v15 = tl.join(_value(word, 1, zero, scale, KIND, BITS), _value(word, 5, zero, scale, KIND, BITS))
        v37 = tl.join(_value(word, 3, zero, scale, KIND, BITS), _value(word, 7, zero, scale, KIND, BITS))
        values = tl.join(tl.join(v04, v26), tl.join(v15, v37)).reshape(T * 8)
        to = (first + run * T) * 8 + tl.arange(0, T * 8)
        tl.store(y_ptr + to, values.to(y_ptr.dtype.element_ty), mask=to < K)


def decoded(offsets: Tensor, weight: list[Tensor], fmt: Format, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """Return the matrices [E, n, k] in `dtype`; those of experts without rows stay unwritten. `why_not` has no reason."""
    experts = weight[0].shape[0]
    rows, group = fmt.block.sizes((n, k))
    two = isinstance(fmt.scale, Format)
    scale = "e4m3" if two else "e8m0" if fmt.scale.name == "e8m0" else "float"  # type: ignore[union-attr]
    scales = weight[1].view(torch.uint8) if scale != "float" else weight[1]
    values = torch.empty((experts, n, k), dtype=dtype, device=weight[0].device)
    words = weight[0].view(torch.uint8).view(torch.int32 if fmt.element.bits == 4 else torch.int64)
    runs = min(RUNS, triton.cdiv(k, 8 * THREADS))
    _decode[(n * triton.cdiv(k, 8 * THREADS * runs), experts)](
        offsets,
        words,
        scales,
        weight[-1] if fmt.zero is not None else words,
        weight[-1] if two else scales,
        values,
        n * k // 8,
        k,
        max(-(-k // group), 1),
        scales.numel() // experts,
        KIND=kind_of(fmt),
        BITS=fmt.element.bits,
        SCALE=scale,
        ROWS=min(rows, n),
        G=1 << 30 if group >= k else group,
        T=THREADS,
        RUNS=runs,
        num_warps=THREADS // 32,
    )
    return values


@triton.jit
def _finish(
    y_ptr, bias_ptr, offsets_ptr, T, N, E, BIAS: tl.constexpr, EXPERTS: tl.constexpr, PROGRAMS: tl.constexpr, BN: tl.constexpr
):
    experts = tl.arange(0, EXPERTS)
    ends = tl.load(offsets_ptr + experts + 1, mask=experts < E, other=2147483647)
    last = tl.load(offsets_ptr + E)
    for i in range(0, tl.cdiv(T, PROGRAMS)):
        row = i * PROGRAMS + tl.program_id(0)
        if row < T and (BIAS or row >= last):
            e = tl.sum((ends <= row).to(tl.int32), 0)
            for column in range(0, N, BN):
                n = column + tl.arange(0, BN)
                to = y_ptr + row.to(tl.int64) * N + n
                y = tl.load(to, mask=(n < N) & (row < last), other=0.0).to(tl.float32)
                if BIAS:
                    y += tl.load(bias_ptr + e.to(tl.int64) * N + n, mask=(n < N) & (row < last), other=0.0).to(tl.float32)
                tl.store(to, y.to(y_ptr.dtype.element_ty), mask=n < N)


def finish(y: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """Add each row its expert's bias [E, n] in place, write zeros to the rows of nobody, and return `y` [T, n]."""
    (t, n), experts = y.shape, offsets.shape[0] - 1
    programs = min(t, 512)
    _finish[(programs,)](
        y,
        y if bias is None else bias,
        offsets,
        t,
        n,
        experts,
        BIAS=bias is not None,
        EXPERTS=max(triton.next_power_of_2(experts), 2),
        PROGRAMS=programs,
        BN=1024,
        num_warps=4,
    )
    return y
