"""Running a recipe: plan, load, apply the steps, compare, export. The output directory is complete or absent.

Everything that can be known to be wrong is found before weights are loaded: names, configurations, text, what the layout refuses.
Beside the files of the layout and `modelopt.json`, the directory holds `recipe.yaml`, `plan.json` (sizes, coverage) and, if the
recipe evaluates, `report.json`.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from modelopt.core.errors import ConfigError, ExportError
from modelopt.core.logging import Progress, null_progress
from modelopt.core.plugins import has
from modelopt.evaluate.kl import Comparison, Reference
from modelopt.evaluate.report import Data, Original, Report, write_json
from modelopt.evaluate.report import Row as ReportRow
from modelopt.recipes.load import Evaluation, Recipe, Text, recipe_text
from modelopt.recipes.plan import OWN_LAYOUT, Plan, plan_source
from modelopt.recipes.source import (
    Source,
    compute_device,
    compute_dtype,
    load_model,
    load_tokenizer,
    open_source,
    require_plain,
)
from modelopt.recipes.steps import resolve_steps
from modelopt.torch.export.export import export
from modelopt.torch.export.files import staged_directory
from modelopt.torch.export.files import write_json as write_plan
from modelopt.torch.export.readers.model import read
from modelopt.torch.export.verify import verify
from modelopt.torch.opt.mode import apply_mode
from modelopt.torch.quantization.mode import QuantizeModeRegistry
from modelopt.torch.quantization.saving import attach_save_pretrained
from modelopt.torch.quantization.summary import coverage
from modelopt.torch.utils.dataset import load_texts, token_windows

VERIFY_BYTES = 8 * 10**9  # larger models are not loaded a second and third time unasked


@dataclass(frozen=True)
class Result:
    """What came out: the directory, the plan that was followed, the comparison if one was asked for, seconds by stage."""

    directory: Path
    plan: Plan
    comparison: Comparison | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    verified: str = ""


def run_recipe(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = null_progress,
) -> Result:
    """Do what the recipe says and return the result. `out` overrides the recipe's own directory.

    Raises ConfigError, UnknownNameError, CheckpointError, ModeError, CalibrationError or ExportError, each with what to change.

    >>> run_recipe(load_recipe("general/nvfp4"), "out")          # doctest: +SKIP
    """
    target = check_target(out if out is not None else recipe.export.directory, overwrite)
    steps = resolve_steps(recipe)
    if recipe.model is None:
        raise ConfigError("The recipe names no model. Add the key model, or pass --model.")
    source = open_source(recipe.model)
    require_plain(source)
    check_apart(target, source)
    where, dtype = compute_device(device), compute_dtype(source, recipe.dtype)
    plan = plan_source(source, recipe, trust_remote_code)
    _refuse(plan)
    seconds: dict[str, float] = {}
    clock = _clock(seconds)
    calibration, evaluation = _windows(source, recipe, plan, trust_remote_code)
    progress(0, 1, "load the model")
    model = load_model(source, dtype, where, trust_remote_code)
    progress(1, 1, "load the model")
    clock("load")
    reference = None
    if recipe.evaluate is not None and evaluation is not None:
        reference = Reference(model, evaluation, batch_size=recipe.evaluate.batch_size, progress=progress)
        clock("original")
    loop = None if calibration is None else forward_loop(calibration, recipe.calibration.batch_size, progress)
    progress(0, 1, "quantize")
    model = apply_mode(model, steps, registry=QuantizeModeRegistry, mode_kwargs={"forward_loop": loop})
    progress(1, 1, "quantize")
    clock("quantize")
    coverage(model)  # warns where much was left
    comparison = None if reference is None else reference.compare(model, progress=progress, what="quantized")
    del reference
    gc.collect()
    clock("compare")
    report = None if comparison is None else job_report(source, recipe, plan, comparison)
    verified = write_result(model, target, source, recipe, plan, report, overwrite, progress)
    clock("export and read back")
    return Result(target, plan, comparison, seconds, verified)


def check_target(out: str | Path | None, overwrite: bool) -> Path:
    """Return the output directory, or raise ConfigError before any work if it is missing, a file, or not empty."""
    if out is None or not str(out):
        raise ConfigError("No output directory is given. Pass --out DIR.")
    target = Path(out).expanduser()
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; the output is a directory. Choose another path.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ConfigError(f"The directory {target} is not empty. Choose another one, or replace it with --overwrite.")
    return target


def check_apart(target: Path, source: Source) -> None:
    """Raise ConfigError if the output directory is the original model, or holds it."""
    original = source.directory.resolve()
    if target.resolve() == original or target.resolve() in original.parents:
        raise ConfigError(f"{target} is (or holds) the original model itself. Choose another output directory.")


def _refuse(plan: Plan) -> None:
    if not plan.quantized:
        raise ConfigError(f"Nothing of {plan.model} would be quantized. Look at `modelopt plan`, and at the rules and --skip.")
    if plan.refused:
        name, reason = plan.refused[0]
        more = f" ({len(plan.refused)} such tensors)" if len(plan.refused) > 1 else ""
        raise ExportError(
            f"The layout {plan.layout} cannot hold this model. {name}: {reason}{more}. Choose another format or layout, leave "
            "these layers alone with --skip, or keep the model in this library's own form with --export modelopt."
        )


def _clock(seconds: dict[str, float]) -> Callable[[str], None]:
    last = [time.perf_counter()]

    def lap(name: str) -> None:
        now = time.perf_counter()
        seconds[name] = now - last[0]
        last[0] = now

    return lap


def _windows(source: Source, recipe: Recipe, plan: Plan, trust_remote_code: bool) -> tuple[Tensor | None, Tensor | None]:
    """Return the token windows for calibration and evaluation, each only where it is needed."""
    if not plan.needs_data and recipe.evaluate is None:
        return None, None
    tokenizer = load_tokenizer(source, trust_remote_code)
    calibration = text_windows(tokenizer, recipe.calibration, "calibration", source) if plan.needs_data else None
    evaluation = None if recipe.evaluate is None else text_windows(tokenizer, recipe.evaluate, "evaluation", source)
    return calibration, evaluation


def text_windows(tokenizer: Any, text: Text, split: str, source: Source) -> Tensor:
    """Return int64 [num_samples, length] token windows, all of whose ids the model knows. Raises ConfigError."""
    given = text.source if isinstance(text.source, str) else list(text.source)
    windows = token_windows(tokenizer, load_texts(given, split), text.num_samples, text.length)
    vocabulary = source.config.get("vocab_size")
    if isinstance(vocabulary, int) and int(windows.max()) >= vocabulary:
        raise ConfigError(
            f"The tokenizer of {source.name} gives token {int(windows.max())}, and the model has only {vocabulary}. "
            "It is the tokenizer of another model."
        )
    return windows


def forward_loop(windows: Tensor, batch_size: int, progress: Progress = null_progress) -> Callable[[nn.Module], None]:
    """Return a function that runs a model over token windows [n, length] without building a key-value cache."""

    def loop(model: nn.Module) -> None:
        device = next(model.parameters()).device
        for done, batch in enumerate(windows.split(batch_size)):
            progress(done * batch_size, len(windows), "calibrate")
            model(input_ids=batch.to(device), use_cache=False)
        progress(len(windows), len(windows), "calibrate")

    return loop


def write_result(
    model: nn.Module,
    target: Path,
    source: Source,
    recipe: Recipe,
    plan: Plan,
    report: Report | None,
    overwrite: bool,
    progress: Progress,
) -> str:
    """Write the layout, the recipe and the report into one directory that appears whole or not at all.

    Returns what was found when the files were read back. Raises ExportError, and leaves nothing, if that is not the model.
    """
    with staged_directory(target, overwrite) as stage:
        if plan.layout == OWN_LAYOUT:
            from modelopt.torch.opt.huggingface import save_pretrained

            attach_save_pretrained(model)
            save_pretrained(model, stage, overwrite=True)
            _carry(source, stage)
            verified = "not read back: no other library knows this form"
        else:
            size = recipe.export.max_shard_size
            export(model, stage, plan.layout, source.directory, overwrite=True, max_shard_size=size, progress=progress)
            verified = read_back(stage, model, source, recipe.export.verify, progress)
        (stage / "recipe.yaml").write_text(recipe_text(recipe), encoding="utf-8")
        write_plan(stage / "plan.json", {k: v for k, v in plan.to_dict().items() if k != "rows"})
        if report is not None:
            write_json(report, stage / "report.json")
    return verified


def read_back(stage: Path, model: nn.Module, source: Source, wanted: bool, progress: Progress) -> str:
    """Let an independent reader compare the files in `stage` with `model`, and return what it found. Raises ExportError."""
    if not wanted:
        return "not read back, as asked"
    progress(0, 1, "read back")
    if not (has("transformers") and has("compressed_tensors")) or source.num_bytes > VERIFY_BYTES:
        read(stage)
        found = "read back by this library's own reader only; run `modelopt verify` where transformers can hold the model twice"
    else:
        result = verify(stage, model)
        if not result.ok:
            raise ExportError(f"The exported files are not the model: {result.reason}. Nothing was kept; please report this.")
        found = f"read back by transformers and compressed-tensors: {result.reason}"
    progress(1, 1, "read back")
    return found


def _carry(source: Source, stage: Path) -> None:
    from modelopt.torch.export.files import carry_files

    carry_files(source.directory, stage)


def job_report(source: Source, recipe: Recipe, plan: Plan, comparison: Comparison) -> Report:
    """Return the report of a job with one candidate."""
    text = recipe.evaluate or Evaluation()
    name = recipe.steps[0].config if isinstance(recipe.steps[0].config, str) else recipe.steps[0].config.get("preset", "custom")
    return Report(
        title=f"{source.directory.name} in {name}",
        original=original_of(source, comparison.original_perplexity),
        data=data_of(text, comparison, recipe.calibration if plan.needs_data else None),
        rows=(report_row(str(name), plan, comparison),),
        recipe=recipe.model_dump(mode="json", exclude_none=True),
    )


def original_of(source: Source, perplexity: float) -> Original:
    """Return what a report says about the original."""
    weights = sum(math.prod(shape) for shape, _, _ in source.tensors.values())
    bits = 8 * source.num_bytes / max(weights, 1)
    return Original(source.directory.name, weights, source.num_bytes, bits, perplexity)


def data_of(text: Text, comparison: Comparison, calibration: Text | None) -> Data:
    """Return what a report says about the text that was scored."""
    shown = text.source if isinstance(text.source, str) else ", ".join(text.source)
    used = (
        "" if calibration is None else f"{calibration.num_samples} windows of {calibration.length} tokens of {calibration.source}"
    )
    return Data(shown, "evaluation", comparison.num_windows, text.length, comparison.num_tokens, used)


def report_row(name: str, plan: Plan, comparison: Comparison, seconds: float | None = None, layers: Any = ()) -> ReportRow:
    """Return one row of a report."""
    formats = sorted({r.format for r in plan.quantized})
    return ReportRow(
        name=name,
        format=", ".join(formats),
        bits_per_weight=plan.bits_per_weight,
        num_bytes=plan.num_bytes,
        kl=comparison.kl,
        kl_standard_error=comparison.kl_standard_error,
        kl_p99=comparison.kl_p99,
        top1_agreement=comparison.top1_agreement,
        perplexity=comparison.perplexity,
        seconds=comparison.seconds if seconds is None else seconds,
        layers=tuple(layers),
    )
