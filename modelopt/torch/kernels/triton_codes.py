"""Codes as Triton device functions: from rounded values to raw bits and back, and bits packed into whole bytes.

A float32 t = q + 1.5 * 2^23 * step holds round(q / step) in its low bits, so that no conversion is needed:

    int      step 1; the code is n mod 2^b
    float    step 2^(e - M): q / step is the mantissa with its hidden bit, and adding (e - e_min) * 2^M gives the code. With two
             exponent bits the code is round(min over e of q / step_e + (e - e_min) 2^M), since codes are concave in q
"""

from __future__ import annotations

import triton
import triton.language as tl

from modelopt.torch.kernels.triton_math import INTERPRETED, POWER, largest, look_up, nf4_place

MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23
MAGIC_BITS = tl.constexpr(0x4B400000)


@triton.jit
def encode(
    q,
    x,
    zero,
    table_ptr,
    KIND: tl.constexpr,
    MBITS: tl.constexpr,
    MIN_EXP: tl.constexpr,
    BITS: tl.constexpr,
    MASK: tl.constexpr = False,
    ZERO: tl.constexpr = False,
    FLIP: tl.constexpr = False,
):
    """Return the raw codes of quotients (KIND float: magnitudes; the sign is that of `x`); MASK: `q` has no NaN.

    They are int32 with the bits of `MAGIC_BITS` above, or uint8. FLIP (signed integers of more than
    one bit): the highest bit of the code is turned over, so that it is not negative.
    """
    if KIND == "e4m3":  # NaN becomes 0x7F
        code = q.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    elif KIND == "e5m2":
        code = q.to(tl.float8e5).to(tl.uint8, bitcast=True)
        code = tl.where(q != q, 0x7E, code).to(tl.uint8)
    elif KIND == "float":
        code = magnitude_code(q, MBITS, MIN_EXP, BITS)
        if not MASK:
            code = tl.where(q == q, code, MAGIC_BITS)
        if BITS != 4:  # 4 bits: `pack_eight` adds the signs
            code |= (x.to(tl.int32, bitcast=True) >> (32 - BITS)) & (1 << (BITS - 1))
        if BITS == 8:
            code = tl.where(q != q, 0x7F if MBITS == 3 else 0x7E, code).to(tl.uint8)
    elif KIND == "int":
        turned: tl.constexpr = 2 ** (BITS - 1) if FLIP else 0
        t = q + (MAGIC + turned)
        if ZERO:
            t += zero
        code = t.to(tl.int32, bitcast=True)
        if not MASK:
            code = tl.where(t == t, code, MAGIC_BITS + turned)
    else:
        code = look_up(tl.load(table_ptr + 32 + tl.arange(0, 64)), nf4_place(q, table_ptr)).to(tl.int32)
        code = tl.where(q != q, 7, code) | MAGIC_BITS
    return code


@triton.jit
def one_per_byte(codes, x, KIND: tl.constexpr, BITS: tl.constexpr, FLIP: tl.constexpr):
    """Return what `encode` made of `x` with less than 8 bits as plain codes."""
    if FLIP:
        codes ^= 1 << (BITS - 1)
    if KIND == "float" and BITS == 4:
        codes |= (x.to(tl.int32, bitcast=True) >> 28) & 8
    return codes & ((1 << BITS) - 1)


@triton.jit
def magnitude_code(q, MBITS: tl.constexpr, MIN_EXP: tl.constexpr, BITS: tl.constexpr):
    """Return the code of `q` (0 <= q <= max) without its sign, with `MAGIC_BITS` above."""
    if BITS - 1 - MBITS == 2:
        k: tl.constexpr = POWER(127 - MIN_EXP + MBITS)
        code = tl.minimum(tl.fma(q, k, MAGIC), tl.fma(q, k / 2, MAGIC + 2**MBITS))
        code = tl.minimum(code, tl.fma(q, k / 4, MAGIC + 2 * 2**MBITS)).to(tl.int32, bitcast=True)
    else:
        power = (q.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        power = largest(power, POWER(MIN_EXP - 127))
        t = tl.fma(power, 1.5 * POWER(23 - MBITS), q).to(tl.int32, bitcast=True)
        first: tl.constexpr = ((MIN_EXP + 23 - MBITS) << MBITS) + (0x400000 >> (23 - MBITS))
        code = ((t + (t >> (23 - MBITS)) - first) & ((1 << (BITS - 1)) - 1)) | MAGIC_BITS
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
        value = look_up(tl.load(table_ptr + 160 + tl.arange(0, 16)), code)
    return value


@triton.jit
def split_4(x, G: tl.constexpr, N: tl.constexpr):
    """Return the elements [G, N] of every four neighbours of [G, 4 N], in order."""
    even, odd = tl.split(x.reshape(G, N, 2, 2))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def split_8(x, G: tl.constexpr, N: tl.constexpr):
    """Return the elements [G, N] of every eight neighbours of [G, 8 N], in order."""
    even, odd = tl.split(x.reshape(G, N, 2, 2, 2))
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x1, x5 = tl.split(x15)
    x2, x6 = tl.split(x26)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def pack_eight(codes, G: tl.constexpr, N: tl.constexpr):
    """Return the 4-bit codes (with `MAGIC_BITS`) of every eight neighbours of [G, 8 N] as int32 [G, N], the first lowest."""
    c0, c1, c2, c3, c4, c5, c6, c7 = split_8(codes, G, N)
    word = (((((((c7 * 16 + c6) * 16 + c5) * 16 + c4) * 16 + c3) * 16 + c2) * 16) + c1) * 16 + c0
    return word - 0x3F400000  # what eight times MAGIC_BITS has left


@triton.jit
def top_bytes(a, b, c, d):
    """Return the highest bytes of four int32 as one."""
    if INTERPRETED:
        four = ((a >> 24) & 0xFF) | ((b >> 16) & 0xFF00) | ((c >> 8) & 0xFF0000) | (d & -16777216)
    else:
        four = tl.inline_asm_elementwise(
            "{ .reg .b32 s, t; prmt.b32 s, $1, $2, 0x73; prmt.b32 t, $3, $4, 0x73; prmt.b32 $0, s, t, 0x5410; }",
            "=r,r,r,r,r",
            [a, b, c, d],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return four


@triton.jit
def low_bytes(a, b, c, d):
    """Return the lowest bytes of four int32 as one."""
    if INTERPRETED:
        four = (a & 0xFF) | ((b & 0xFF) << 8) | ((c & 0xFF) << 16) | (d << 24)
    else:
        four = tl.inline_asm_elementwise(
            "{ .reg .b32 s, t; prmt.b32 s, $1, $2, 0x40; prmt.b32 t, $3, $4, 0x40; prmt.b32 $0, s, t, 0x5410; }",
            "=r,r,r,r,r",
            [a, b, c, d],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return four


@triton.jit
def hidden(offset):
    """Return `offset` (int64) so that the compiler does not know neighbours: it then keeps to a thread's own elements."""
    if INTERPRETED:
        same = offset
    else:
        same = tl.inline_asm_elementwise("mov.b64 $0, $1;", "=l,l", [offset], dtype=tl.int64, is_pure=True, pack=1)
    return same


@triton.jit
def eight_signs(x, G: tl.constexpr, N: tl.constexpr):
    """Return the signs of every eight neighbours of float32 [G, 8 N] as the highest bits of eight 4-bit codes, int32 [G, N]."""
    s0, s1, s2, s3, s4, s5, s6, s7 = split_8(x.to(tl.int32, bitcast=True), G, N)
    low = (top_bytes(s0, s2, s4, s6) >> 4) & 0x08080808
    return low | (top_bytes(s1, s3, s5, s7) & -2139062144)  # 0x80808080


@triton.jit
def store_packed(
    out_ptr,
    start,
    codes,
    x,
    here,
    BITS: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    KIND: tl.constexpr,
    FLIP: tl.constexpr,
    WIDE: tl.constexpr = False,
):
    """Store codes [G, C, V], those that `encode` made of `x`, as a bit stream.

    8 bits: `start` are the places of the bytes and `here` says which exist, [G, C, V]; with WIDE and at 4 bits the same of
    words of 8 codes, [G, 1, W / 8]. 6 bits: the tile has no gaps, `start` is its first unit of 16 codes in 3 words, `here` the
    number of units.
    """
    if WIDE:  # 8 codes a store: as bytes, 16 neighbours would be exchanged between threads that read 8 values at once
        c0, c1, c2, c3, c4, c5, c6, c7 = split_8(codes.to(tl.int32).reshape(G, W), G, W // 8)
        low, high = low_bytes(c0, c1, c2, c3), low_bytes(c4, c5, c6, c7)
        if FLIP:
            low ^= -2139062144  # 0x80808080
            high ^= -2139062144
        word = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
        words = out_ptr.to(tl.pointer_type(tl.int64)) + hidden(tl.ravel(start))  # in one dimension, as below
        tl.store(words, tl.ravel(word), mask=tl.ravel(here))
    elif BITS == 8:
        if FLIP:
            codes ^= 128
        tl.store(out_ptr + start, codes.to(tl.uint8), mask=here)
    elif BITS == 4:
        word = pack_eight(codes.reshape(G, W), G, W // 8)
        if KIND == "float":
            word |= eight_signs(x.reshape(G, W), G, W // 8)
        if FLIP:
            word ^= -2004318072  # 0x88888888
        tl.store(out_ptr.to(tl.pointer_type(tl.int32)) + start, word.reshape(G, 1, W // 8), mask=here)
    else:
        c0, c1, c2, c3 = split_4(codes.reshape(G, W) & 63, G, W // 4)
        word = c0 | (c1 << 6) | (c2 << 12) | (c3 << 18)
        if FLIP:
            word ^= 0x820820
        w0, w1, w2, w3 = split_4(word, G, W // 16)
        first, middle, last = w0 | (w1 << 24), (w1 >> 8) | (w2 << 16), (w2 >> 16) | (w3 << 8)
        four = tl.ravel(tl.join(tl.join(first, last), tl.join(middle, middle)))  # 3 words and a spare one
        j = tl.arange(0, G * W // 4)  # in one dimension, so that neighbouring threads store neighbouring words
        unit = start + j // 4
        words = out_ptr.to(tl.pointer_type(tl.int32)) + unit * 3 + j % 4
        tl.store(words, four, mask=(j % 4 < 3) & (unit < here))


@triton.jit
def load_packed(in_ptr, unit, here, BITS: tl.constexpr, C: tl.constexpr, G: tl.constexpr, V: tl.constexpr):
    """Return the codes [G, C, V] (int32) of a bit stream; `unit` [G, 1, 1] is the first unit of whole bytes (1, 2 or 8 codes)."""
    c = tl.arange(0, C)[None, :, None]
    if BITS == 8:
        codes = tl.load(in_ptr + (unit + c * V + tl.arange(0, V)[None, None, :]), mask=here, other=0).to(tl.int32)
    elif BITS == 4:
        pair = tl.load(in_ptr + (unit + c * (V // 2) + tl.arange(0, V // 2)[None, None, :]), mask=here, other=0).to(tl.int32)
        codes = tl.join(pair & 15, pair >> 4).reshape(G, C, V)
    else:
        at = (unit + c * (V // 8)) * 3 + tl.arange(0, V // 8)[None, None, :] * 3
        halves = in_ptr.to(tl.pointer_type(tl.uint16))
        w0 = tl.load(halves + at, mask=here, other=0).to(tl.int32)
        w1 = tl.load(halves + at + 1, mask=here, other=0).to(tl.int32)
        w2 = tl.load(halves + at + 2, mask=here, other=0).to(tl.int32)
        c04 = tl.join(w0 & 63, (w1 >> 8) & 63)
        c15 = tl.join((w0 >> 6) & 63, (w1 >> 14) | ((w2 & 15) << 2))
        c26 = tl.join((w0 >> 12) | ((w1 & 3) << 4), (w2 >> 4) & 63)
        c37 = tl.join((w1 >> 2) & 63, w2 >> 10)
        codes = tl.join(tl.join(c04, c26), tl.join(c15, c37)).reshape(G, C, V)
    return codes
