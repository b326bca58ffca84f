"""`modelopt eval`: what quantization cost, on text that calibration did not see."""

from __future__ import annotations

from typing import Annotated

import typer

from modelopt.cli import options as o
from modelopt.cli.console import print_json, print_line
from modelopt.cli.plan import print_facts


def evaluate(
    directory: o.Directory,
    against: Annotated[
        str, typer.Option("--against", "-a", help="The original model: a directory or an id.", show_default=False)
    ],
    data: Annotated[
        str, typer.Option("--data", help="Text to score: pydoc, a .txt, .md or .jsonl file, or a directory of them.")
    ] = "pydoc",
    num_samples: o.NumSamples = 9,
    length: o.Length = 512,
    batch_size: o.BatchSize = 1,
    device: o.Device = "auto",
    dtype: o.DType = "float32",
    trust_remote_code: o.Trust = False,
    json: o.Json = False,
) -> None:
    """Compare a quantized directory with its original: KL divergence, top-1 agreement, perplexity."""
    from modelopt.cli.progress import Bars
    from modelopt.recipes.compare import compare_directories
    from modelopt.recipes.load import Evaluation

    text = Evaluation.parse({"source": data, "num_samples": num_samples, "length": length, "batch_size": batch_size}, "options")
    with Bars() as bars:
        found = compare_directories(directory, against, text, device, dtype, trust_remote_code, bars)
    if json:
        print_json(found.to_dict())
        return
    error = "" if found.kl_standard_error is None else f" +- {found.kl_standard_error:.5f}"
    print_line(f"{directory} against {against}", "bold")
    print_facts(
        [
            ("KL divergence", f"{found.kl:.5f}{error} nats per token (99th percentile {found.kl_p99:.3f})"),
            ("top-1 agreement", f"{found.top1_agreement:.2%}"),
            ("perplexity", f"{found.original_perplexity:.3f} -> {found.perplexity:.3f}"),
            ("scored", f"{found.num_tokens} tokens in {found.num_windows} windows of {data}"),
            ("seconds", f"{found.seconds:.1f}"),
        ]
    )
