"""One model in many formats: quantize, compare with the original, measure the size, each on the same text.

The original is kept in float32, where its stored values are exact; every candidate is a copy of it, quantized and then freed.
Sizes are the bytes that the layout would write, in the model's stored type (`recipes/plan.py`).
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelopt.core.logging import Progress, null_progress
from modelopt.evaluate.kl import Reference
from modelopt.evaluate.report import Row
from modelopt.evaluate.sensitivity import layer_errors
from modelopt.recipes.load import Recipe, parse_recipe
from modelopt.recipes.plan import plan_source
from modelopt.recipes.run import forward_loop, report_row
from modelopt.recipes.source import Source, load_model
from modelopt.recipes.steps import resolve_steps
from modelopt.torch.opt.mode import apply_mode
from modelopt.torch.quantization.mode import QuantizeModeRegistry


@dataclass(frozen=True)
class Candidate:
    """A scheme (or preset) under the name that people know it by."""

    name: str
    scheme: str


@dataclass(frozen=True)
class Sweep:
    """One report row for each candidate, seconds of each comparison, and the perplexity of the original."""

    rows: tuple[Row, ...]
    compare_seconds: tuple[float, ...]
    original_perplexity: float


def sweep(
    source: Source,
    candidates: Sequence[Candidate],
    scored: Tensor,
    calibration: Tensor,
    *,
    layout: str = "auto",
    batch_size: int = 1,
    error_windows: int = 1,
    progress: Progress = null_progress,
    finished: Callable[[Row], None] | None = None,
) -> Sweep:
    """Quantize `source` once for each candidate and compare it with the original.

    Args:
        scored: int64 [n, length] token windows on which the models are compared.
        layout: the layout whose bytes are counted; `auto` is the first that fits each format.
        calibration: int64 [m, length] token windows for the formats that need data.
        error_windows: how many of the scored windows serve the per-layer errors (0: none).
        finished: called with each row as soon as it is known.

    >>> sweep(open_source("model"), [Candidate("NVFP4", "nvfp4")], windows, others).rows[0].kl       # doctest: +SKIP
    """
    original = load_model(source, torch.float32, torch.device("cpu"))
    reference = Reference(original, scored, batch_size=batch_size, progress=progress)
    rows, seconds = [], []
    for done, one in enumerate(candidates):
        progress(done, len(candidates), "all formats")
        recipe = parse_recipe(
            {"model": source.name, "steps": [{"mode": "quantize", "config": one.scheme}], "export": {"layout": layout}}
        )
        row, took = _candidate(
            source, original, one.name, recipe, reference, scored[:error_windows], calibration, batch_size, progress
        )
        rows.append(row)
        seconds.append(took)
        if finished is not None:
            finished(row)
    progress(len(candidates), len(candidates), "all formats")
    return Sweep(tuple(rows), tuple(seconds), reference.perplexity)


def _candidate(
    source: Source,
    original: nn.Module,
    name: str,
    recipe: Recipe,
    reference: Reference,
    error_windows: Tensor,
    calibration: Tensor,
    batch_size: int,
    progress: Progress,
) -> tuple[Row, float]:
    plan = plan_source(source, recipe)
    model = copy.deepcopy(original)

    def named(done: int, total: int | None, what: str) -> None:
        progress(done, total, f"{name}: {what}")

    loop: Any = forward_loop(calibration, batch_size, named) if plan.needs_data else None
    start = time.perf_counter()
    apply_mode(model, resolve_steps(recipe), registry=QuantizeModeRegistry, mode_kwargs={"forward_loop": loop})
    quantizing = time.perf_counter() - start
    found = reference.compare(model, progress=named, what="compare")
    layers = []
    if len(error_windows):
        layers = layer_errors(original, model, error_windows, progress=named)
    del model
    gc.collect()
    return report_row(name, plan, found, quantizing, layers), found.seconds
