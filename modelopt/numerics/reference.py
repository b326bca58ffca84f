"""The law: what every format does to every number, in plain torch and in a fixed order of float32 operations.

Kernels must equal this bit for bit. All arithmetic is float32; `/` is the correctly rounded division; `cast` is `Element.cast`.

    symmetric     r = amax / element.max
                  one level    s = cast_scale(r)
                  two levels   t = cast(g / top)          g: largest amax of the second block (given, or from the amax grid)
                               c = cast_scale(min(max(r / t, smallest), largest));  s = c * t
                               top = element.max * scale.max;  rule 46: element.max * 256;  rule fp8: scale.max
                  code = cast(x / s),  value = code * s
    zero point    lo = min(amin, 0), hi = max(amax, 0), s = cast_scale((hi - lo) / (element.max - element.min))
                  z = cast(element.min - lo / s), code = clamp(round(x / s) + z), value = (code - z) * s
    e8m0 scale    up: 2^ceil(log2 r);  floor: 2^(floor(log2 amax) - element.emax);  nearest: the power of two nearest
                  to r, 1.5 goes up; the exponent is read from the bits (exact), clamped to [-127, 127]; NaN if not finite

A scale that comes out as zero becomes 1 (e4m3: 2^-9, e8m0: 2^-127), so that stored scales are finite and positive for every
finite tensor. NaN: a block with a NaN has a NaN scale, hence NaN values; nothing hides it. Infinite inputs saturate under a
given range; an infinite range is an infinite scale. Values are rounded to the dtype of x last; what exceeds that dtype (after a
scale that was rounded up in float16, or at the very end of float32) is infinite there.

Rule 46 without a given amax: of amax and 1.5 amax (which puts the largest value on 6 or on 4) each block takes the one with the
smaller squared error, 6 on a tie.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt.core.errors import FormatError, ShapeError
from modelopt.numerics import packing
from modelopt.numerics.blocks import from_blocks, per_block, spread, to_blocks
from modelopt.numerics.elements import Element
from modelopt.numerics.formats import Format

FOUR_OVER_SIX_TOP = 256.0
_E8M0_NAN = 255


@dataclass(frozen=True)
class Scales:
    """The scales of one tensor: `effective` float32 [grid] multiplies codes; `stored` is what a file holds, level by level."""

    effective: Tensor
    stored: tuple[Tensor, ...]
    zero: Tensor | None = None


@dataclass(frozen=True)
class Quantized:
    """A quantized tensor as a value: packed `codes` (uint8), `scales` level by level, `format`, original shape and dtype."""

    codes: Tensor
    scales: tuple[Tensor, ...]
    format: Format
    shape: torch.Size
    dtype: torch.dtype
    zero: Tensor | None = None

    def unpacked(self) -> Tensor:
        """Return one raw code per uint8, in the original shape."""
        n = self.shape[-1] if len(self.shape) else 1
        return packing.unpack_bits(self.codes, self.format.element.bits, n).reshape(self.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the values in the original shape, in `dtype` (default: the original one)."""
        return dequantize(self, dtype)

    @property
    def parts(self) -> list[Tensor]:
        """The tensors that make up the value: codes, scales, and the zero point if there is one."""
        return [self.codes, *self.scales, *([] if self.zero is None else [self.zero])]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(p.numel() * p.element_size() for p in self.parts)

    @classmethod
    def from_parts(cls, parts: list[Tensor], fmt: Format, shape: torch.Size, dtype: torch.dtype) -> Quantized:
        """Build the value from `parts`, in the order of `Quantized.parts`. Raises ShapeError if their number is wrong."""
        wanted = 1 + len(fmt.levels) + (fmt.zero is not None)
        if len(parts) != wanted:
            raise ShapeError(f"{fmt} has {wanted} tensors (codes, scales, zero point), got {len(parts)}.")
        scales = tuple(parts[1 : 1 + len(fmt.levels)])
        return cls(parts[0], scales, fmt, torch.Size(shape), dtype, parts[-1] if fmt.zero is not None else None)


def block_amax(x: Tensor, fmt: Format) -> Tensor:
    """Return max |x| of each block, float32, in the shape `fmt.grid(x.shape)`. NaN propagates. An empty block has 0."""
    return _reduce(x.float().abs(), fmt, torch.amax)


def block_range(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Return (min, max) of each block with zero included, float32, in the shape `fmt.grid(x.shape)`."""
    xf = x.float()
    return _reduce(xf.clamp(max=0.0), fmt, torch.amin), _reduce(xf.clamp(min=0.0), fmt, torch.amax)


def global_amax(x: Tensor) -> Tensor:
    """Return max |x| of the whole tensor as a float32 scalar. NaN propagates."""
    return x.float().abs().amax() if x.numel() else torch.zeros((), device=x.device)


def _reduce(x: Tensor, fmt: Format, how: object) -> Tensor:
    grid = fmt.grid(x.shape)
    if x.numel() == 0:
        return torch.zeros(grid, dtype=torch.float32, device=x.device)
    if x.dim() == 0:
        return x.reshape(grid)
    blocks = to_blocks(x, fmt.block.sizes(x.shape))
    dims = list(range(1, blocks.dim(), 2))
    return how(blocks, dim=dims).reshape(grid)  # type: ignore[operator]


def compute_scales(amax: Tensor, fmt: Format, global_amax: Tensor | None = None, amin: Tensor | None = None) -> Scales:
    """Turn ranges into scales.

    Args:
        amax: float, one value per block, in the shape of the grid (for a zero-point format: the maximum, not of |x|).
        fmt: the format.
        global_amax: for two-level formats, the tensor-wide amax (scalar); None takes it from `amax`.
        amin: for zero-point formats, the minimum of each block.
    """
    amax = amax.float()
    if fmt.zero is not None:
        return _zero_point_scales(amax, amin, fmt)
    if isinstance(fmt.scale, Format):
        return _two_level_scales(amax, global_amax, fmt, fmt.scale)
    ratio = _over(amax, fmt.element.max)
    if fmt.scale.name == "e8m0":
        codes = _e8m0_codes(ratio, amax, fmt)
        return Scales(e8m0_values(codes), (codes,))
    effective = cast_scale(ratio, fmt.scale)
    return Scales(effective, (store_scale(effective, fmt.scale),))


def _two_level_scales(amax: Tensor, given: Tensor | None, fmt: Format, inner: Format) -> Scales:
    top_scale = inner.scale
    if isinstance(top_scale, Format):
        raise FormatError(f"{fmt}: more than two levels of scales.")
    ratio = _over(amax, fmt.element.max)
    top = {"46": fmt.element.max * FOUR_OVER_SIX_TOP, "fp8": inner.element.max}.get(fmt.rule, fmt.element.max * inner.element.max)
    outer_amax = block_amax(amax, inner) if given is None else given.float().reshape(inner.grid(amax.shape))
    outer = cast_scale(_over(outer_amax, top), top_scale)
    wide_outer = spread(outer, inner.block, amax.shape)
    codes = cast_scale(ratio / wide_outer, inner.element)
    return Scales(codes * wide_outer, (store_scale(codes, inner.element), store_scale(outer, top_scale)))


def _zero_point_scales(amax: Tensor, amin: Tensor | None, fmt: Format) -> Scales:
    if isinstance(fmt.scale, Format) or fmt.scale.name == "e8m0":
        raise FormatError(f"{fmt}: a zero point goes with one float scale.")
    lo = torch.zeros_like(amax) if amin is None else amin.float().reshape(amax.shape).clamp(max=0.0)
    hi = amax.clamp(min=0.0)
    scale = cast_scale(_over(hi - lo, fmt.element.max - fmt.element.min), fmt.scale)
    zero = fmt.element.cast(fmt.element.min - lo / scale)
    return Scales(scale, (store_scale(scale, fmt.scale),), zero)


def _over(x: Tensor, divisor: float) -> Tensor:
    # A tensor as divisor: on CUDA, torch multiplies by the rounded reciprocal of a Python number instead of dividing.
    return x / torch.full((), divisor, device=x.device)


def cast_scale(ratio: Tensor, scale: Element) -> Tensor:
    """Round float32 `ratio` to the scale type, as float32; zero becomes 1 (for number types: their smallest positive value)."""
    if scale.kind in ("float", "int"):
        return scale.cast(ratio.clamp(scale.smallest_positive, scale.max))
    rounded = ratio if scale.name == "f32" else scale.cast(ratio)
    return torch.where(rounded == 0, 1.0, rounded)


def store_scale(values: Tensor, scale: Element) -> Tensor:
    """Return float32 scale `values`, which lie on the scale type's grid, in the type's storage dtype."""
    if scale.kind == "wide":
        return values.to(scale.dtype)
    return scale.encode(values).view(scale.dtype)


def load_scale(stored: Tensor, scale: Element) -> Tensor:
    """Undo `store_scale`: return float32 values (for e8m0: from its uint8 codes)."""
    if scale.name == "e8m0":
        return e8m0_values(stored)
    return stored.float()


def _e8m0_codes(ratio: Tensor, amax: Tensor, fmt: Format) -> Tensor:
    source = amax if fmt.rule == "floor" else ratio
    bits = source.contiguous().view(torch.int32)
    exponent, mantissa = (bits >> 23) & 0xFF, bits & 0x7FFFFF
    if fmt.rule == "up":
        exponent = exponent + (mantissa != 0)
    elif fmt.rule == "nearest":
        exponent = exponent + (mantissa >= 0x400000)
    else:
        exponent = exponent - fmt.element.emax
    codes = exponent.clamp(0, 254)
    return torch.where(source.isfinite(), codes, _E8M0_NAN).to(torch.uint8)


def e8m0_values(codes: Tensor) -> Tensor:
    """Return 2^(code - 127) as float32 for uint8 `codes`; 255 is NaN."""
    wide = codes.to(torch.int32)
    bits = torch.where(wide == 0, 0x00400000, wide << 23)
    return torch.where(wide == _E8M0_NAN, 0x7FC00000, bits).view(torch.float32)


def given_range(
    shape: torch.Size, fmt: Format, amax: Tensor | None, global_amax: Tensor | None, amin: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Check ranges that were measured before and return them as float32 in the grid's shape; None stays None.

    For a dynamic two-level format a lone `amax` of one element is the tensor-wide one. Raises ShapeError on a wrong count.
    """
    grid = fmt.grid(shape)
    if fmt.dynamic and fmt.needs_global and amax is not None and global_amax is None:
        amax, global_amax = None, amax
    if global_amax is not None:
        if global_amax.numel() != 1:
            raise ShapeError(f"{fmt}: the tensor-wide amax must have one element, got shape {tuple(global_amax.shape)}.")
        global_amax = global_amax.float().reshape(())
    for name, value in (("amax", amax), ("amin", amin)):
        if value is not None and value.numel() != math.prod(grid):
            raise ShapeError(f"{fmt} has scales of shape {grid} for a tensor of {tuple(shape)}; {name} has {tuple(value.shape)}.")
    if amax is not None:
        amax = amax.float().reshape(grid)
    return amax, global_amax, None if amin is None else amin.float().reshape(grid)


def find_range(
    x: Tensor, fmt: Format, amax: Tensor | None, global_amax: Tensor | None, amin: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (amax, global amax, amin) as `given_range` does, reading from `x` the block ranges that are not given."""
    amax, global_amax, amin = given_range(x.shape, fmt, amax, global_amax, amin)
    if amax is not None:
        return amax, global_amax, amin
    if fmt.zero is not None:
        lo, hi = block_range(x, fmt)
        return hi, None, lo
    amax = block_amax(x, fmt)
    if fmt.rule == "46":
        global_amax = amax.amax() if global_amax is None else global_amax
        amax = four_over_six(x, fmt, amax, global_amax)
    return amax, global_amax, None


def four_over_six(x: Tensor, fmt: Format, amax: Tensor, tensor_amax: Tensor) -> Tensor:
    """Return for each block `amax` or 1.5 `amax`, whichever leaves the smaller squared error of `x` (rule 46)."""
    errors = []
    for factor in (1.0, 1.5):
        values = apply_scales(x.float(), compute_scales(amax * factor, fmt, tensor_amax), fmt)
        squared = to_blocks((values - x.float()).square_(), fmt.block.sizes(x.shape))
        errors.append(squared.sum(dim=list(range(1, squared.dim(), 2))).reshape(amax.shape))
    return torch.where(errors[1] < errors[0], amax * 1.5, amax)


def apply_scales(x: Tensor, scales: Scales, fmt: Format) -> Tensor:
    """Return the float32 values to which float32 `x` is rounded under `scales`."""
    return _dequantize_blocks(*quantize_blocks(x, scales, fmt), fmt, x.shape)


def quantize_blocks(x: Tensor, scales: Scales, fmt: Format) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (code values, scale, zero point) in blocks [g0, b0, g1, b1, ...] for float32 `x`."""
    shape = x.shape if x.dim() else (1,)
    sizes = fmt.block.sizes(shape)
    grid = [-(-n // b) for n, b in zip(shape, sizes, strict=True)]
    scale = per_block(scales.effective, grid)
    ratio = to_blocks(x.reshape(shape), sizes) / scale
    if scales.zero is None:
        return fmt.element.cast(ratio), scale, None
    zero = per_block(scales.zero, grid)
    return torch.clamp(torch.round(ratio) + zero, fmt.element.min, fmt.element.max), scale, zero


def _dequantize_blocks(codes: Tensor, scale: Tensor, zero: Tensor | None, fmt: Format, shape: torch.Size) -> Tensor:
    values = codes * scale if zero is None else (codes - zero) * scale
    return from_blocks(values, shape if len(shape) else (1,)).reshape(shape)


def fake_quantize(
    x: Tensor, fmt: Format, amax: Tensor | None = None, global_amax: Tensor | None = None, amin: Tensor | None = None
) -> Tensor:
    """Return `x` rounded to what `fmt` can hold, in the shape and dtype of `x`.

    `amax` (one value per block; for a dynamic two-level format the tensor-wide one), `global_amax` and `amin` are ranges that
    were measured before; what is None is read from `x`. Raises ShapeError, FormatError.
    """
    check(x, fmt)
    if x.numel() == 0:
        return x.clone()
    return apply_scales(x.float(), find_scales(x, fmt, amax, global_amax, amin), fmt).to(x.dtype)


def find_scales(
    x: Tensor, fmt: Format, amax: Tensor | None = None, global_amax: Tensor | None = None, amin: Tensor | None = None
) -> Scales:
    """Return the scales under which `fake_quantize` and `quantize` with the same arguments round `x`."""
    if x.numel() == 0:
        zeros = torch.zeros(fmt.grid(x.shape), device=x.device)
        return compute_scales(zeros, fmt, torch.zeros((), device=x.device) if fmt.needs_global else None)
    amax, global_amax, amin = find_range(x, fmt, amax, global_amax, amin)
    return compute_scales(amax, fmt, global_amax, amin)


def quantize(
    x: Tensor, fmt: Format, amax: Tensor | None = None, global_amax: Tensor | None = None, amin: Tensor | None = None
) -> Quantized:
    """Return `x` as packed codes and scales. The arguments are those of `fake_quantize`, and so are the values it stands for."""
    check(x, fmt)
    scales = find_scales(x, fmt, amax, global_amax, amin)
    shape = x.shape if x.dim() else torch.Size((1,))
    if x.numel():
        values = from_blocks(quantize_blocks(x.float(), scales, fmt)[0], shape)
        codes = fmt.element.encode(values)
    else:
        codes = torch.zeros(shape, dtype=torch.uint8, device=x.device)
    zero = None if scales.zero is None else scales.zero.to(fmt.element.dtype)
    return Quantized(packing.pack_bits(codes, fmt.element.bits), scales.stored, fmt, x.shape, x.dtype, zero)


def effective_scale(stored: tuple[Tensor, ...], fmt: Format) -> Tensor:
    """Return the float32 multiplier of each block from the stored scales."""
    first = load_scale(stored[0], fmt.stored_scale)
    if not isinstance(fmt.scale, Format):
        return first
    outer = load_scale(stored[1], fmt.scale.stored_scale)
    return first * spread(outer, fmt.scale.block, first.shape)


def dequantize(q: Quantized, dtype: torch.dtype | None = None) -> Tensor:
    """Return the values that `q` stands for, in its shape; `dtype` None is the original dtype."""
    dtype = dtype or q.dtype
    if q.codes.numel() == 0:
        return torch.zeros(q.shape, dtype=dtype, device=q.codes.device)
    scales = Scales(effective_scale(q.scales, q.format), (), None if q.zero is None else q.zero.float())
    return decode(q.unpacked(), scales, q.format).to(dtype)


def decode(codes: Tensor, scales: Scales, fmt: Format) -> Tensor:
    """Return the float32 values of raw `codes` (uint8, one per element) under `scales`."""
    shape = codes.shape if codes.dim() else torch.Size((1,))
    sizes = fmt.block.sizes(shape)
    grid = [-(-n // b) for n, b in zip(shape, sizes, strict=True)]
    blocks = to_blocks(fmt.element.decode(codes.reshape(shape)), sizes)
    zero = None if scales.zero is None else per_block(scales.zero, grid)
    return _dequantize_blocks(blocks, per_block(scales.effective, grid), zero, fmt, codes.shape)


def check(x: Tensor, fmt: Format) -> None:
    """Raise ShapeError or FormatError if `x` cannot take the format."""
    if not x.is_floating_point():
        raise FormatError(f"Only floating-point tensors can be quantized, got {x.dtype}.")
    reason = fmt.why_not(x.shape)
    if reason is not None:
        raise ShapeError(f"{fmt} does not fit: {reason}.")
