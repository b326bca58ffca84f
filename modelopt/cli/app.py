"""The list of commands. Each command module is light; what is heavy is imported when its command runs."""

from __future__ import annotations

from typing import Annotated

import typer

from modelopt import __version__
from modelopt.cli import demo, evaluate, export, formats, inspect, plan, prune, quantize, run, trace, verify

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _name, _command, _example in (
    ("quantize", quantize.quantize, "modelopt quantize ./SmolLM2 --format nvfp4 --kv-cache fp8 --out ./SmolLM2-nvfp4"),
    ("prune", prune.prune, "modelopt prune ./SmolLM2 --ratio ffn=0.25 --importance activation --out ./SmolLM2-small"),
    ("trace", trace.trace, "modelopt trace ./SmolLM2 --svg smollm2.svg"),
    ("plan", plan.plan, "modelopt plan ./SmolLM2 --format int4-g64"),
    ("eval", evaluate.evaluate, "modelopt eval ./SmolLM2-nvfp4 --against ./SmolLM2"),
    ("inspect", inspect.inspect, "modelopt inspect ./SmolLM2-nvfp4"),
    ("verify", verify.verify, "modelopt verify ./SmolLM2-nvfp4"),
    ("export", export.export, "modelopt export ./SmolLM2-nvfp4 --to compressed-tensors --out ./SmolLM2-ct"),
    ("formats", formats.formats, "modelopt formats"),
    ("run", run.run, "modelopt run general/nvfp4 --model ./SmolLM2 --out ./SmolLM2-nvfp4"),
    ("demo", demo.demo, "modelopt demo --out demo-output"),
):
    app.command(_name, epilog=f"Example: {_example}")(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"modelopt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error and every warning.")] = False,
) -> None:
    """Quantize a model, see what it cost, and export it to the engine you already run."""
