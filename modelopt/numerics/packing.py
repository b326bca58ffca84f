"""Packing: codes of b bits as a dense little-endian bit stream along the last dimension.

Code i of a row occupies bits [i b, (i + 1) b) of that row's stream, bit 0 being the lowest of byte 0; a row is padded with
zero bits to whole bytes. For 4 bits the even code is the low nibble; codes of 3, 5, 6 and 7 bits straddle bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modelopt.core.errors import ShapeError


def packed_size(count: int, bits: int) -> int:
    """Return the bytes of a row of `count` codes of `bits` bits."""
    return -(-count * bits // 8)


def _unit(bits: int) -> tuple[int, int]:
    """Return (codes, bytes) of the smallest group that fills whole bytes."""
    common = math.lcm(bits, 8)
    return common // bits, common // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 `codes` [..., n], each below 2^bits, into uint8 [..., ceil(n bits / 8)].

    Raises ShapeError for a scalar or a width outside 1 to 8.
    """
    _check(codes, bits)
    if bits == 8:
        return codes.contiguous()
    n = codes.shape[-1]
    per, width = _unit(bits)
    groups = -(-n // per)
    padded = torch.nn.functional.pad(codes, (0, groups * per - n)).reshape(*codes.shape[:-1], groups, per)
    if bits in (1, 2, 4):
        out = padded[..., 0].clone()
        for i in range(1, per):
            out |= padded[..., i] << (i * bits)
        return out[..., : packed_size(n, bits)].contiguous()
    word = torch.zeros(padded.shape[:-1], dtype=torch.int64, device=codes.device)
    for i in range(per):
        word |= padded[..., i].to(torch.int64) << (i * bits)
    parts = torch.stack([(word >> (8 * j)) & 0xFF for j in range(width)], dim=-1).to(torch.uint8)
    return parts.reshape(*codes.shape[:-1], groups * width)[..., : packed_size(n, bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack_bits`: uint8 [..., ceil(count bits / 8)] to uint8 codes [..., count].

    Raises ShapeError if the row has another number of bytes.
    """
    _check(packed, bits)
    if packed.shape[-1] != packed_size(count, bits):
        raise ShapeError(f"A row of {count} codes of {bits} bits has {packed_size(count, bits)} bytes, got {packed.shape[-1]}.")
    if bits == 8:
        return packed
    per, width = _unit(bits)
    mask = (1 << bits) - 1
    groups = -(-count // per)
    padded = torch.nn.functional.pad(packed, (0, groups * width - packed.shape[-1])).reshape(*packed.shape[:-1], groups, width)
    if width == 1:
        parts = [(padded[..., 0] >> (i * bits)) & mask for i in range(per)]
    else:
        word = torch.zeros(padded.shape[:-1], dtype=torch.int64, device=packed.device)
        for j in range(width):
            word |= padded[..., j].to(torch.int64) << (8 * j)
        parts = [((word >> (i * bits)) & mask).to(torch.uint8) for i in range(per)]
    return torch.stack(parts, dim=-1).reshape(*packed.shape[:-1], groups * per)[..., :count].contiguous()


def _check(x: Tensor, bits: int) -> None:
    if x.dtype != torch.uint8 or x.dim() == 0 or not 1 <= bits <= 8:
        raise ShapeError(
            f"Packing takes uint8 codes with at least one dimension and 1 to 8 bits; got {x.dtype}, {tuple(x.shape)}, {bits}."
        )
