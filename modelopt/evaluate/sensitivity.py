"""The error that quantization adds in each layer, on real inputs.

    output error = |Q(x) - L(x)| / |L(x)|     L the original's layer, Q the candidate's layer of the same name, x the inputs of
                                              the original's layer: each layer by itself, not what earlier layers did
    weight error = |W' - W| / |W|             W' the weight as the candidate's weight quantizer makes it

Both are ratios of Euclidean norms over all values of all windows. Only the original runs as a whole; at each layer the
candidate's is called on the same input, so that no more than one layer's outputs are held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modelopt.core.errors import ConfigError
from modelopt.core.logging import Progress, null_progress
from modelopt.core.match import matches
from modelopt.evaluate.logits import evaluating, output_tensor
from modelopt.evaluate.outputs import run
from modelopt.evaluate.report.data import LayerError


class _Sums:
    def __init__(self) -> None:
        self.error = self.energy = 0.0

    def add(self, value: Tensor, reference: Tensor) -> None:
        reference = reference.float()
        self.error += float((value.to(reference.device).float() - reference).square().sum(dtype=torch.float64))
        self.energy += float(reference.square().sum(dtype=torch.float64))

    @property
    def relative(self) -> float:
        return math.sqrt(self.error / self.energy) if self.energy else (math.inf if self.error else 0.0)


def layer_errors(
    original: nn.Module,
    quantized: nn.Module,
    windows: Tensor | Iterable[Any],
    *,
    pattern: str = "*",
    progress: Progress = null_progress,
) -> list[LayerError]:
    """Return the error of every layer that differs, in the order of the model.

    A layer is compared if it is a quantized module of `quantized` with a quantizer that is on, or a Linear whose weight
    differs. windows: int64 [n, l], run one at a time, or any iterable of batches. Layers that no input reached are left out.

    >>> layer_errors(original, quantized, windows)[0]                                               # doctest: +SKIP
    LayerError(name='model.layers.0.self_attn.q_proj', format='e2m1[32]~*e8m0', output_error=0.14, weight_error=0.12)
    """
    pairs = {name: pair for name, pair in _pairs(original, quantized) if matches(name, pattern)}
    if not pairs:
        raise ConfigError(
            f'No layer that matches "{pattern}" differs between the two models. The original must be a copy taken before '
            "quantization, because quantizing changes a model in place."
        )
    sums = {name: _Sums() for name in pairs}
    batches = windows.split(1) if isinstance(windows, Tensor) else windows
    total = len(batches) if hasattr(batches, "__len__") else None
    with evaluating(original, quantized), _watch(pairs, sums):
        for done, batch in enumerate(batches, 1):
            run(original, batch)
            progress(done, total, "layer errors")
    with torch.no_grad():
        return [
            LayerError(name, _formats(new), sums[name].relative, _weight_error(old, new))
            for name, (old, new) in pairs.items()
            if sums[name].energy
        ]


def _pairs(original: nn.Module, quantized: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, nn.Module]]]:
    theirs = dict(quantized.named_modules())
    for name, old in original.named_modules():
        new = theirs.get(name)
        if new is None or new is old or not name:
            continue
        if hasattr(new, "quantized_tensors"):
            # An attention that holds quantized layers is no layer itself: its error would count theirs again.
            holds_layers = any(hasattr(part, "quantized_tensors") for part in new.modules() if part is not new)
            if _is_on(new) and not holds_layers:
                yield name, (old, new)
        elif isinstance(old, nn.Linear) and _differ(old.weight, getattr(new, "weight", None)):
            yield name, (old, new)


def _differ(old: Tensor, new: Any) -> bool:
    return isinstance(new, Tensor) and old.shape == new.shape and not torch.equal(old, new.to(old))


def _is_on(module: nn.Module) -> bool:
    """Whether a quantizer, or one inside a sequence of quantizers, is on."""
    return any(getattr(part, "is_enabled", False) is True for part in module.modules())


@contextmanager
def _watch(pairs: dict[str, tuple[nn.Module, nn.Module]], sums: dict[str, _Sums]) -> Iterator[None]:
    """Have each original layer call its counterpart on its own inputs and add up the difference."""

    def hook(new: nn.Module, total: _Sums) -> Callable[..., None]:
        def compare(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            total.add(output_tensor(new(*args, **kwargs)), output_tensor(output))

        return compare

    handles = [old.register_forward_hook(hook(new, sums[name]), with_kwargs=True) for name, (old, new) in pairs.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _formats(module: nn.Module) -> str:
    """Return `weight format`, or `weight format x input format`, of a quantized module."""
    found = []
    for name in ("weight_quantizer", "input_quantizer"):
        quantizer = getattr(module, name, None)
        parts = [q for q in quantizer.modules() if getattr(q, "is_enabled", False) is True] if quantizer is not None else []
        texts = [str(q.format) for q in parts if getattr(q, "format", None) is not None]
        if texts:
            found.append(" then ".join(texts))
    return " x ".join(found)


def _weight_error(old: nn.Module, new: nn.Module) -> float | None:
    weight, other = getattr(old, "weight", None), getattr(new, "weight", None)
    if not isinstance(weight, Tensor) or not isinstance(other, Tensor) or weight.shape != other.shape:
        return None
    quantizer = getattr(new, "weight_quantizer", None)
    if quantizer is not None and _is_on(quantizer):
        other = quantizer(other)
    total = _Sums()
    total.add(other, weight)
    return total.relative
