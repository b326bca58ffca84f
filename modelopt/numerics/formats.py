"""The format algebra: a format is an element type, a block and a scale, and the scale may itself be a format.

    format = level ("*" level)* "*" scale ["+" zero]        level = element [":" rule] block ["~"]        scale = type [":" rule]

    e4m3[...]*f32              FP8, one scale for the tensor       i8[1,...]*f32          INT8, one scale per channel
    i8[-1]~*f32                INT8 per token, dynamic             u4[64]*f16+u4          INT4 with zero point, blocks of 64
    e2m1[32]~*e8m0             MXFP4                               e2m1[32]~*e8m0:floor   the same by OCP's rounding of the scale
    e2m1[16]~*e4m3[...]*f32    NVFP4: FP8 block scales, one float32 scale for the tensor

`~` says dynamic: the range of a block is read from the tensor at each call; without it, it is given (calibrated).
The rule of a scale says how it is chosen. e8m0: `up` (default: the power of two that avoids saturation), `floor` (OCP's
section 6.3), `nearest`. Two-level scales: `nearest` (default), `46` (normalize to 256 and take the better of maximum 6 and 4
per block), `fp8` (normalize so that code * block scale fits FP8).  docs/formats.md is the written grammar.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from modelopt.core.errors import FormatError, did_you_mean
from modelopt.numerics.blocks import REST, Block
from modelopt.numerics.elements import Element, element

_RULES = {"e8m0": ("up", "floor", "nearest"), "two-level": ("nearest", "46", "fp8"), "other": ("nearest",)}
_LEVEL = re.compile(r"(?P<element>[a-z0-9]+)(?::(?P<rule>[a-z0-9]+))?(?:\[(?P<block>[^\]]*)\](?P<dynamic>~)?)?")


@dataclass(frozen=True)
class Format:
    """How a tensor is stored: codes of `element`, one `scale` per `block`, optionally a zero point per block.

    `rule` says how this level's scale is chosen; `dynamic` that its range is computed from the tensor at each call.
    """

    element: Element
    block: Block
    scale: Element | Format
    zero: Element | None = None
    rule: str = ""
    dynamic: bool = False
    text: str = field(init=False, repr=False, compare=False, default="")

    def __post_init__(self) -> None:
        if self.element.scale_only:
            raise FormatError(f"{self.element} can hold scales only; as an element use one such as i8, e4m3, e2m1 or nf4.")
        allowed = self._allowed_rules()
        if not self.rule:
            object.__setattr__(self, "rule", allowed[0])
        if self.rule not in allowed:
            raise FormatError(
                f'The scale rule "{self.rule}" does not fit here.{did_you_mean(self.rule, allowed)} Allowed: {allowed}.'
            )
        if isinstance(self.scale, Format):
            self._check_inner(self.scale)
        elif not (self.scale.scale_only or self.scale.name == "e4m3"):
            raise FormatError(f"A scale is f32, f16, bf16, e8m0 or e4m3, or a format of its own; got {self.scale}.")
        if self.zero is not None and (self.element.kind != "int" or self.zero != self.element or self.is_two_level):
            raise FormatError(
                f"A zero point needs an integer element with one scale and the same type; got {self.zero} for {self.element}."
            )
        object.__setattr__(self, "text", self._notation())  # made once: compiled graphs only read it

    def _check_inner(self, inner: Format) -> None:
        if inner.zero is not None or inner.dynamic or isinstance(inner.scale, Format) or inner.rule != "nearest":
            raise FormatError(f"The scale's own format must be a plain two-part one such as e4m3[...]*f32, got {inner}.")
        if inner.scale.name == "e8m0" or inner.element.max <= 1:
            raise FormatError(f"The scale's own format must be a number type with a float scale, got {inner}.")

    def _allowed_rules(self) -> tuple[str, ...]:
        if isinstance(self.scale, Format):
            return _RULES["two-level"] if self.scale.element.name == "e4m3" and self.scale.block.whole else _RULES["other"]
        return _RULES["e8m0"] if self.scale.name == "e8m0" else _RULES["other"]

    @property
    def num_bits(self) -> int:
        """Bits of one code, scales not counted."""
        return self.element.bits

    @property
    def is_two_level(self) -> bool:
        """Whether the scales are themselves quantized with a scale of their own."""
        return isinstance(self.scale, Format)

    @property
    def needs_global(self) -> bool:
        """Whether a tensor-wide range belongs to the format (two levels, the second for the whole tensor)."""
        return isinstance(self.scale, Format) and self.scale.block.whole

    @property
    def stored_scale(self) -> Element:
        """The element type in which this level's scales are stored."""
        return self.scale.element if isinstance(self.scale, Format) else self.scale

    @property
    def symmetric(self) -> bool:
        """Whether there is no zero point."""
        return self.zero is None

    @property
    def levels(self) -> tuple[Format, ...]:
        """The format and, where the scale is a format, that too."""
        return (self, self.scale) if isinstance(self.scale, Format) else (self,)

    @property
    def needs_calibration(self) -> bool:
        """Whether applying the format to an activation needs a range that was measured before."""
        return not self.dynamic or self.needs_global

    def with_(self, **changes: Any) -> Format:
        """Return a copy with some fields changed."""
        return replace(self, **changes)

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the first level's scales for a tensor of `shape`."""
        return self.block.grid(shape)

    def why_not(self, shape: Sequence[int]) -> str | None:
        """Return why a tensor of `shape` cannot take this format, or None if it can. Ragged last blocks are fine."""
        named = [d for d in self.block.dims if d != REST]
        if len(named) > len(shape):
            return f"the block {self.block} names {len(named)} dimensions and the tensor has {len(shape)} (shape {tuple(shape)})"
        return None

    def bits_per_value(self, shape: Sequence[int]) -> float:
        """Return the stored bits per value of a tensor of `shape`: codes (rows padded to bytes), scales and zero points."""
        count = math.prod(shape)
        if count == 0:
            return 0.0
        row = int(shape[-1]) if len(shape) else 1
        bits = count // row * -(-row * self.element.bits // 8) * 8
        grid = self.grid(shape)
        blocks = math.prod(grid)
        if isinstance(self.scale, Format):
            bits += blocks * self.scale.element.bits + math.prod(self.scale.grid(grid)) * self.scale.stored_scale.bits
        else:
            bits += blocks * self.scale.bits
        if self.zero is not None:
            bits += blocks * self.zero.bits
        return bits / count

    def __str__(self) -> str:
        return self.text

    def _notation(self) -> str:
        head = f"{self.element}{self.block}{'~' if self.dynamic else ''}*"
        rule = "" if self.rule == self._allowed_rules()[0] else f":{self.rule}"
        if isinstance(self.scale, Format):
            return f"{head}{self.scale.element}{rule}{self.scale.block}*{self.scale.scale}"
        return f"{head}{self.scale}{rule}" + (f"+{self.zero}" if self.zero is not None else "")


@functools.lru_cache(maxsize=1024)
def parse(text: str) -> Format:
    """Read a format from its notation. `parse(str(f)) == f` for every format. Raises FormatError, quoting the text.

    >>> parse("e2m1[16]~*e4m3[...]*f32").is_two_level
    True
    """
    if not isinstance(text, str) or len(text) > 200:
        raise FormatError(f"A format is a string such as e4m3[...]*f32, got {str(text)[:60]!r}.")
    compact = re.sub(r"\s+", "", text)
    body, plus, zero = compact.partition("+")
    if plus and not zero:
        raise FormatError(f'The format "{text}" ends in "+"; a zero point type must follow, as in u4[64]*f16+u4.')
    levels = [_parse_level(part, text) for part in body.split("*")]
    if not 2 <= len(levels) <= 3:
        raise FormatError(
            f'The format "{text}" needs an element with a block and then one or two scale levels, as in i4[128]*f32.'
        )
    (top, top_rule, block, dynamic), *rest = levels
    last, last_rule, last_block, _ = rest[-1]
    if block is None or last_block is not None or top_rule:
        raise FormatError(
            f'In "{text}" each level but the last has a block in brackets, and only scales have rules (e8m0:floor).'
        )
    zero_element = element(zero) if zero else None
    if len(rest) == 1:
        return Format(top, block, last, zero_element, last_rule, dynamic)
    middle, rule, middle_block, middle_dynamic = rest[0]
    if middle_block is None or middle_dynamic or last_rule:
        raise FormatError(f'In "{text}" the scale {middle} needs a block in brackets; only the first level can be dynamic (~).')
    return Format(top, block, Format(middle, middle_block, last), zero_element, rule, dynamic)


def _parse_level(part: str, text: str) -> tuple[Element, str, Block | None, bool]:
    match = _LEVEL.fullmatch(part)
    if match is None:
        raise FormatError(f'Cannot read "{part}" in the format "{text}". A level looks like e2m1[16] or e8m0:floor.')
    block = None
    if match["block"] is not None:
        dims: list[int | str] = []
        for d in match["block"].split(","):
            if d != REST and not re.fullmatch(r"-1|[1-9]\d{0,9}", d):
                raise FormatError(f'"{d}" is no block dimension in the format "{text}": use a positive integer, -1 or `...`.')
            dims.append(d if d == REST else int(d))
        block = Block(tuple(dims))
    return element(match["element"]), match["rule"] or "", block, match["dynamic"] is not None


NAMES: dict[str, str] = {
    "int8": "i8[...]*f32",
    "int4": "i4[...]*f32",
    "fp8": "e4m3[...]*f32",
    "e4m3": "e4m3[...]*f32",
    "e5m2": "e5m2[...]*f32",
    "fp8_e4m3": "e4m3[...]*f32",
    "fp8_e5m2": "e5m2[...]*f32",
    "nvfp4": "e2m1[16]~*e4m3[...]*f32",
    "mxfp4": "e2m1[32]~*e8m0",
    "mxfp6": "e3m2[32]~*e8m0",
    "mxfp6_e2m3": "e2m3[32]~*e8m0",
    "mxfp8": "e4m3[32]~*e8m0",
    "mxfp8_e5m2": "e5m2[32]~*e8m0",
    "mxint8": "i8[32]~*e8m0",
    "nf4": "nf4[64]*f32",
}


def named(name: str) -> Format:
    """Return a format by its common name (`NAMES`) or by its notation. Raises FormatError with the nearest name.

    >>> str(named("mxfp8"))
    'e4m3[32]~*e8m0'
    """
    if name in NAMES:
        return parse(NAMES[name])
    if not isinstance(name, str) or "*" not in name:
        raise FormatError(
            f'There is no format "{name}".{did_you_mean(str(name), NAMES)} Known names: {", ".join(NAMES)}; '
            "or write it out, as in i4[64]*f32."
        )
    return parse(name)
