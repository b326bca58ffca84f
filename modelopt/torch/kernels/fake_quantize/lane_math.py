"""What `lanes` does with one piece: its law's operations in its law's order, in place, in as few torch ops as give the same bits.

    integers  t = m + x / s in one op (addcdiv), m = 1.5 * 2^23: adding rounds to an integer, ties to even, since the
              neighbours of m are 1 apart and m is even; t is clamped to [m + min, m + max]; t - m is exact, and +0 for zero
    floats    w = max(2^floor(log2 |q|), 2^(1 - bias)) from the bits of q = clamp(x / s); code = round(q * 2^M / w) * w / 2^M,
              in which only `round` rounds; the factor 2^-M goes with the scale where that is exact
    amax      magnitudes compare as their bits do, and NaN is above all
    e8m0      the exponent of a range r is rounded by adding to its bits: 2^23 - 1 (up), 2^22 (nearest), -emax 2^23 (floor)

Law: `modelopt.numerics.reference`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from modelopt.numerics import Element, Format
from modelopt.numerics import reference as law

MAGIC = 1.5 * 2.0**23
_VECTOR = 32  # int32 elements of a row from which torch's amax is vectorized

# Tensors of no dimension, because torch takes them faster than Python numbers.
_CENTER = torch.tensor(MAGIC, dtype=torch.float32, device="cpu")
_NOTHING = torch.tensor(-0.0, dtype=torch.float32, device="cpu")  # added to any float, it changes nothing
_EXPONENT = torch.tensor(0x7F800000, dtype=torch.int32, device="cpu")
_MAGNITUDE = torch.tensor(0x7FFFFFFF, dtype=torch.int32, device="cpu")


def round_integers(x: Tensor, q: Tensor, magic: Tensor, scale: Tensor, zero: Tensor | None, e: Element) -> None:
    """Write to `q` the values that float32 `x` is rounded to; `magic` has the shape of `x` and holds MAGIC."""
    torch.addcdiv(magic, x, scale, out=q)
    if zero is None:
        q.clamp_(e.min + MAGIC, e.max + MAGIC).sub_(_CENTER)
    else:
        q.add_(zero).clamp_(e.min + MAGIC, e.max + MAGIC).sub_(zero + MAGIC)
    q.mul_(scale)


def round_floats(q: Tensor, spare: Tensor, scale: Tensor, folded: Tensor | None, e: Element) -> None:
    """Round q = x / scale in place and multiply by `scale`; a zero keeps the sign of x, as `round` leaves it."""
    q.clamp_(e.min, e.max)
    torch.bitwise_and(q.view(torch.int32), _EXPONENT, out=spare.view(torch.int32))
    spare.clamp_min_(2.0 ** (1 - e.bias))
    torch.addcdiv(_NOTHING, q, spare, value=2.0**e.mantissa_bits, out=q).round_()
    if folded is None:
        torch.addcmul(_NOTHING, q, spare, value=2.0**-e.mantissa_bits, out=q).mul_(scale)
    else:
        q.mul_(spare).mul_(folded)


def fold(scale: Tensor, e: Element) -> Tensor | None:
    """Return scale / 2^M for `round_floats`, or None where that might be inexact."""
    smallest_normal = 2.0**-126
    return scale * 2.0**-e.mantissa_bits if bool(scale.amin() >= smallest_normal * 2.0**e.mantissa_bits) else None


def block_amax(x: Tensor, bits: Tensor) -> Tensor:
    """Return the largest magnitude of each row of float32 `x` [S, R, B] as [S, R, 1]; `bits` is int32 memory of that shape."""
    strips, rows, width = x.shape
    source = x.view(torch.int32)
    out = torch.empty(strips, rows, 1, dtype=torch.int32, device="cpu")
    if width >= _VECTOR or _VECTOR % width or rows * width % _VECTOR:
        torch.amax(torch.bitwise_and(source, _MAGNITUDE, out=bits), 2, keepdim=True, out=out)
    else:  # rows that are too short for torch's vectors: several together, of which a mask leaves one at a time
        source, bits = (t.view(strips, -1, _VECTOR) for t in (source, bits))
        cells = out.view(strips, -1, _VECTOR // width)
        for i, mask in enumerate(_masks(width)):
            torch.amax(torch.bitwise_and(source, mask, out=bits), 2, out=cells[..., i])
    return out.view(torch.float32)


@functools.cache
def _masks(width: int) -> tuple[Tensor, ...]:
    """Return the masks that leave the magnitudes of one part in every 32 elements."""
    each = torch.eye(_VECTOR // width, dtype=torch.int32, device="cpu").mul_(_MAGNITUDE)
    return each.repeat_interleave(width, 1).unbind()


def outer_scale(fmt: Format, global_amax: Tensor | None) -> Tensor | None:
    """Return the tensor's own scale of a two-level format with a number type between, float32; None for other formats."""
    inner = fmt.scale
    if not isinstance(inner, Format) or inner.element.kind != "float" or not isinstance(inner.scale, Element):
        return None
    stored = law.compute_scales(torch.ones(1, dtype=torch.float32, device="cpu"), fmt, global_amax).stored[1]
    return law.load_scale(stored, inner.scale).reshape(())


def find_scales(amax: Tensor, fmt: Format, outer: Tensor | None, global_amax: Tensor | None) -> Tensor:
    """Return what `reference.compute_scales` calls effective, for float32 `amax`, which is overwritten."""
    top = _constant(fmt.element.max)
    if outer is not None and isinstance(fmt.scale, Format):
        inner = fmt.scale.element
        ratio = amax.div_(top).div_(outer).clamp_min_(inner.smallest_positive)
        round_floats(ratio, torch.empty_like(ratio), outer, None, inner)
        return ratio
    if isinstance(fmt.scale, Element) and fmt.scale.name == "e8m0":
        return _powers_of_two(amax if fmt.rule == "floor" else amax.div_(top), fmt)
    if isinstance(fmt.scale, Element):
        return law.cast_scale(amax.div_(top), fmt.scale)
    return law.compute_scales(amax, fmt, global_amax).effective


@functools.cache
def _constant(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def _powers_of_two(source: Tensor, fmt: Format) -> Tensor:
    nan = source * 0.0  # what is not finite has no scale
    step = {"up": 0x7FFFFF, "nearest": 0x400000, "floor": -(fmt.element.emax << 23)}[fmt.rule]
    bits = source.view(torch.int32).add_(step).clamp_(0, 0x7F7FFFFF).bitwise_and_(_EXPONENT).clamp_min_(0x00400000)
    return bits.view(torch.float32).add_(nan)
