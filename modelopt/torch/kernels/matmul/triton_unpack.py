"""Packed weight words to bf16 values in registers, in the order in which tensor cores want them.

A 32-bit word holds 8 codes of 4 bits or 4 of 8 bits. Codes i and i + half of a word come out as the two halves of one register:

    i4, u4   (word >> 4 i) & 0x000f000f, or-ed into the mantissa of 128.0, less 128 + offset: exact
    i8       128 + low seven bits, less 128 (256 where the sign bit is set): exact
    e2m1     sign and magnitude moved to the bf16 fields: the value times 2^-126, subnormals included; then times 2^126
    e4m3     likewise with 2^120 (the NaN codes, which no finite tensor has, become +-480)

Scales of blocks: float32 as two bf16 terms (the value is rounded once more, by at most 2^-17 of it); e4m3 and e8m0 exactly.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-return"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

BITS = {"i4": 4, "u4": 4, "e2m1": 4, "i8": 8, "e4m3": 8}
_AND_XOR, _AND_OR = "0x6A", "0xEA"


def _shift(to: str, amount: int) -> str:
    if amount == 0:
        return f"mov.b32 {to}, $W;"
    return f"shr.u32 {to}, $W, {amount};" if amount > 0 else f"shl.b32 {to}, $W, {-amount};"


def _codes(kind: str, scale: str) -> tuple[str, str]:
    """Return (assembly, constraints). Operands: the word, the registers of the scale, and for u4 128 + zero point twice."""
    bits = 8 if kind in ("i8", "e4m3") else 4
    pairs = 16 // bits
    lines = ["{ .reg .b32 v, s, d, e;"]
    word, first, second, third = (f"${2 * pairs + i}" for i in range(4))
    zero = third if scale == "f32" else first
    for i in range(pairs):
        at = i * bits
        if kind in ("i4", "u4"):
            lines.append(_shift("v", at))
            magic, how = ("0x43084308", _AND_XOR) if kind == "i4" else ("0x43004300", _AND_OR)
            lines.append(f"lop3.b32 v, v, 0x000F000F, {magic}, {how};")
            lines.append(f"sub.bf16x2 d, v, {'e_off' if kind == 'i4' else zero};")
        elif kind == "i8":
            lines.append(_shift("v", at))
            lines.append(f"lop3.b32 s, v, 0x00800080, 0x43004300, {_AND_OR};")
            lines.append(f"lop3.b32 v, v, 0x007F007F, 0x43004300, {_AND_OR};")
            lines.append("sub.bf16x2 d, v, s;")
        else:
            width = 3 if kind == "e2m1" else 7
            top = 6 if kind == "e2m1" else 4
            magnitude, sign = ("0x01C001C0", 15 - width) if kind == "e2m1" else ("0x07F007F0", 15 - width)
            lines += [_shift("v", at - top), _shift("s", at - sign)]
            lines.append("and.b32 s, s, 0x80008000;")
            lines.append(f"lop3.b32 d, v, {magnitude}, s, {_AND_OR};")
            if scale != "e4m3":
                lines.append("mul.bf16x2 d, d, e_off;")
        if scale == "f32":
            lines.append(f"mul.bf16x2 v, d, {second};")
            lines.append(f"fma.rn.bf16x2 d, d, {first}, v;")
        elif scale in ("e4m3", "e8m0"):
            lines.append(f"mul.bf16x2 d, d, {first};")
        lines.append(f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, d;")
    constant = {"i4": "0x43084308", "e2m1": "0x7E807E80", "e4m3": "0x7B807B80"}.get(kind)
    if constant:
        lines.insert(1, f".reg .b32 e_off; mov.b32 e_off, {constant};")
    operands = {"none": 0, "f32": 2, "e4m3": 1, "e8m0": 1}[scale]
    inputs = 1 + operands + (kind == "u4")
    return "\n".join([*lines, "}"]).replace("$W", word), ",".join(["=h"] * (2 * pairs) + ["r"] * inputs)


_ASM = {(k, s): _codes(k, s) for k in BITS for s in ("none", "f32", "e4m3", "e8m0")}


@gluon.constexpr_function
def assembly(kind: str, scale: str) -> str:
    """Return the instructions that unpack one word."""
    return _ASM[kind, scale][0]


@gluon.constexpr_function
def constraints(kind: str, scale: str) -> str:
    """Return the operands of `assembly`: the halves of each pair, then the word, scales and zero point."""
    return _ASM[kind, scale][1]


@gluon.constexpr_function
def halves(kind: str) -> tuple[gl.dtype, ...]:
    """Return the types of the outputs of `assembly`."""
    return (gl.int16,) * (32 // BITS[kind])
