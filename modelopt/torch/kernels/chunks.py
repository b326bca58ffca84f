"""Large tensors in pieces that stay in a core's cache: the law applied chunk by chunk, with the same result.

A tensor is first brought to its canonical shape (`numerics.blocks.canonical`), then cut along its first dimension at block
borders. Temporary memory is a few chunks instead of a few copies of the tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt.numerics import Format, Quantized, Scales, packing
from modelopt.numerics import reference as law
from modelopt.numerics.blocks import Block, canonical, from_blocks, spread

CHUNK = 1 << 18  # elements: 1 MiB of float32


@dataclass(frozen=True)
class Plan:
    """A tensor in canonical shape and how to cut it: `fmt` has the canonical block, `rows` the rows of one chunk."""

    x: Tensor
    fmt: Format
    rows: int
    split: bool  # whether the first dimension is made of several blocks (else one block spans it)

    def slices(self) -> Iterator[tuple[slice, slice]]:
        """Yield (rows of the tensor, rows of the grid) of each chunk."""
        block = self.fmt.block.sizes(self.x.shape)[0]
        for start in range(0, self.x.shape[0], self.rows):
            stop = min(start + self.rows, self.x.shape[0])
            yield slice(start, stop), slice(start // block, -(-stop // block)) if self.split else slice(0, 1)

    @property
    def grid(self) -> tuple[int, ...]:
        """The grid of the canonical shape."""
        return tuple(-(-n // b) for n, b in zip(self.x.shape, self.fmt.block.sizes(self.x.shape), strict=True))


def plan(x: Tensor, fmt: Format) -> Plan:
    """Return the chunks of `x` (not empty) under `fmt`."""
    shape, sizes = canonical(tuple(x.shape), fmt.block.sizes(x.shape)) if x.dim() else ((1,), (1,))
    flat = x.reshape(shape)
    row = max(flat.numel() // shape[0], 1)
    split = sizes[0] < shape[0] or shape[0] == 1
    unit = sizes[0] if split else 1
    rows = max(CHUNK // row // unit, 1) * unit
    return Plan(flat, fmt.with_(block=Block(sizes)), rows, split)


def chunked_amax(p: Plan) -> Tensor:
    """Return the amax of each block, float32, in the canonical grid."""
    out = torch.zeros(p.grid, dtype=torch.float32, device=p.x.device)
    for rows, grid in p.slices():
        part = law.block_amax(p.x[rows], _fitted(p, rows))
        out[grid] = part if p.split else torch.maximum(out[grid], part.reshape(out[grid].shape))
    return out


def chunked_range(p: Plan) -> tuple[Tensor, Tensor]:
    """Return (min, max) of each block with zero included, float32, in the canonical grid."""
    low, high = (torch.zeros(p.grid, dtype=torch.float32, device=p.x.device) for _ in range(2))
    for rows, grid in p.slices():
        lo, hi = law.block_range(p.x[rows], _fitted(p, rows))
        low[grid] = torch.minimum(low[grid], lo.reshape(low[grid].shape))
        high[grid] = torch.maximum(high[grid], hi.reshape(high[grid].shape))
    return low, high


def block_range(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Return `reference.block_range` of `x`, reading it chunk by chunk."""
    if x.numel() == 0:
        return law.block_range(x, fmt)
    low, high = chunked_range(plan(x, fmt))
    return low.reshape(fmt.grid(x.shape)), high.reshape(fmt.grid(x.shape))


def _fitted(p: Plan, rows: slice) -> Format:
    if p.split:
        return p.fmt
    return p.fmt.with_(block=Block((rows.stop - rows.start, *p.fmt.block.dims[1:])))


def find_scales(x: Tensor, fmt: Format, amax: Tensor | None, global_amax: Tensor | None, amin: Tensor | None) -> Scales:
    """Return `reference.find_scales` of `x` (not empty), reading `x` chunk by chunk where a range is not given."""
    amax, global_amax, amin = law.given_range(x.shape, fmt, amax, global_amax, amin)
    if amax is None:
        if fmt.zero is not None:
            amin, amax = block_range(x, fmt)
        else:
            p = plan(x, fmt)
            amax = chunked_amax(p)
            if fmt.rule == "46":
                global_amax = amax.amax() if global_amax is None else global_amax
                amax = _four_over_six(p, amax, global_amax)
            amax = amax.reshape(fmt.grid(x.shape))
    return law.compute_scales(amax, fmt, global_amax, amin)


def _four_over_six(p: Plan, amax: Tensor, tensor_amax: Tensor) -> Tensor:
    if not p.split:
        return law.four_over_six(p.x, p.fmt, amax, tensor_amax)
    return torch.cat([law.four_over_six(p.x[rows], p.fmt, amax[grid], tensor_amax) for rows, grid in p.slices()])


def scaled_chunks(p: Plan, effective: Tensor, zero: Tensor | None) -> Iterator[tuple[slice, slice, Scales, Format]]:
    """Yield of each chunk (rows of the tensor, rows of the grid, its scales, its format).

    `effective` float32 and `zero` have one value per block, in any shape with the right count.
    """
    effective = effective.reshape(p.grid)
    zero = None if zero is None else zero.reshape(p.grid)
    for rows, grid in p.slices():
        yield rows, grid, Scales(effective[grid], (), None if zero is None else zero[grid]), _fitted(p, rows)


def chunked_fake_quantize(x: Tensor, fmt: Format, scales: Scales) -> Tensor:
    """Return `x` (not empty) rounded under `scales`, in its dtype and shape, contiguous."""
    p = plan(x, fmt)
    out = torch.empty(p.x.shape, dtype=x.dtype, device=x.device)
    for rows, _, part, local in scaled_chunks(p, scales.effective, scales.zero):
        out[rows] = law.apply_scales(p.x[rows].float(), part, local)
    return out.reshape(x.shape)


def within(p: Plan, rows: slice, low: Tensor, high: Tensor) -> Tensor:
    """Return where low <= x <= high holds in the chunk `rows`; the bounds have one value per block of the chunk."""
    x = p.x[rows].float()
    block = _fitted(p, rows).block
    return (x >= spread(low, block, x.shape)) & (x <= spread(high, block, x.shape))


def chunked_codes(x: Tensor, fmt: Format, scales: Scales) -> Tensor:
    """Return the raw codes (uint8, one per element) of `x` (not empty) under `scales`, in the canonical shape."""
    p = plan(x, fmt)
    out = torch.empty(p.x.shape, dtype=torch.uint8, device=x.device)
    for rows, _, part, local in scaled_chunks(p, scales.effective, scales.zero):
        blocks = law.quantize_blocks(p.x[rows].float(), part, local)[0]
        out[rows] = fmt.element.encode(from_blocks(blocks, p.x[rows].shape))
    return out


def packed(codes: Tensor, bits: int) -> Tensor:
    """Return `packing.pack_bits(codes, bits)`, made from a few rows at a time."""
    rows = codes.reshape(-1, codes.shape[-1])
    out = torch.empty((rows.shape[0], packing.packed_size(rows.shape[1], bits)), dtype=torch.uint8, device=codes.device)
    step = max(CHUNK // rows.shape[1], 1)
    for i in range(0, rows.shape[0], step):
        out[i : i + step] = packing.pack_bits(rows[i : i + step], bits)
    return out.reshape(*codes.shape[:-1], out.shape[1])


def unpacked(packed_codes: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """Return the raw codes (uint8, not empty) of `shape`, unpacked from a few rows at a time."""
    n = shape[-1] if len(shape) else 1
    rows = packed_codes.reshape(-1, packed_codes.shape[-1])
    out = torch.empty((rows.shape[0], n), dtype=torch.uint8, device=rows.device)
    step = max(CHUNK // n, 1)
    for i in range(0, rows.shape[0], step):
        out[i : i + step] = packing.unpack_bits(rows[i : i + step], bits, n)
    return out.reshape(shape)


def chunked_values(q: Quantized) -> Tensor:
    """Return the values that `q` (not empty) stands for, in its dtype and shape, contiguous."""
    p = plan(unpacked(q.codes, q.format.element.bits, q.shape), q.format)
    out = torch.empty(p.x.shape, dtype=q.dtype, device=q.codes.device)
    zero = None if q.zero is None else q.zero.float()
    for rows, _, part, local in scaled_chunks(p, law.effective_scale(q.scales, q.format), zero):
        out[rows] = law.decode(p.x[rows], part, local)
    return out.reshape(q.shape)
