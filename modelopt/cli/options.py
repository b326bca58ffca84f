"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A Hugging Face model: a directory, or an id such as org/name.", show_default=False)]
Directory = Annotated[str, typer.Argument(help="A directory that `modelopt quantize` wrote.", show_default=False)]
Format = Annotated[
    str, typer.Option("--format", "-f", help="A scheme of `modelopt formats`, or the name of a preset.", show_default=False)
]
Out = Annotated[
    str, typer.Option("--out", "-o", help="The directory to write; it appears whole or not at all.", show_default=False)
]
KVCache = Annotated[str | None, typer.Option("--kv-cache", help="Quantize the key-value cache too: fp8, nvfp4, ...")]
Skip = Annotated[
    list[str] | None, typer.Option("--skip", help="Leave modules alone whose name matches, such as '*lm_head*'. Repeatable.")
]
Layout = Annotated[
    str, typer.Option("--export", help="Layout: hf, compressed-tensors, modelopt; auto takes the first that fits.")
]
Calib = Annotated[
    str, typer.Option("--calib", help="Text to calibrate on: pydoc, a .txt, .md or .jsonl file, or a directory of them.")
]
NumSamples = Annotated[int, typer.Option("--num-samples", min=1, help="Windows of text.")]
Length = Annotated[int, typer.Option("--length", min=2, help="Tokens of a window.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Windows at a time.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ... ; auto takes a GPU if there is one.")]
DType = Annotated[str, typer.Option("--dtype", help="Type to compute and keep in: auto (as stored), float32, bfloat16, float16.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output directory if it is not empty.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Every = Annotated[bool, typer.Option("--all", help="One line for each tensor, not one for all that are alike.")]
