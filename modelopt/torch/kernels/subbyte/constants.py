"""Formats as the definitions with which the kernels for codes of four and six bits are compiled.

    RN(x / s) > b   is   x > T,  T the largest number of x's type whose quotient does not pass b (division is monotone)
    T               RN(x / s) > b is x / s > b + u/2 (u: the step of float32 above b; >= where b is odd), so T is s (b + u/2)
                    rounded down: one fused multiply-add and one conversion, both with directed rounding

A block has 7 such numbers (E2M1, of |x|) or 15 (NF4), and 3 or 4 comparisons find a code. An E2M1 tie belongs to the even code:
RN(x / s) >= b where that is the upper one. For rule 46 both codes are found, and the difference of the squared errors comes from
exact integer sums; where it is too small for that, from the law's operations.
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
    """Return the kernel for `fmt`, "nibbles" or "sixes", or None."""
    e, inner = fmt.element.name, fmt.scale
    if fmt.zero is not None:
        return None
    if e in ("e3m2", "e2m3"):
        return "sixes" if str(inner) == "e8m0" else None
    two = isinstance(inner, Format) and inner.element.name == "e4m3" and str(inner.scale) == "f32" and inner.block.whole
    if e == "e2m1" and (two or str(inner) == "f32"):
        return "nibbles"
    return "nibbles" if e == "nf4" and str(inner) == "f32" else None


def faster(fmt: Format, codes: bool) -> bool:
    """Return whether the kernel for `fmt` is faster than Triton's, as measured on an H200 (six bits: as counted)."""
    return codes or (fmt.element.name == "e2m1" and isinstance(fmt.scale, Format) and not fmt.dynamic)


def of_nibbles(fmt: Format, dtype: torch.dtype, found: bool, codes: bool, block: int) -> Definitions:
    """Return the definitions for `nibbles.cu`; `found`: the kernel finds the ranges."""
    e, six = fmt.element, found and fmt.rule == "46"
    edges = borders(e)
    each = 16 if block == 16 else 32
    values = [v for v in sorted(e.table().tolist()) if v > 0 or e.name == "nf4"]
    resident = (5 if codes and not six else 4) if each == 16 else 4 if e.name == "nf4" and codes else 3
    return _defined(
        _shared(e, dtype, found, block, each, resident)
        | {
            "CODES": int(codes),
            "TWO": int(isinstance(fmt.scale, Format)),
            "SIX": int(six),
            "TOP": _literal(_top(fmt)),
            "COUNT": len(edges),
            "BORDER": _list([_literal(b) for b, _, _, _ in edges]),
            "STEP": _list([_literal(h) for _, h, _, _ in edges]),
            "CLOSED": _list([str(int(c)) for _, _, c, _ in edges]),
            "REACH": _list([str(int(r)) for _, _, _, r in edges]),
            "CODED": _list([_literal(v) for v in (values if e.name == "nf4" else [0.0, *values])]),
            "SIGNED": int(e.name != "nf4"),
        }
    )


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
    """Return for every border (b, half of the step beside it, whether x / s = b + half passes, whether RN(x / s) = b does)."""
    if e.name == "nf4":
        table = torch.tensor(sorted(e.table().tolist()))
        middles = ((table[1:] + table[:-1]) / 2).tolist()
        return [(b, _above(b) / 2, _odd(b), False) for b in middles]
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


def _odd(value: float) -> bool:
    return bool(_bits(abs(value)) & 1)
