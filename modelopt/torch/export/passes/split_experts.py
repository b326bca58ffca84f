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

from modelopt.numerics import Quantized
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
    block = min(weight.format.block.sizes(weight.shape)[0], total)
    if total % parts or (block < total and rows % block):
        return None
    grids = [t for t in weight.parts if t.dim() and t.shape[0] > 1]
    if any(t.shape[0] % parts for t in grids):
        return None
    pieces = []
    for part in range(parts):
        held = [t.reshape(parts, -1, *t.shape[1:])[part] if any(t is g for g in grids) else t for t in weight.parts]
        pieces.append(Quantized.from_parts(held, weight.format, torch.Size((rows, width)), weight.dtype))
    return pieces


def joined(pieces: list[Quantized]) -> Quantized | None:
    """Return one packed matrix with the rows of all `pieces`, or None where they do not share what one matrix has once."""
    first = pieces[0]
    shape = torch.Size((sum(p.shape[0] for p in pieces), first.shape[1]))
    block = first.format.block.sizes(shape)[0]
    if any(p.format != first.format or p.shape[1] != shape[1] or (block < shape[0] and p.shape[0] % block) for p in pieces):
        return None
    parts = []
    for i, members in enumerate(zip(*(p.parts for p in pieces), strict=True)):
        if i == 0 or (members[0].dim() and block < shape[0]):
            parts.append(torch.cat(members))
        elif all(torch.equal(members[0], m) for m in members):
            parts.append(members[0])
        else:
            return None
    return Quantized.from_parts(parts, first.format, shape, first.dtype)


def _rows(value: Tensor | None, grid: tuple[int, ...], part: int, parts: int) -> Tensor | None:
    if value is None or not grid or value.numel() == 1:
        return value
    rows = value.reshape(grid)
    size = grid[0] // parts
    return rows[part * size : (part + 1) * size]
