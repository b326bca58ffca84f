"""The Walsh-Hadamard transform in one pass: a program holds whole blocks, and each stage of butterflies works within threads.

At most five bits of the index are transformed while they lie in a thread's registers; then the tile is laid out anew (shuffles or
shared memory), so that the next five do. H_m, padded with zeros to a power of two, is multiplied in float32: tensor cores do not
round the sums of tf32 parts as float32 sums are rounded.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from modelopt.torch.kernels.hadamard.matrices import factors, matrix
from modelopt.torch.kernels.hadamard.reference import scale
from modelopt.torch.kernels.triton_butterflies import butterflies

_TILE = 4096
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(x: Tensor, size: int) -> str | None:
    """Return why this kernel does not serve `x`, or None."""
    if x.dtype not in _DTYPES:
        return f"the tensor is {x.dtype}; the kernel takes float32, float16 and bfloat16"
    if x.numel() == 0:
        return "the tensor is empty"
    return "more than 2^31 blocks" if x.numel() // size >= 2**31 else None


@triton.jit
def _hadamard(
    x_ptr,
    signs_ptr,
    matrix_ptr,
    y_ptr,
    count,
    scale,
    SIGNS: tl.constexpr,
    INVERSE: tl.constexpr,
    M: tl.constexpr,
    PADDED: tl.constexpr,
    BITS: tl.constexpr,
    G: tl.constexpr,
):
    power: tl.constexpr = 2**BITS
    size: tl.constexpr = M * power
    c = tl.arange(0, G * power)[None, :]
    j = tl.arange(0, PADDED)[:, None]
    block = tl.program_id(0).to(tl.int64) * G + c // power
    place = j * power + c % power
    here = (block < count) & (j < M)
    x = tl.load(x_ptr + block * size + place, mask=here, other=0.0).to(tl.float32)
    if SIGNS:
        signs = tl.load(signs_ptr + place, mask=here, other=0.0).to(tl.float32)
        if not INVERSE:
            x *= signs
    if BITS > 0:
        x = butterflies(x, PADDED * G * power, BITS).reshape(PADDED, G * power)
    if M > 1:
        h = tl.load(matrix_ptr + j * PADDED + tl.arange(0, PADDED)[None, :])
        x = tl.dot(h, x, input_precision="ieee")
    y = x * scale
    if SIGNS and INVERSE:
        y *= signs
    tl.store(y_ptr + block * size + place, y.to(y_ptr.dtype.element_ty), mask=here)


@functools.lru_cache(maxsize=16)
def _padded(order: int, inverse: bool, device: torch.device) -> Tensor:
    """Return H_m or its transpose in the corner of a matrix of a power of two, zeros elsewhere."""
    side = triton.next_power_of_2(order)
    out = torch.zeros(side, side)
    out[:order, :order] = matrix(order).T if inverse else matrix(order)
    return out.to(device)


def hadamard(x: Tensor, size: int, signs: Tensor | None = None, inverse: bool = False) -> Tensor:
    """Return the transform of every `size` elements of the last dimension of `x`; see `kernels.hadamard`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    m, power = factors(size)
    padded = triton.next_power_of_2(m)
    g = max(_TILE // (padded * power), 1 if m == 1 else max(16 // power, 1))
    count = x.numel() // size
    _hadamard[(triton.cdiv(count, g),)](
        x,
        x if signs is None else signs.contiguous(),
        x if m == 1 else _padded(m, inverse, x.device),
        out,
        count,
        scale(size),
        SIGNS=signs is not None,
        INVERSE=inverse,
        M=m,
        PADDED=padded,
        BITS=power.bit_length() - 1,
        G=g,
        num_warps=max(4, min(32, padded * power * g // 1024)),
        enable_fp_fusion=False,
    )
    return out
