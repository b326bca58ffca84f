"""`modelopt quantize`: a model, a format, a directory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from modelopt.cli import options as o
from modelopt.cli.console import print_json, print_line, size
from modelopt.cli.plan import make_recipe, print_facts, print_plan
from modelopt.core.errors import ConfigError

if TYPE_CHECKING:
    from modelopt.recipes.load import Recipe
    from modelopt.recipes.run import Result


def quantize(
    model: o.Model,
    format: o.Format,
    out: Annotated[str, typer.Option("--out", "-o", help="The directory to write; it appears whole or not at all.")] = "",
    calib: o.Calib = "pydoc",
    kv_cache: o.KVCache = None,
    skip: o.Skip = None,
    export: o.Layout = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop; no weights are loaded.")] = False,
    overwrite: o.Overwrite = False,
    num_samples: o.NumSamples = 64,
    length: o.Length = 512,
    batch_size: o.BatchSize = 1,
    device: o.Device = "auto",
    dtype: o.DType = "auto",
    verify: Annotated[bool, typer.Option(help="Read the result back with transformers and compressed-tensors.")] = True,
    trust_remote_code: o.Trust = False,
    every: o.Every = False,
    json: o.Json = False,
) -> None:
    """Quantize a causal language model and write it in a layout that engines load."""
    calibration = {"source": calib, "num_samples": num_samples, "length": length, "batch_size": batch_size}
    recipe = make_recipe(model, format, kv_cache, skip, export, calibration, dtype)
    if not verify:
        recipe = recipe.model_copy(update={"export": recipe.export.model_copy(update={"verify": False})})
    if dry_run:
        from modelopt.recipes.plan import plan_model

        made = plan_model(recipe, trust_remote_code)
        print_json(made.to_dict()) if json else print_plan(made, every)
        return
    if not out:
        raise ConfigError("No output directory is given. Pass --out DIR, or --dry-run to see the plan only.")
    run_and_print(recipe, out, overwrite, device, trust_remote_code, json)


def run_and_print(recipe: Recipe, out: str | None, overwrite: bool, device: str, trust_remote_code: bool, json: bool) -> None:
    """Run a recipe with progress bars and print what came out."""
    from modelopt.cli.progress import Bars
    from modelopt.recipes.run import run_recipe

    with Bars() as bars:
        result = run_recipe(recipe, out, overwrite=overwrite, device=device, trust_remote_code=trust_remote_code, progress=bars)
    if json:
        print_json(_to_dict(result))
    else:
        print_result(result)


def print_result(result: Result) -> None:
    """Print where the result is, how large, and what it cost."""
    plan, compared = result.plan, result.comparison
    print_line(f"Wrote {result.directory} in the layout {plan.layout}.", "bold")
    facts = [
        (
            "size",
            f"{size(plan.source_bytes)} -> {size(_weight_bytes(result))}, {plan.bits_per_weight:.3f} bits per quantized weight",
        ),
        (
            "coverage",
            f"{plan.coverage:.1%}; excluded by rules: {len(plan.excluded_by_default) + len(plan.excluded_by_user)} tensors",
        ),
    ]
    if compared is not None:
        error = "" if compared.kl_standard_error is None else f" +- {compared.kl_standard_error:.4f}"
        facts += [
            ("KL divergence", f"{compared.kl:.4f}{error} nats per token over {compared.num_tokens} tokens"),
            ("top-1 agreement", f"{compared.top1_agreement:.1%}"),
            ("perplexity", f"{compared.original_perplexity:.2f} -> {compared.perplexity:.2f}"),
        ]
    facts.append(("checked", result.verified))
    facts.append(("seconds", ", ".join(f"{name} {value:.1f}" for name, value in result.seconds.items())))
    print_facts(facts)


def _weight_bytes(result: Result) -> int:
    return sum(f.stat().st_size for f in result.directory.glob("*.safetensors"))


def _to_dict(result: Result) -> dict[str, object]:
    compared = None if result.comparison is None else result.comparison.to_dict()
    plan = {k: v for k, v in result.plan.to_dict().items() if k != "rows"}
    return {
        "directory": str(result.directory),
        "plan": plan,
        "comparison": compared,
        "seconds": result.seconds,
        "verified": result.verified,
    }
