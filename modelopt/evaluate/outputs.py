"""The distance between the outputs of two models that predict no tokens: encoders, vision and speech models.

    relative error = |y' - y| / |y|,   cosine = <y', y> / (|y'| |y|),   over all values of all batches

With an attention mask [b, l] in a batch, positions that it leaves out are not compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modelopt.core.errors import ConfigError, ShapeError
from modelopt.core.logging import Progress, null_progress
from modelopt.evaluate.logits import Model, beside, evaluating, output_tensor


@dataclass(frozen=True)
class OutputError:
    """Relative error and cosine over all outputs, and the largest absolute difference of one value."""

    relative_error: float
    cosine: float
    largest_difference: float
    num_values: int


def compare_outputs(
    original: Model, candidate: Model, batches: Iterable[Any], *, progress: Progress = null_progress
) -> OutputError:
    """Run both models on each batch (dict: keywords, tuple: arguments, tensor: one argument) and compare their outputs.

    >>> compare_outputs(bert, quantized, [tokenizer(texts, padding=True, return_tensors="pt")]).cosine      # doctest: +SKIP
    0.998
    """
    total = len(batches) if hasattr(batches, "__len__") else None
    error = energy = other = product = largest = 0.0
    count = done = 0
    with evaluating(original, candidate):
        for done, batch in enumerate(batches, 1):
            y, z = run(original, batch).double(), run(candidate, batch).double()
            z = z.to(y.device)
            if y.shape != z.shape:
                raise ShapeError(f"The original returned {list(y.shape)}, the candidate {list(z.shape)}.")
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape == y.shape[:2]:
                keep = mask.to(y.device).bool()
                y, z = y[keep], z[keep]
            difference = z - y
            error += float(difference.square().sum())
            energy += float(y.square().sum())
            other += float(z.square().sum())
            product += float((y * z).sum())
            largest = max(largest, float(difference.abs().max())) if y.numel() else largest
            count += y.numel()
            progress(done, total, "compare outputs")
    if not done or not energy:
        raise ConfigError(f"{done} batches gave outputs of norm {math.sqrt(energy)}: nothing to compare.")
    return OutputError(math.sqrt(error / energy), product / math.sqrt(energy * other) if other else 0.0, largest, count)


def run(model: Model, batch: Any) -> Tensor:
    """Call a model on one batch, on the model's device, and return its output tensor."""
    if isinstance(batch, Mapping):
        return output_tensor(model(**{k: beside(model, v) if isinstance(v, Tensor) else v for k, v in batch.items()}))
    if isinstance(batch, tuple | list):
        return output_tensor(model(*[beside(model, v) if isinstance(v, Tensor) else v for v in batch]))
    if not isinstance(batch, torch.Tensor):
        raise ConfigError(f"A batch is a dict, a tuple or a tensor, not {type(batch).__name__}.")
    return output_tensor(model(beside(model, batch)))
