"""Formats as the definitions with which the kernels for codes of four and six bits are compiled.

    RN(x / s) > b   is   x > T,  T the largest number of x's type whose quotient does not pass b (division is monotone)
    T               RN(x / s) > b is x / s > b + u/2 (u: the step of float32 above b; >= where b is odd), so T is s (b + u/2)
                    rounded down: one fused multiply-add and one conversion, both with directed rounding

A block of E2M1 has 7 such numbers (of |x|), and 3 comparisons find a code. A tie belongs to the even code: RN(x / s) >= b where
that is the upper one. NF4 looks codes up: a piece of [-1, 1] has at most one border (`pieces`). For rule 46 both codes are found,
and the difference of the squared errors comes from exact integer sums; where it is too small for that, from the law's operations.
"""

from __future__ import annotations

import struct

import torch

from modelopt.numerics import Element, Format
from modelopt.numerics.reference import FOUR_OVER_SIX_TOP

Definitions = tuple[tuple[str, str], ...]
TYPES = {torch.float16: "F16", torch.bfloat16: "BF16"}
THREADS = 256
_RULES = {"up": 0, "nearest": 1, "floor": 2}


def family(fmt: Format) -> str | None:
    """Return the kernel for `fmt`, "nibbles", "normal" or "sixes", or None."""
    e, inner = fmt.element.name, fmt.scale
    if fmt.zero is not None:
        return None
    if e in ("e3m2", "e2m3"):
        return "sixes" if str(inner) == "e8m0" else None
    two = isinstance(inner, Format) and inner.element.name == "e4m3" and str(inner.scale) == "f32" and inner.block.whole
    if e == "e2m1" and (two or str(inner) == "f32"):
        return "nibbles"
    return "normal" if e == "nf4" and str(inner) == "f32" else None


def faster(fmt: Format, codes: bool) -> bool:
    """Return whether the kernel for `fmt` is faster than Triton's, as measured on an H200 (six bits: as counted)."""
    static = fmt.element.name == "e2m1" and isinstance(fmt.scale, Format) and not fmt.dynamic
    return codes or static or fmt.element.name == "nf4" or fmt.rule == "46"


def of_nibbles(fmt: Format, dtype: torch.dtype, found: bool, codes: bool, block: int) -> Definitions:
    """Return the definitions for `nibbles.cu`; `found`: the kernel finds the ranges."""
    e, six = fmt.element, found and fmt.rule == "46"
    each = 16 if block == 16 else 32
    values = [v for v in sorted(e.table().tolist()) if v > 0]
    resident = (5 if codes and not six else 4) if each == 16 else 3
    return _defined(
        _shared(e, dtype, found, block, each, resident)
        | {
            "CODES": int(codes),
            "TWO": int(isinstance(fmt.scale, Format)),
            "SIX": int(six),
            "AHEAD": int(six),
            "TOP": _literal(_top(fmt)),
            "CODED": _list([_literal(v) for v in [0.0, *values]]),
        }
        | of_borders(e)
    )


def of_borders(e: Element) -> dict[str, object]:
    """Return the definitions for `borders.cu`."""
    edges = borders(e)
    return {
        "COUNT": len(edges),
        "BORDER": _list([_literal(b) for b, _, _, _ in edges]),
        "STEP": _list([_literal(h) for _, h, _, _ in edges]),
        "CLOSED": _list([str(int(c)) for _, _, c, _ in edges]),
        "REACH": _list([str(int(r)) for _, _, _, r in edges]),
    }


def of_normal(fmt: Format, dtype: torch.dtype, found: bool, codes: bool, block: int) -> Definitions:
    """Return the definitions for `normal.cu`."""
    border, code = pieces(fmt.element)
    table = sorted(fmt.element.table().tolist())
    each = 16 if block == 16 else 32
    return _defined(
        _shared(fmt.element, dtype, found, block, each, 5 if codes else 4)
        | {
            "CODES": int(codes),
            "BORDER": _list([_literal(b) for b in border]),
            "CODE": _list([str(c) for c in code]),
            "CODED": _list([_literal(table[c]) for c in code]),
        }
    )


def pieces(e: Element) -> tuple[list[float], list[int]]:
    """Return (border, code by place) for the 32 pieces of [-1, 1] whose numbers round to 0, ... 31 when brought to [0, 31].

    Place i is the lower end of piece i; a number beyond the border of its piece (2^100 if it has none) goes with the next place.
    No border lies near an end of a piece (tested), so that rounding may put a number into a neighbouring one.
    """
    table = torch.tensor(sorted(e.table().tolist()))
    middles = (table[1:] + table[:-1]) / 2
    piece = torch.round(middles * 15.5 + 15.5).tolist()
    border = [next((b for b, p in zip(middles.tolist(), piece, strict=True) if p == i), 2.0**100) for i in range(32)]
    return border, [sum(p < i for p in piece) for i in range(32)]


def of_sixes(fmt: Format, dtype: torch.dtype, found: bool, block: int) -> Definitions:
    """Return the definitions for `sixes.cu`."""
    e = fmt.element
    return _defined(
        _shared(e, dtype, found, block, 32, 4)
        | {
            "E2M3": int(e.name == "e2m3"),
            "RULE": _RULES[fmt.rule],
            "EMAX": e.emax,
            "SHIFT": _literal(2.0 ** (e.bias - (7 if e.name == "e2m3" else 15))),
            "ENDS": int(not (found and fmt.rule == "up")),
        }
    )


def _top(fmt: Format) -> float:
    """Return what the tensor's amax is divided by, as the law does; 1 for one level."""
    if not isinstance(fmt.scale, Format):
        return 1.0
    most = fmt.scale.element.max
    return {"46": fmt.element.max * FOUR_OVER_SIX_TOP, "fp8": most}.get(fmt.rule, fmt.element.max * most)


def _shared(e: Element, dtype: torch.dtype, found: bool, block: int, each: int, resident: int) -> dict[str, object]:
    return {
        TYPES[dtype]: 1,
        "EACH": each,
        "SHARE": block // each,
        "FIND": int(found),
        "MOST": _literal(e.max),
        "AHEAD": 0,
        "THREADS": THREADS,
        "RESIDENT": resident,
    }


def _defined(given: dict[str, object]) -> Definitions:
    return tuple((name, str(value)) for name, value in given.items())


def _literal(value: float) -> str:
    return float(value).hex() + "f"


def _list(items: list[str]) -> str:
    return "{" + ",".join(items) + "}"


def borders(e: Element) -> list[tuple[float, float, bool, bool]]:
    """Return for every border of E2M1 (b, half the step beside it, whether x / s = b + half passes, whether RN(x / s) = b)."""
    values = sorted(v for v in e.table().tolist() if v > 0)
    middles = [(a + b) / 2 for a, b in zip([0.0, *values], values, strict=False)]
    upper = [i % 2 == 1 for i in range(len(middles))]
    return [(b, -_above(-b) / 2 if up else _above(b) / 2, up, up) for b, up in zip(middles, upper, strict=True)]


def _bits(value: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def _above(value: float) -> float:
    """Return the distance of a float32 that is not zero to the next larger one."""
    bits = _bits(abs(value)) + (1 if value > 0 else -1)
    return abs(float(struct.unpack("<f", struct.pack("<i", bits))[0]) - abs(value))
