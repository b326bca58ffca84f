"""How important each atom is: one score per atom, the sum over all the places where the atom appears.

    l1, l2      sum |w|, sqrt(sum w^2) over every slice of every parameter that goes with the atom (DepGraph, arXiv 2301.12900)
    fpgm        distance of a filter to all others of its layer: sum_j ||w_i - w_j||                  (arXiv 1811.00250)
    activation  sqrt(sum over tokens x^2) of the channel where layers read it                         (Minitron, arXiv 2407.14679)
    taylor      sum over batches of |w * dL/dw| over the slices                                      (arXiv 1906.10771)
    random      a seeded permutation: the baseline that a criterion must beat

A criterion is a function (model, axes, Data) -> [number of atoms] float64; `IMPORTANCE.register("name")` adds one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelopt.core.errors import CalibrationError, ConfigError
from modelopt.core.registry import Registry
from modelopt.torch.calibration.data import TokenMask, feed
from modelopt.torch.calibration.executor import run_forward
from modelopt.torch.trace.inputs import quiet_run

_ROWS = 4096


@dataclass(frozen=True)
class Data:
    """What a criterion may use besides the weights: a forward loop, labelled batches, a loss, a seed.

    `forward_loop`: a callable taking the model, or an iterable of batches. `loss_func(output, batch)` -> scalar; without one the
    output's own `loss` is taken. `num_batches`: how many batches `taylor` reads at most.
    """

    forward_loop: Any = None
    data_loader: Any = None
    loss_func: Callable[[Any, Any], Tensor] | None = None
    num_batches: int | None = None
    seed: int = 0


IMPORTANCE: Registry[Callable[[nn.Module, Any, Data], np.ndarray]] = Registry("importance criterion")


def score_families(model: nn.Module, axes: Any, name: str, data: Data) -> dict[str, np.ndarray]:
    """Return {family: [size] float64 scores, higher is more important} by the criterion called `name`.

    Raises UnknownNameError, CalibrationError (data that the criterion needs is missing, or scores that are not finite).
    """
    scores = IMPORTANCE.get(name)(model, axes, data)
    result = {f.name: scores[np.asarray(f.atoms, dtype=np.int64)] for f in axes.families}
    bad = sorted(n for n, s in result.items() if not np.isfinite(s).all())
    if bad:
        raise CalibrationError(
            f'The criterion "{name}" is not finite for {len(bad)} families, the first: {bad[0]}. Check the weights and the data '
            "for inf and NaN."
        )
    return result


def places(model: nn.Module, axes: Any) -> Iterator[tuple[str, nn.Parameter, int, np.ndarray, np.ndarray]]:
    """Yield (name, parameter, dim, positions, atoms) of every labelled dim: the slice at positions[i] goes with atoms[i]."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, dims in axes.parameters.items():
        for dim, axis in enumerate(dims):
            if axis is not None and name in parameters:
                positions, atoms = axes.incidence(axis)
                if len(atoms):
                    yield name, parameters[name], dim, positions, atoms


def _along(value: Tensor, dim: int) -> np.ndarray:
    """Return the sum of `value` over all dimensions but `dim`, in float64."""
    rest = [d for d in range(value.dim()) if d != dim]
    total = value.sum(dim=rest, dtype=torch.float64) if rest else value.to(torch.float64)
    return total.cpu().numpy()


def _spread(scores: np.ndarray, per_position: np.ndarray, positions: np.ndarray, atoms: np.ndarray) -> None:
    scores += np.bincount(atoms, weights=per_position[positions], minlength=len(scores))


def _weighted(model: nn.Module, axes: Any, power: Callable[[Tensor], Tensor]) -> np.ndarray:
    scores = np.zeros(axes.num_atoms)
    cache: dict[str, Tensor] = {}
    for name, parameter, dim, positions, atoms in places(model, axes):
        if name not in cache:
            cache.clear()
            cache[name] = power(parameter.detach().float())
        _spread(scores, _along(cache[name], dim), positions, atoms)
    return scores


@IMPORTANCE.register("l1")
def l1(model: nn.Module, axes: Any, data: Data) -> np.ndarray:
    """Return the sum of absolute weights over all slices of each atom."""
    return _weighted(model, axes, torch.abs)


@IMPORTANCE.register("l2")
def l2(model: nn.Module, axes: Any, data: Data) -> np.ndarray:
    """Return the root of the sum of squared weights over all slices of each atom."""
    return np.sqrt(_weighted(model, axes, torch.square))


@IMPORTANCE.register("random")
def random(model: nn.Module, axes: Any, data: Data) -> np.ndarray:
    """Return seeded uniform scores."""
    return np.random.default_rng(data.seed).random(axes.num_atoms)


@IMPORTANCE.register("fpgm")
def fpgm(model: nn.Module, axes: Any, data: Data) -> np.ndarray:
    """Return the sum of distances to the other filters of the layer, over the layers that produce the atom (dimension 0)."""
    scores = np.zeros(axes.num_atoms)
    for _, parameter, dim, positions, atoms in places(model, axes):
        if dim != 0 or parameter.dim() < 2:
            continue
        rows = parameter.detach().float().flatten(1)
        live = torch.as_tensor(np.unique(positions), device=rows.device)
        kept = rows[live]
        distance = np.zeros(len(rows))
        for start in range(0, len(live), _ROWS):
            part = torch.cdist(kept[start : start + _ROWS], kept).sum(1, dtype=torch.float64)
            distance[live[start : start + _ROWS].cpu().numpy()] = part.cpu().numpy()
        _spread(scores, distance, positions, atoms)
    return scores


@IMPORTANCE.register("activation")
def activation(model: nn.Module, axes: Any, data: Data) -> np.ndarray:
    """Return the L2 norm over tokens of each channel where layers with weights read it; padding does not count.

    Needs a forward loop.
    """
    if data.forward_loop is None:
        raise CalibrationError(
            'The criterion "activation" needs data: pass config={"forward_loop": batches} (a callable or an iterable).'
        )
    sums: dict[tuple[str, int], Tensor] = {}
    wanted = _read_dims(model, axes)
    masks: list[TokenMask] = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(_observer(name, dims, sums, masks)) for name, dims in wanted.items()
    ]
    try:
        with quiet_run(model):
            calls = run_forward(model, data.forward_loop, on_start=masks.append)
    finally:
        for handle in handles:
            handle.remove()
    if calls == 0:
        raise CalibrationError("The forward loop did not run the model. Pass batches, or a callable that calls it.")
    scores = np.zeros(axes.num_atoms)
    for name, dims in wanted.items():
        for dim, axis in dims.items():
            if (name, dim) in sums:
                positions, atoms = axes.incidence(axis)
                total = sums[name, dim].cpu().numpy()
                if len(total) == len(axis):
                    _spread(scores, total, positions, atoms)
    return np.sqrt(scores)


def _read_dims(model: nn.Module, axes: Any) -> dict[str, dict[int, Any]]:
    """Return {module with weights: {dim of its input, from the end: labels}} as the trace saw them."""
    found: dict[str, dict[int, Any]] = {}
    for call in axes.calls:
        module = model.get_submodule(call.name)
        own = any(p.dim() > 1 for p in module.parameters(recurse=False))
        if own and call.inputs and not isinstance(module, nn.Embedding):
            first = call.inputs[0]
            dims = {d - len(first.shape): a for d, a in enumerate(first.axes) if a is not None}
            if dims:
                found.setdefault(call.name, dims)
    return found


def _observer(
    name: str, dims: dict[int, Any], sums: dict[tuple[str, int], Tensor], masks: list[TokenMask]
) -> Callable[..., None]:
    def observe(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0] if args and isinstance(args[0], Tensor) else None
        if x is None:
            return
        square = x.detach().float().square()
        real = masks[-1].for_tensor(x) if masks else None
        square = square if real is None else square * real
        for dim in dims:
            if x.dim() >= -dim:
                rest = [d for d in range(x.dim()) if d != x.dim() + dim]
                total = square.sum(dim=rest, dtype=torch.float64) if rest else square.double()
                before = sums.get((name, dim))
                sums[name, dim] = total if before is None or before.shape != total.shape else before + total

    return observe


@IMPORTANCE.register("taylor")
def taylor(model: nn.Module, axes: Any, data: Data) -> np.ndarray:
    """Return the sum over batches of |w * dL/dw| over all slices of each atom.

    The batches are not averaged before the absolute value: the mean gradient of a trained model is near zero.
    """
    effects = _effects(model, data)
    scores = np.zeros(axes.num_atoms)
    for name, _, dim, positions, atoms in places(model, axes):
        if name in effects:
            _spread(scores, _along(effects[name], dim), positions, atoms)
    return scores


def _effects(model: nn.Module, data: Data) -> dict[str, Tensor]:
    loader = data.data_loader if data.data_loader is not None else data.forward_loop
    if loader is None or callable(loader) or not isinstance(loader, Iterable):
        raise CalibrationError(
            'The criterion "taylor" needs batches with a loss: pass config={"data_loader": batches, "loss_func": f}, where '
            "f(output, batch) is a scalar; a transformers model that returns its own loss needs no loss_func."
        )
    flags = [(p, p.requires_grad) for p in model.parameters()]
    total: dict[str, Tensor] = {}
    empty = True
    try:
        parameters = {n: p.requires_grad_(True) for n, p in model.named_parameters() if p.is_floating_point()}
        with quiet_run(model):
            for batch in itertools.islice(loader, data.num_batches):
                empty = False
                loss = _loss(model, batch, data.loss_func)
                parts = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                for name, part in zip(parameters, parts, strict=True):
                    if part is not None:
                        effect = (part.detach().float() * parameters[name].detach().float()).abs_()
                        total[name] = effect if name not in total else total[name].add_(effect)
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
    if empty:
        raise CalibrationError('The data loader for the criterion "taylor" is empty.')
    return total


def _loss(model: nn.Module, batch: Any, loss_func: Callable[[Any, Any], Tensor] | None) -> Tensor:
    with torch.enable_grad():
        if loss_func is None:
            output = feed(model, batch)
            loss = getattr(output, "loss", None)
            if not isinstance(loss, Tensor):
                raise ConfigError(
                    'The output of the model has no loss. Pass config={"loss_func": f}, or batches with labels (transformers).'
                )
            return loss
        inputs = batch[0] if isinstance(batch, tuple | list) and len(batch) == 2 else batch
        return loss_func(feed(model, inputs), batch)
