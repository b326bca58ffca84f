"""`modelopt run`: a recipe, as a file or by its name in the package."""

from __future__ import annotations

from typing import Annotated

import typer

from modelopt.cli import options as o
from modelopt.cli.console import print_json
from modelopt.cli.plan import print_plan
from modelopt.cli.quantize import run_and_print


def run(
    recipe: Annotated[
        str, typer.Argument(help="A YAML file, or a recipe of the package such as general/nvfp4.", show_default=False)
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="The model, in place of the recipe's own.")] = "",
    out: Annotated[str, typer.Option("--out", "-o", help="The directory to write, in place of the recipe's own.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop; no weights are loaded.")] = False,
    overwrite: o.Overwrite = False,
    device: o.Device = "auto",
    trust_remote_code: o.Trust = False,
    every: o.Every = False,
    json: o.Json = False,
) -> None:
    """Run a recipe: quantize, compare and export as a YAML file says."""
    from modelopt.recipes.load import load_recipe

    job = load_recipe(recipe)
    if model:
        job = job.model_copy(update={"model": model})
    if dry_run:
        from modelopt.recipes.plan import plan_model

        made = plan_model(job, trust_remote_code)
        print_json(made.to_dict()) if json else print_plan(made, every)
        return
    run_and_print(job, out or None, overwrite, device, trust_remote_code, json)
