"""`modelopt export`: a quantized directory in another layout; codes and scales stay what they are."""

from __future__ import annotations

from typing import Annotated

import typer

from modelopt.cli import options as o
from modelopt.cli.console import print_line, size


def export(
    directory: o.Directory,
    to: Annotated[str, typer.Option("--to", help="The layout to write: hf or compressed-tensors.", show_default=False)],
    out: o.Out,
    overwrite: o.Overwrite = False,
) -> None:
    """Write a quantized directory again in another layout."""
    from modelopt.cli.progress import Bars
    from modelopt.recipes.run import check_target
    from modelopt.recipes.source import check_directory, open_quantized
    from modelopt.torch.export.export import export as write
    from modelopt.torch.export.writers import WRITERS

    WRITERS.get(to)
    target = check_target(out, overwrite)
    path = check_directory(directory)
    with Bars() as bars:
        with bars.step("read"):
            content = open_quantized(path)
        write(content, target, to, source=path, overwrite=overwrite, progress=bars)
    total = sum(f.stat().st_size for f in target.glob("*.safetensors"))
    print_line(f"Wrote {target} in the layout {to}: {size(total)}.", "bold")
