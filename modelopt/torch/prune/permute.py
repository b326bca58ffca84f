"""Permutation invariance of families of dimensions, the proof that the atoms of a family are interchangeable.

For a family with atoms 0..n-1 whose atom i stands at positions p[i] of dim d of a tensor w, for each of its slots (w, d, p):

    w'.index(d, p[i]) = w.index(d, p[s(i)])      for one random permutation s of the family      =>      f(x; w') = f(x; w)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelopt.torch.prune.compare import difference, outputs_of, results
from modelopt.torch.prune.origins import named_floats


def permutation_error(
    model: nn.Module, families: Iterable[Any], run: Callable[[nn.Module], Any], tolerance: float
) -> tuple[float, str | None]:
    """Permute all families at once, and one by one if that changes an output; return (error, the family at fault or None).

    `model` is a float64 copy whose values may be changed; they are put back. `run(model)` returns its outputs. A family whose
    atoms do not all stand at equally many positions, or where it is not known which answers to which, is left out.
    """
    families = [f for f in families if _permutable(f)]
    before = _flat(run(model))
    everything = _error(model, families, run, before)
    if everything <= tolerance:
        return everything, None
    for family in families:
        error = _error(model, [family], run, before)
        if error > tolerance:
            return error, family.name
    return everything, "combination of several"


def _permutable(family: Any) -> bool:
    equal = all(len(set(map(len, slot.positions))) == 1 for slot in family.slots)
    return len(family.atoms) > 1 and equal and getattr(family, "regular", True)


def _error(model: nn.Module, families: list[Any], run: Callable[[nn.Module], Any], before: list[Tensor]) -> float:
    tensors = dict(named_floats(model))
    saved = {id(t): t.data for t in tensors.values()}
    rng = np.random.default_rng(0)
    try:
        for family in families:
            order = rng.permutation(len(family.atoms))
            for tensor, dim, source in _sources(family, tensors, order):
                tensor.data = tensor.data.index_select(dim, torch.from_numpy(source))
        after = _flat(run(model))
    finally:
        for tensor in tensors.values():
            tensor.data = saved[id(tensor)]
    if len(before) != len(after) or any(a.shape != b.shape for a, b in zip(before, after, strict=True)):
        return float("inf")
    return max((difference(a, b, None)[0] for a, b in zip(before, after, strict=True)), default=0.0)


def _sources(family: Any, tensors: dict[str, Tensor], order: np.ndarray) -> Iterable[tuple[Tensor, int, np.ndarray]]:
    """Yield (tensor, dim, the position that each position takes its slice from) once for each tensor and dim of the family."""
    done: dict[tuple[int, int], tuple[Tensor, np.ndarray]] = {}
    for slot in family.slots:
        tensor = tensors[slot.parameter]
        _, source = done.setdefault((id(tensor), slot.dim), (tensor, np.arange(tensor.shape[slot.dim])))
        positions = np.array(slot.positions)
        source[positions] = positions[order]
    for (_, dim), (tensor, source) in done.items():
        yield tensor, dim, source


def _flat(value: Any) -> list[Tensor]:
    """Return the results among the outputs, in order; states may be permuted."""
    outputs = outputs_of(value)
    return [outputs[name] for name in results(outputs) if outputs[name].is_floating_point()]
