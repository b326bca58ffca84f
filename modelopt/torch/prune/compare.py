"""The outputs of a model and how far those of a pruned model are from the live part of the dense model's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

STATES = ("hidden_states", "encoder_last_hidden_state", "attentions", "key_values", "mems", "params")


def outputs_of(value: Any, path: str = "") -> dict[str, Tensor]:
    """Return the tensors of an output by path, through mappings, sequences and dataclasses; caches are left out."""
    if isinstance(value, Tensor):
        return {} if value.dtype == torch.bool else {path or "output": value}
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, tuple | list):
        items = list(enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    elif not path and hasattr(value, "__dict__"):  # the model returns an object of its own
        items = list(vars(value).items())
    else:
        return {}
    found: dict[str, Tensor] = {}
    for key, item in items:
        found |= outputs_of(item, f"{path}.{key}" if path else str(key))
    return found


def results(outputs: Iterable[str]) -> list[str]:
    """Return the outputs that a pruned model must return whole: all that are not states.

    Beside logits the last hidden state is one. States (hidden states, attention maps, caches) may be narrower, and permuted
    with their family.
    """
    names = list(outputs)
    logits = any("logits" in n.split(".")[0] for n in names)
    states = (*STATES, "last_hidden_state", "model_output") if logits else STATES
    return [n for n in names if not n.split(".")[0].endswith(states)] or names


def difference(dense: Tensor, pruned: Tensor, dead: Tensor | None) -> tuple[float, bool]:
    """Return (the largest difference over the largest live value, whether the pruned tensor is the smaller one)."""
    smaller = dense.shape != pruned.shape
    if smaller:
        live = _live_part(dense, dead)
        if live is None or live.shape != pruned.shape:
            return float("inf"), True
        dense = live
    if not dense.numel():
        return 0.0, smaller
    dtype = torch.complex128 if dense.is_complex() else torch.float64
    dense, pruned = dense.to(dtype), pruned.to(dtype)
    same = (dense == pruned) | (dense.isnan() & pruned.isnan())  # infinities included
    difference = torch.where(same, 0, (dense - pruned).abs())
    largest = torch.where(dense.isfinite(), dense.abs(), 0).max()
    error = float(difference.max() / largest.clamp(min=1e-30))
    return (error if error == error else float("inf")), smaller


def _live_part(dense: Tensor, dead: Tensor | None) -> Tensor | None:
    """Return a tensor without the slices that are dead as a whole, or None where none is."""
    if dead is None:
        return None
    for dim in range(dense.dim()):
        others = [d for d in range(dense.dim()) if d != dim]
        gone = dead.all(others) if others else dead
        if bool(gone.any()):
            keep = (~gone).nonzero().reshape(-1)
            dense, dead = dense.index_select(dim, keep), dead.index_select(dim, keep)
    return dense
