"""`modelopt verify`: load an export in transformers + compressed-tensors, and compare its logits with ours."""

from __future__ import annotations

import typer

from modelopt.cli import options as o
from modelopt.cli.console import print_error, print_json, print_line
from modelopt.cli.plan import print_facts


def verify(directory: o.Directory, json: o.Json = False) -> None:
    """Load an exported directory in another library and compare its logits with ours; exit code 1 if they differ."""
    from modelopt.cli.progress import Bars
    from modelopt.recipes.source import check_directory
    from modelopt.torch.export.verify import verify as verify_export

    path = check_directory(directory)
    with Bars() as bars, bars.step("verify"):
        result = verify_export(path)
    if json:
        print_json({**result.__dict__, "conversion": list(result.conversion)})
    elif result.ok:
        print_line(f"{directory}: {result.reason}.", "bold green")
    if not json and result.difference is not None:
        comparable = (
            "" if result.inputs_comparable else " (the other library scales these inputs in its own way; only weights must agree)"
        )
        print_facts(
            [
                ("layout", result.layout),
                ("tokens compared", str(result.num_tokens)),
                ("largest |logit|", f"{result.largest_logit:.4g}"),
                ("largest difference", f"{result.difference:.4g}{comparable}"),
                ("weights alone", f"{result.weights_difference:.4g} (allowed {result.tolerance:.4g})"),
            ]
        )
    if not result.ok:
        if not json:
            print_error(f"{directory} does not verify: {result.reason}.")
        raise typer.Exit(1)
