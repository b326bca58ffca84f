"""Fused experts [E, 2 I, H] become one record for each matrix of each expert, under the names that checkpoints use.

    gate_up_proj[e] = concat(gate_proj of expert e, up_proj of expert e)        down_proj[e] = down_proj of expert e

A range with one value per row or block is split with its rows; a range for the whole matrix serves both halves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from modelopt.numerics import Element, Format, Quantized
from modelopt.torch.export import huggingface
from modelopt.torch.export.checkpoint import LayerRecord

PARTS = {"gate_up_proj": 2}


def expert_records(
    model: nn.Module, name: str, parameter: str, members: list[Any], make: Callable[[str, str, Any, Tensor], LayerRecord]
) -> list[LayerRecord]:
    """Return the records of a fused parameter; `members` are its quantized tensors, one for each expert, each [out, in]."""
    parts = PARTS.get(parameter, 1)
    names = huggingface.expert_names(model, f"{name}.{parameter}", len(members), parts)
    records = []
    for index, qt in enumerate(members):
        whole = make(f"{name}.{index}", "Linear", qt, qt.tensor)
        if names is None or getattr(qt, "interleaved", False):
            note = f"checkpoints of {type(model).__name__} keep {parameter} fused, and no layout has a packed form of that"
            records.append(replace(whole, name=f"{name}.{index}.{parameter}", note=note))
            continue
        records += [replace(r, name=n) for r, n in zip(_split(whole, parts), names[index], strict=True)]
    return records


def _split(record: LayerRecord, parts: int) -> list[LayerRecord]:
    if parts == 1:
        return [record]
    weight = record.weight
    if isinstance(weight, Quantized):
        pieces = _split_packed(weight, parts)
        if pieces is None:
            return [replace(record, note=f"{list(weight.shape)} in {weight.format}, packed, cannot be split")] * parts
        return [replace(record, weight=piece) for piece in pieces]
    if weight is None or weight.shape[0] % parts:
        return [replace(record, note=f"an expert of shape {list(record.shape)} cannot be split into {parts} parts")] * parts
    rows = weight.shape[0] // parts
    grid = weight.format.grid(weight.shape)
    pieces = []
    for part in range(parts):
        tensor = weight.tensor[part * rows : (part + 1) * rows]
        ranges = {key: _rows(getattr(weight, key), grid, part, parts) for key in ("amax", "amin")}
        pieces.append(replace(record, weight=replace(weight, tensor=tensor, **ranges)))
    return pieces


def _split_packed(weight: Quantized, parts: int) -> list[Quantized] | None:
    """Return `parts` packed matrices with the rows of one, or None where blocks of scales lie across the cut."""
    total, width = weight.shape
    rows = total // parts
    divided = None if total % parts else _divided(weight.format, weight.shape, rows)
    if divided is None:
        return None
    pieces = []
    for part in range(parts):
        held = [t.unflatten(0, (parts, -1))[part] if d else t for t, d in zip(weight.parts, divided, strict=True)]
        pieces.append(Quantized.from_parts(held, weight.format, torch.Size((rows, width)), weight.dtype))
    return pieces


def joined(pieces: list[Quantized]) -> Quantized | None:
    """Return one packed matrix with the rows of all `pieces`, or None where they do not share what one matrix has once."""
    first = pieces[0]
    if len(pieces) == 1:
        return first
    shape = torch.Size((sum(p.shape[0] for p in pieces), first.shape[1]))
    if any(p.format != first.format or p.shape[1] != shape[1] for p in pieces):
        return None
    cuts = [_divided(first.format, shape, p.shape[0]) for p in pieces]
    divided = cuts[0]
    if divided is None or any(c is None for c in cuts):
        return None
    parts = []
    for members, apart in zip(zip(*(p.parts for p in pieces), strict=True), divided, strict=True):
        if apart:
            parts.append(torch.cat(members))
        elif all(torch.equal(members[0], m) for m in members):
            parts.append(members[0])
        else:
            return None
    return Quantized.from_parts(parts, first.format, shape, first.dtype)


def _divided(fmt: Format, shape: torch.Size, rows: int) -> list[bool] | None:
    """Say of each part of a packed matrix whether a cut after `rows` rows divides it; None: a block lies across the cut.

    What is not divided, all pieces have in common. Scales of scales have blocks of rows of their own.
    """
    found, size = [True], tuple(shape)
    level: Format | Element = fmt
    while isinstance(level, Format):
        block = min(level.block.sizes(size)[0], size[0])
        apart = block < size[0]
        if apart and rows % block:
            return None
        found.append(apart)
        size, rows, level = level.block.grid(size), rows // block, level.scale
    return found + [found[1]] * (fmt.zero is not None)


def _rows(value: Tensor | None, grid: tuple[int, ...], part: int, parts: int) -> Tensor | None:
    if value is None or not grid or value.numel() == 1:
        return value
    rows = value.reshape(grid)
    size = grid[0] // parts
    return rows[part * size : (part + 1) * size]
