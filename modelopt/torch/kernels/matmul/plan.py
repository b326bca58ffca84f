"""How the kernels read one weight format: `plan(fmt, n, k)`."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor

from modelopt.core.errors import ShapeError
from modelopt.numerics import Format, parse
from modelopt.numerics.packing import packed_size

_KINDS = {"i4": "i4", "i4n": "i4", "u4": "u4", "e2m1": "e2m1", "i8": "i8", "i8n": "i8", "e4m3": "e4m3"}
_EIGHT = ("i8", "e4m3")


@dataclass(frozen=True)
class Plan:
    """How the kernels read one weight format: see the constants in `pieces.cu` and `skinny.cu`."""

    kind: str
    scale: str
    group: int
    scale_rows: int
    each: int
    post: str
    factor: float
    ragged: bool = False  # K ends within a step


def check(x: Tensor, codes: Tensor, fmt: Format, n: int, experts: int = 1) -> None:
    """Raise ShapeError unless `codes` are those of `experts` weights [n, K] for x [..., K]: kernels would read beyond them."""
    k = x.shape[-1] if x.dim() else 0
    if codes.numel() * codes.element_size() != experts * n * packed_size(k, fmt.element.bits):
        raise ShapeError(
            f"x {tuple(x.shape)} needs {experts} weight(s) [{n}, {k}], but the codes in {fmt} are {tuple(codes.shape)}. "
            "Give x the columns of the weight, and n its rows."
        )


def kind_of(fmt: Format) -> str | None:
    """Return how codes are decoded ("i4", "u4", "e2m1", "i8", "e4m3"), or None. Zero points go with u4, and with it alone."""
    kind = _KINDS.get(fmt.element.name)
    return None if (fmt.zero is None) == (kind == "u4") else kind


@functools.lru_cache(maxsize=1024)
def plan(fmt: Format, n: int, k: int) -> Plan | str:
    """Return how the kernels read a weight [n, k] in `fmt`, or why they cannot."""
    kind = kind_of(fmt)
    if kind is None:
        return f"there is no kernel for codes of {fmt.element} {'with' if fmt.zero else 'without'} a zero point"
    each = 16 if kind in _EIGHT else 32
    if k % 32:
        return f"K = {k} is no multiple of 32"
    ragged = k % (4 * each) > 0
    rows, group = fmt.block.sizes((n, k))
    rows, group = min(rows, n), min(group, k)
    if isinstance(fmt.scale, Format):
        if not (kind == "e2m1" and fmt.scale.element.name == "e4m3" and fmt.scale.block.whole):
            return f"{fmt}: scales with scales are served for e2m1 with e4m3 scales and one for the tensor"
        scale, post, factor = "e4m3", "one", 128.0
    elif group == k and kind != "u4" and fmt.scale.name != "e8m0" and rows in (1, n):
        return Plan(kind, "none", 4 * each, 1, each, "rows" if rows == 1 else "one", 1.0, ragged)
    else:
        scale, post, factor = "e8m0" if fmt.scale.name == "e8m0" else "f32", "none", 1.0
        if fmt.scale.name == "e4m3":
            return f"{fmt}: e4m3 scales need a scale of their own"
    fits = 2 * group == each or (group % each == 0 and (group % (4 * each) == 0 or (4 * each) % group == 0))
    if kind == "u4" and group < each:
        return f"blocks of {group} columns with zero points are less than the {each} of a thread"
    if not fits:
        return f"blocks of {group} columns do not divide a step of {4 * each}"
    if k % group and group % (4 * each):  # a last block that is short, within a step of several
        return f"blocks of {group} columns do not divide rows of {k}"
    return Plan(kind, scale, group, rows, each, post, factor, ragged)


@functools.lru_cache(maxsize=1024)
def pair(input_format: str, fmt: Format, n: int, k: int) -> str:
    """Return "fp8" or "int8" where codes can be multiplied and scaled afterwards: a scale per row, or one, on either side."""
    given = parse(input_format)
    names = {given.element.name, fmt.element.name}
    if given.zero is not None or isinstance(given.scale, Format) or given.scale.name != "f32":
        return ""
    if fmt.zero is not None or isinstance(fmt.scale, Format) or fmt.scale.name != "f32":
        return ""
    rows, group = fmt.block.sizes((n, k))
    x_rows, x_group = given.block.sizes((4, k))
    if group < k or x_group < k or rows not in (1, n) or x_rows not in (1, 4):
        return ""
    return "fp8" if names == {"e4m3"} else "int8" if names <= {"i8", "i8n"} else ""
