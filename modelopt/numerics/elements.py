"""Element types: the sets of values that one code can stand for, and one cast for all of them.

| kind     | names                                             | values                                              |
|----------|---------------------------------------------------|-----------------------------------------------------|
| int      | i2 ... i8, i2n ... i8n (narrow), u1 ... u8        | two's complement; narrow leaves out -2^(b-1)        |
| float    | e4m3 e5m2 e3m2 e2m3 e2m1 e1m2 e3m0 e0m3           | sign, E exponent bits, M mantissa bits, subnormals  |
| codebook | nf4                                               | 16 quantiles of a normal distribution in [-1, 1]    |
| exponent | e8m0 (scales only)                                | 2^(code - 127), 255 is NaN                          |
| wide     | f32 f16 bf16 (scales only)                        | the torch type                                      |

A float element with E and M bits has bias 2^(E-1) - 1 and represents (-1)^s 2^(max(e,1) - bias) (m/2^M + [e > 0]).
e4m3 is the "fn" variant (no infinity, NaN is all ones, maximum 448); e5m2 is IEEE (maximum 57344); the others are finite.

Cast rule: round to nearest, ties to the even multiple of the spacing (the even code; e3m0, which has no mantissa: up); values
beyond the range (infinities too) go to the nearest finite value; NaN stays NaN. NF4: the nearest value of the table, a tie goes
to the lower one. Integers have no negative zero.

Sources: OCP 8-bit Floating Point Specification 1.0; OCP Microscaling Formats 1.0 (sections 5 and 6); NF4: QLoRA (2305.14314).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modelopt.core.errors import FormatError, did_you_mean

NF4_TABLE: tuple[float, ...] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FLOATS = ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "e1m2", "e3m0", "e0m3")
_WIDE = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
ELEMENT_NAMES: tuple[str, ...] = (
    *(f"i{b}" for b in range(2, 9)),
    *(f"i{b}n" for b in range(2, 9)),
    *(f"u{b}" for b in range(1, 9)),
    *_FLOATS,
    "nf4",
    "e8m0",
    *_WIDE,
)


@dataclass(frozen=True)
class Element:
    """One element type. `max` and `min` are its largest and smallest finite values; `emax` is floor(log2(max))."""

    name: str
    kind: str
    bits: int
    max: float
    min: float
    emax: int
    exponent_bits: int = 0
    mantissa_bits: int = 0
    dtype: torch.dtype = field(default=torch.uint8)

    @property
    def scale_only(self) -> bool:
        """Whether the type can hold scales but not the values of a tensor."""
        return self.kind in ("exponent", "wide")

    @property
    def bias(self) -> int:
        """Exponent bias of a float element."""
        return (1 << (self.exponent_bits - 1)) - 1 if self.exponent_bits > 0 else 0

    @property
    def smallest_positive(self) -> float:
        """Smallest positive value."""
        if self.kind == "float":
            return 2.0 ** (1 - self.bias - self.mantissa_bits)
        if self.kind == "exponent":
            return 2.0**-127
        if self.kind == "codebook":
            return min(v for v in NF4_TABLE if v > 0)
        return 1.0 if self.kind == "int" else float(torch.finfo(self.dtype).smallest_normal)

    def cast(self, x: Tensor) -> Tensor:
        """Round float32 `x` (any shape) to the nearest value of this type; float32 out. See the module's cast rule."""
        if self.kind == "float":
            return _cast_float(x, self)
        if self.kind == "int":
            return torch.round(x).clamp_(self.min, self.max).add_(0.0)  # adding 0.0 turns -0.0 into 0.0
        if self.kind == "codebook":
            table = _codebook(x.device)
            return torch.where(x.isnan(), x, table[_nf4_index(x)])
        if self.kind == "wide":
            return x.clamp(self.min, self.max).to(self.dtype).float()
        raise FormatError(f"{self.name} has no cast of its own: its rounding is a rule of the scale (up, floor, nearest).")

    def encode(self, values: Tensor) -> Tensor:
        """Return the raw code bits (uint8) of float32 `values` that lie on the grid, as `cast` returns them.

        NaN becomes the type's NaN where it has one and 0 where it has none.
        """
        if self.kind == "int":
            return torch.nan_to_num(values).to(torch.int16).bitwise_and(self.code_mask).to(torch.uint8)
        if self.kind == "float":
            return _encode_float(values, self)
        if self.kind == "codebook":
            return _nf4_index(torch.nan_to_num(values)).to(torch.uint8)
        raise FormatError(f"{self.name} is a scale type and has no element codes.")

    def decode(self, codes: Tensor) -> Tensor:
        """Return the float32 values of uint8 `codes` (bits above the type's width must be zero)."""
        return self.table(codes.device)[codes.to(torch.int64)]

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the float32 value of every code, in the order of the codes: shape [2^bits]."""
        return _decode_table(self.name, torch.device(device))

    @property
    def code_mask(self) -> int:
        """The bits that a code of this type occupies."""
        return (1 << self.bits) - 1

    @property
    def has_nan(self) -> bool:
        """Whether a code stands for NaN."""
        return self.name in ("e4m3", "e5m2", "e8m0") or self.kind == "wide"

    def __str__(self) -> str:
        return self.name


def _cast_float(x: Tensor, e: Element) -> Tensor:
    # 2^(exponent - M) is the distance between neighbours; dividing by a power of two is exact.
    inside = x.clamp(e.min, e.max)
    step = _step(inside, e)
    return inside.div_(step).round_().mul_(step)


def _step(x: Tensor, e: Element) -> Tensor:
    exponent = x.contiguous().view(torch.int32).bitwise_right_shift(23).bitwise_and_(0xFF)
    biased = exponent.clamp_(min=1 - e.bias + 127).sub_(e.mantissa_bits)
    return biased.bitwise_left_shift_(23).view(torch.float32)


def _encode_float(values: Tensor, e: Element) -> Tensor:
    magnitude = torch.nan_to_num(values).abs()
    step = _step(magnitude, e)
    exponent = step.view(torch.int32).bitwise_right_shift(23) + e.mantissa_bits - 127 - (1 - e.bias)
    code = exponent.bitwise_left_shift(e.mantissa_bits) + (magnitude / step).to(torch.int32)
    code = code + (torch.signbit(values).to(torch.int32) << (e.bits - 1))
    if e.has_nan:
        code = torch.where(values.isnan(), 0x7F if e.name == "e4m3" else 0x7E, code)
    return code.to(torch.uint8)


def _nf4_index(x: Tensor) -> Tensor:
    return torch.bucketize(x, _nf4_bounds(x.device), right=False)


@functools.lru_cache(maxsize=32)
def _codebook(device: torch.device) -> Tensor:
    return torch.tensor(NF4_TABLE, dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=32)
def _nf4_bounds(device: torch.device) -> Tensor:
    table = torch.tensor(NF4_TABLE, dtype=torch.float32)
    return ((table[1:] + table[:-1]) / 2).to(device)


@functools.lru_cache(maxsize=128)
def _decode_table(name: str, device: torch.device) -> Tensor:
    e = element(name)
    codes = torch.arange(1 << e.bits)
    if e.kind == "int":
        values = codes if e.min >= 0 else torch.where(codes >= 1 << (e.bits - 1), codes - (1 << e.bits), codes)
        return values.float().to(device)
    if e.kind == "codebook":
        return _codebook(device)
    if e.kind == "float":
        return _float_values(codes, e).to(device)
    raise FormatError(f"{name} is a scale type and has no element codes.")


def _float_values(codes: Tensor, e: Element) -> Tensor:
    m_bits, e_bits = e.mantissa_bits, e.exponent_bits
    mantissa = (codes & ((1 << m_bits) - 1)).double()
    exponent = (codes >> m_bits) & ((1 << e_bits) - 1)
    sign = torch.where(codes >> (e.bits - 1) == 1, -1.0, 1.0).double()
    hidden = (exponent > 0).double() * 2**m_bits
    values = sign * (mantissa + hidden) * 2.0 ** (exponent.clamp(min=1) - e.bias - m_bits).double()
    if e.name == "e4m3":
        values[(codes & 0x7F) == 0x7F] = float("nan")
    if e.name == "e5m2":
        special = (codes & 0x7C) == 0x7C
        values[special & (mantissa == 0)] = sign[special & (mantissa == 0)] * float("inf")
        values[special & (mantissa != 0)] = float("nan")
    return values.float()


def _float_max(e_bits: int, m_bits: int, name: str) -> float:
    bias = (1 << (e_bits - 1)) - 1 if e_bits > 0 else 0
    if e_bits == 0:
        return 2.0 ** (1 - bias) * (2**m_bits - 1) / 2**m_bits
    top, mantissa = (1 << e_bits) - 1, 2**m_bits - 1
    if name == "e4m3":
        mantissa -= 1  # the all-ones code is NaN
    if name == "e5m2":
        top -= 1  # the largest exponent is for infinities and NaN
    return 2.0 ** (top - bias) * (1 + mantissa / 2**m_bits)


@functools.cache
def element(name: str) -> Element:
    """Return the element type called `name`. Raises FormatError, with the nearest name.

    >>> element("e2m1").max
    6.0
    """
    if name not in ELEMENT_NAMES:
        raise FormatError(
            f'There is no element type "{name}".{did_you_mean(name, ELEMENT_NAMES)} Known: {" ".join(ELEMENT_NAMES)}.'
        )
    if name in _WIDE:
        info = torch.finfo(_WIDE[name])
        return Element(name, "wide", info.bits, info.max, info.min, 127, dtype=_WIDE[name])
    if name == "e8m0":
        return Element(name, "exponent", 8, 2.0**127, 2.0**-127, 127)
    if name == "nf4":
        return Element(name, "codebook", 4, 1.0, -1.0, 0)
    if name in _FLOATS:
        e_bits, m_bits = int(name[1]), int(name[3])
        top = _float_max(e_bits, m_bits, name)
        emax = int(torch.tensor(top).log2().floor())
        dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}.get(name, torch.uint8)
        return Element(name, "float", 1 + e_bits + m_bits, top, -top, emax, e_bits, m_bits, dtype)
    bits = int(re.sub(r"\D", "", name))
    if name[0] == "u":
        return Element(name, "int", bits, float(2**bits - 1), 0.0, bits - 1)
    top_int = 2 ** (bits - 1) - 1
    low = -top_int if name.endswith("n") else -top_int - 1
    return Element(name, "int", bits, float(top_int), float(low), max(bits - 2, 0), dtype=torch.int8)
