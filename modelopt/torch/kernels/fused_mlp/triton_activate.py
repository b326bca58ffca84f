"""Activations and their quantization as Triton device functions, in few instructions.

    sigmoid(x) = 1 / (1 + 2^(-x log2 e)),  silu = x sigmoid(x),  gelu_tanh = x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))
    gelu = x Phi(x),  Phi(-|x|) = t (a1 + t (a2 + t (a3 + t (a4 + t a5)))) 2^(-x^2 log2 e / 2) / 2,  t = 1 / (1 + p |x| / sqrt 2)

2^x and 1 / x are the hardware's approximations (2 units in the last place); the polynomial is within 1.5e-7 of erf. Results are
rounded to bf16, as a module of that dtype rounds them.
Source: Abramowitz and Stegun, Handbook of Mathematical Functions (1964), formula 7.1.26.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-return"
from __future__ import annotations

import triton
import triton.language as tl

from modelopt.torch.kernels.triton_math import INTERPRETED, largest, quotient


@triton.jit
def exp2(x):
    """Return about 2^x."""
    if INTERPRETED:
        y = tl.exp2(x)
    else:
        y = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def inverse(x):
    """Return about 1 / x."""
    if INTERPRETED:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def round_bf16(x):
    """Return `x` rounded to bf16 (ties to even), two values an instruction."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        y = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    else:
        y = tl.inline_asm_elementwise(
            "{ .reg .b32 v, w; cvt.rn.bf16x2.f32 v, $3, $2; shl.b32 w, v, 16; and.b32 v, v, 0xFFFF0000; "
            "mov.b32 $0, w; mov.b32 $1, v; }",
            "=f,=f,f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    return y


@triton.jit
def _gelu(x):
    z = tl.abs(x)
    t = inverse(tl.fma(z, 0.23164189, 1.0))
    p = tl.fma(t, 0.5307027145, -0.7265760135)
    p = tl.fma(t, p, 0.7107068705)
    p = tl.fma(t, p, -0.142248368)
    p = tl.fma(t, p, 0.127414796)
    tail = t * p * exp2(x * x * -0.72134752044)
    return x * tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Return the activation of the bf16 values `x` (float32), rounded to bf16."""
    if ACTIVATION == "relu":
        y = largest(x, 0.0)
    elif ACTIVATION == "silu":
        y = round_bf16(x * inverse(1.0 + exp2(x * -1.44269504089)))
    elif ACTIVATION == "gelu_tanh":
        u = x * tl.fma(x * x, -0.102943238, -2.30220819814)
        y = round_bf16(x * inverse(1.0 + exp2(u)))
    else:
        y = round_bf16(_gelu(x))
    return y


@triton.jit
def scale_of(amax_ptr):
    """Return the scale of a tensor with the range at `amax_ptr`, by the law."""
    scale = tl.div_rn(tl.load(amax_ptr), 448.0)
    return tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def finish(a, b, scale, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """Return the E4M3 codes of act(a) [* b] under `scale`; `a`, `b` hold bf16 values as float32."""
    y = activate(a, ACTIVATION)
    if GATED:
        y = round_bf16(y * b)
    return quotient(y, scale, -448.0, 448.0, "f32", True, True).to(tl.float8e4nv)
