"""fp8_mlp on a GPU: FP8 products around one pass that activates, multiplies and quantizes the intermediate.

    "pass"      torch._scaled_mm (bf16), then `activate_quantize`: act(a) [* b] is read in bf16 and written as E4M3 once
    "epilogue"  `product_activate`: the same arithmetic on the sums of the first product, which never leave the registers as bf16

Legend: M rows, N features between the layers, K input features. Both round where the modules round: the products, the activation
and the multiplication to bf16, then the quotient by the scale; they differ from them by the last bits of exp and erf.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-return"
from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from modelopt.torch.kernels.fused_mlp import tables
from modelopt.torch.kernels.fused_mlp.triton_activate import finish, round_bf16, scale_of
from modelopt.torch.kernels.quantize import quantize

TILE = 4096  # values of one program of `activate_quantize`


def why_not(x: Tensor, weights: list[Tensor]) -> str | None:
    """Return why these kernels do not serve, or None."""
    if x.dtype != torch.bfloat16:
        return f"the input is {x.dtype}; the kernels take bfloat16"
    if x.dim() == 0 or x.numel() == 0:
        return "the input is empty"
    sizes = [(w.shape[0], w.shape[1]) for w in weights[::2]]
    if any(n % 16 or k % 16 for n, k in sizes):
        return f"the layers are {sizes}; FP8 units take multiples of 16"
    if any(not w.is_contiguous() or w.device != x.device or w.data_ptr() % 16 for w in weights[::2]):
        return "the weights are not contiguous on the input's device, or not aligned"
    return _unfit(x.device)


@functools.cache
def _unfit(device: torch.device) -> str | None:
    if torch.cuda.get_device_capability(device) < (8, 9):
        return "FP8 products need compute capability 8.9"
    return None


@functools.cache
def _has_tma(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def _activate_quantize(
    a_ptr, b_ptr, amax_ptr, codes_ptr, scale_ptr, n, ACTIVATION: tl.constexpr, GATED: tl.constexpr, TILE: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    here = at < n
    scale = scale_of(amax_ptr)
    a = tl.load(a_ptr + at, mask=here, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + at, mask=here, other=0.0).to(tl.float32) if GATED else a
    tl.store(codes_ptr + at, finish(a, b, scale, ACTIVATION, GATED), mask=here)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, scale)


def activate_quantize(a: Tensor, b: Tensor | None, activation: str, amax: Tensor) -> tuple[Tensor, Tensor]:
    """Return (E4M3 codes of act(a) [* b], their scale) for bf16 `a`, `b` [M, N] and float32 `amax` [1]."""
    codes = torch.empty(a.shape, dtype=torch.float8_e4m3fn, device=a.device)
    scale = torch.empty((), dtype=torch.float32, device=a.device)
    _activate_quantize[(math.ceil(a.numel() / TILE),)](
        a,
        a if b is None else b,
        amax,
        codes,
        scale,
        a.numel(),
        ACTIVATION=activation,
        GATED=b is not None,
        TILE=TILE,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return codes, scale


@triton.jit
def _tile(tile_id, rows, columns, GROUP: tl.constexpr):
    first = tile_id // (GROUP * columns) * GROUP
    high = min(rows - first, GROUP)
    return first + tile_id % (GROUP * columns) % high, tile_id % (GROUP * columns) // high


@triton.jit
def _column(ptr, n, N, PER_COLUMN: tl.constexpr):
    if PER_COLUMN:
        s = tl.load(ptr + n, mask=n < N, other=0.0)[None, :]
    else:
        s = tl.load(ptr)
    return s


@triton.jit
def _sums(acc, sx, s_ptr, bias_ptr, n, N, PER_COLUMN: tl.constexpr, BIAS: tl.constexpr):
    y = acc * (sx * _column(s_ptr, n, N, PER_COLUMN))
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return round_bf16(y)


@triton.jit
def _product(
    x_desc,
    w_desc,
    u_desc,
    out_desc,
    sx_ptr,
    sw_ptr,
    su_ptr,
    bias_ptr,
    up_bias_ptr,
    amax_ptr,
    scale_ptr,
    M,
    N,
    K,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PER_ROW: tl.constexpr,
    PER_COLUMN: tl.constexpr,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    steps = tl.cdiv(K, BK)
    scale = scale_of(amax_ptr)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, scale)
    for tile_id in tl.range(tl.program_id(0), rows * columns, PROGRAMS, flatten=FLATTEN):
        i, j = _tile(tile_id, rows, columns, GROUP)
        acc = tl.zeros((BM, BN), tl.float32)
        up = tl.zeros((BM, BN), tl.float32)
        for k in range(steps):
            x = x_desc.load([i * BM, k * BK])
            acc = tl.dot(x, w_desc.load([j * BN, k * BK]).T, acc)
            if GATED:
                up = tl.dot(x, u_desc.load([j * BN, k * BK]).T, up)
        m, n = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN)
        sx = tl.load(sx_ptr + m, mask=m < M, other=0.0)[:, None] if PER_ROW else tl.load(sx_ptr)
        a = _sums(acc, sx, sw_ptr, bias_ptr, n, N, PER_COLUMN, BIAS)
        b = _sums(up, sx, su_ptr, up_bias_ptr, n, N, PER_COLUMN, BIAS) if GATED else a
        out_desc.store([i * BM, j * BN], finish(a, b, scale, ACTIVATION, GATED))


def product_activate(
    x: Tensor,
    x_scale: Tensor,
    first: tuple[Tensor, Tensor, Tensor | None],
    up: tuple[Tensor, Tensor, Tensor | None] | None,
    activation: str,
    amax: Tensor,
    config: tables.Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (E4M3 codes [M, N], their scale) of act(x W^T + b) [* (x U^T + c)]; x [M, K] E4M3, layers (codes, scale, bias)."""
    (m, k), n = x.shape, first[0].shape[0]
    c = config or tables.choose(m, n, up is not None)
    other = first if up is None else up
    codes = torch.empty((m, n), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((), dtype=torch.float32, device=x.device)
    tiles = math.ceil(m / c.BM) * math.ceil(n / c.BN)
    programs = min(tiles, _processors(x.device))
    _product[(programs,)](
        TensorDescriptor(x, [m, k], [k, 1], [c.BM, c.BK]),
        TensorDescriptor(first[0], [n, k], [k, 1], [c.BN, c.BK]),
        TensorDescriptor(other[0], [n, k], [k, 1], [c.BN, c.BK]),
        TensorDescriptor(codes, [m, n], [n, 1], [c.BM, c.BN]),
        x_scale,
        first[1],
        other[1],
        x_scale if first[2] is None else first[2],
        x_scale if other[2] is None else other[2],
        amax,
        scale,
        m,
        n,
        k,
        ACTIVATION=activation,
        GATED=up is not None,
        PER_ROW=x_scale.numel() > 1,
        PER_COLUMN=first[1].numel() > 1,
        BIAS=first[2] is not None,
        BM=c.BM,
        BN=c.BN,
        BK=c.BK,
        GROUP=c.group,
        PROGRAMS=programs,
        FLATTEN=c.flatten,
        num_warps=c.warps,
        num_stages=c.stages,
        enable_fp_fusion=False,
    )
    return codes, scale


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def product(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + bias in bf16 for E4M3 `x` [M, K], `w` [N, K] with one scale, or one per row, each."""
    m, n = x.shape[0], w.shape[0]
    if x_scale.numel() == 1 and w_scale.numel() == 1:
        scales = x_scale.reshape(()), w_scale.reshape(())
    else:
        scales = x_scale.reshape(-1, 1).expand(m, 1).contiguous(), w_scale.reshape(1, -1).expand(1, n).contiguous()
    return torch._scaled_mm(x, w.t(), *scales, bias, out_dtype=torch.bfloat16, use_fast_accum=tables.FAST)


def fp8_mlp(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    activation: str,
    input_format: str,
    input_amax: Tensor | None,
    hidden_amax: Tensor,
    how: str | None = None,
) -> Tensor:
    """Return second(quantize(act(first(q(x))) [* up(q(x))])), [..., N2] bf16; `how`: a path (None: that of the table)."""
    flat = x.reshape(-1, x.shape[-1])
    if how is None:
        how = tables.route(flat.shape[0], len(biases) == 3) if _has_tma(x.device) else "pass"
    codes, x_scale = quantize(flat, input_format, input_amax)
    q = codes.view(torch.float8_e4m3fn)
    layers = [
        (weights[2 * i].view(torch.float8_e4m3fn), weights[2 * i + 1], None if b is None else b.to(torch.bfloat16))
        for i, b in enumerate(biases)
    ]
    first, second = layers[0], layers[-1]
    up = layers[1] if len(layers) == 3 else None
    if how == "epilogue" and _same_kind(first, up):
        h, h_scale = product_activate(q, x_scale, first, up, activation, hidden_amax)
    else:
        a = product(q, x_scale, *first)
        b = None if up is None else product(q, x_scale, *up)
        h, h_scale = activate_quantize(a, b, activation, hidden_amax)
    y = product(h, h_scale, *second)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _same_kind(first: tuple[Tensor, Tensor, Tensor | None], up: tuple[Tensor, Tensor, Tensor | None] | None) -> bool:
    return up is None or (first[1].numel() == up[1].numel() and (first[2] is None) == (up[2] is None))
