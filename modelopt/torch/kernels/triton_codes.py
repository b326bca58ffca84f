"""Codes as Triton device functions: from rounded values to raw bits and back, and bits packed into whole bytes.

A float element's code is read off a float32 whose exponent was shifted so that the element's subnormals are float32's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from modelopt.torch.kernels.triton_math import INTERPRETED, POWER, round_float


@triton.jit
def encode(q, x, zero, table_ptr, KIND: tl.constexpr, MBITS: tl.constexpr, MIN_EXP: tl.constexpr, BITS: tl.constexpr):
    """Return the raw codes (int32) of quotients (KIND float: magnitudes; the sign is that of `x`)."""
    if KIND == "e4m3":
        code = q.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
        code = tl.where(q != q, 0x7F, code)
    elif KIND == "e5m2":
        code = q.to(tl.float8e5).to(tl.uint8, bitcast=True).to(tl.int32)
        code = tl.where(q != q, 0x7E, code)
    elif KIND == "float":
        value = round_float(q, MBITS, MIN_EXP)
        shifted = tl.maximum(value, 0.0) * POWER(1 - MIN_EXP)  # NaN becomes 0
        sign = (x.to(tl.int32, bitcast=True) >> (32 - BITS)) & (1 << (BITS - 1))
        code = (shifted.to(tl.int32, bitcast=True) >> (23 - MBITS)) | sign
        if BITS == 8:
            code = tl.where(q != q, 0x7F if MBITS == 3 else 0x7E, code)
    elif KIND == "int":
        code = (round_to_int(q) + zero.to(tl.int32)) & ((1 << BITS) - 1)
    else:
        code = tl.zeros_like(q).to(tl.int32)
        for i in tl.static_range(15):
            code += (q > tl.load(table_ptr + i)).to(tl.int32)
        code = tl.where(q != q, 7, code)
    return code


@triton.jit
def round_to_int(q):
    """Round float32 to int32, ties to even; NaN becomes 0."""
    if INTERPRETED:
        code = tl.where(q != q, 0.0, (q + 12582912.0) - 12582912.0).to(tl.int32)
    else:
        code = tl.inline_asm_elementwise("cvt.rni.s32.f32 $0, $1;", "=r,f", [q], dtype=tl.int32, is_pure=True, pack=1)
    return code


@triton.jit
def decode(
    code, table_ptr, KIND: tl.constexpr, MBITS: tl.constexpr, MIN_EXP: tl.constexpr, BITS: tl.constexpr, SIGNED: tl.constexpr
):
    """Return the float32 value of raw codes (int32)."""
    if KIND == "e4m3":
        value = code.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    elif KIND == "e5m2":
        value = code.to(tl.uint8).to(tl.float8e5, bitcast=True).to(tl.float32)
    elif KIND == "float":
        magnitude = code & ((1 << (BITS - 1)) - 1)
        value = (magnitude << (23 - MBITS)).to(tl.float32, bitcast=True) * POWER(MIN_EXP - 1)
        if BITS == 8 and MBITS == 3:
            value = tl.where(magnitude == 0x7F, float("nan"), value)
        if BITS == 8 and MBITS == 2:
            value = tl.where(magnitude == 0x7C, float("inf"), tl.where(magnitude > 0x7C, float("nan"), value))
        sign = (code >> (BITS - 1)) << 31
        value = (value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    elif KIND == "int":
        if SIGNED:
            code = (code << (32 - BITS)) >> (32 - BITS)
        value = code.to(tl.float32)
    else:
        value = tl.load(table_ptr + 16 - 1 + code)
    return value


@triton.jit
def store_packed(out_ptr, unit, codes, here, BITS: tl.constexpr, G: tl.constexpr, W: tl.constexpr):
    """Store codes [G, W] (int32) as a bit stream; `unit` [G, 1] is the first unit of whole bytes (1, 2 or 8 codes) of a row."""
    if BITS == 8:
        tl.store(out_ptr + (unit + tl.arange(0, W)[None, :]), codes.to(tl.uint8), mask=here)
    elif BITS == 4:
        low, high = tl.split(codes.reshape(G, W // 2, 2))
        tl.store(out_ptr + (unit + tl.arange(0, W // 2)[None, :]), (low | (high << 4)).to(tl.uint8), mask=here)
    else:
        even, odd = tl.split(codes.reshape(G, W // 8, 2, 2, 2))
        c04, c26 = tl.split(even)
        c15, c37 = tl.split(odd)
        c0, c4 = tl.split(c04)
        c1, c5 = tl.split(c15)
        c2, c6 = tl.split(c26)
        c3, c7 = tl.split(c37)
        at = unit * 3 + tl.arange(0, W // 8)[None, :] * 3
        halves = out_ptr.to(tl.pointer_type(tl.uint16))
        tl.store(halves + at, (c0 | (c1 << 6) | (c2 << 12)).to(tl.uint16), mask=here)
        tl.store(halves + at + 1, ((c2 >> 4) | (c3 << 2) | (c4 << 8) | (c5 << 14)).to(tl.uint16), mask=here)
        tl.store(halves + at + 2, ((c5 >> 2) | (c6 << 4) | (c7 << 10)).to(tl.uint16), mask=here)


@triton.jit
def load_packed(in_ptr, unit, here, BITS: tl.constexpr, G: tl.constexpr, W: tl.constexpr):
    """Return the codes [G, W] (int32) that `store_packed` stored."""
    if BITS == 8:
        codes = tl.load(in_ptr + (unit + tl.arange(0, W)[None, :]), mask=here, other=0).to(tl.int32)
    elif BITS == 4:
        pair = tl.load(in_ptr + (unit + tl.arange(0, W // 2)[None, :]), mask=here, other=0).to(tl.int32)
        codes = tl.join(pair & 15, pair >> 4).reshape(G, W)
    else:
        at = unit * 3 + tl.arange(0, W // 8)[None, :] * 3
        halves = in_ptr.to(tl.pointer_type(tl.uint16))
        w0 = tl.load(halves + at, mask=here, other=0).to(tl.int32)
        w1 = tl.load(halves + at + 1, mask=here, other=0).to(tl.int32)
        w2 = tl.load(halves + at + 2, mask=here, other=0).to(tl.int32)
        c04 = tl.join(w0 & 63, (w1 >> 8) & 63)
        c15 = tl.join((w0 >> 6) & 63, (w1 >> 14) | ((w2 & 15) << 2))
        c26 = tl.join((w0 >> 12) | ((w1 & 3) << 4), (w2 >> 4) & 63)
        c37 = tl.join((w1 >> 2) & 63, w2 >> 10)
        codes = tl.join(tl.join(c04, c26), tl.join(c15, c37)).reshape(G, W)
    return codes
