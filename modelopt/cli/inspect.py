"""`modelopt inspect`: what a directory holds, read from headers only."""

from __future__ import annotations

from modelopt.cli import options as o
from modelopt.cli.console import out, print_json, print_line, size, table
from modelopt.cli.plan import grouped_names, print_facts


def inspect(directory: o.Directory, every: o.Every = False, json: o.Json = False) -> None:
    """Show formats, bits per weight, sizes, history and coverage of a directory; no weights are read."""
    from modelopt.recipes.inspect import inspect_directory

    found = inspect_directory(directory)
    if json:
        print_json(found.to_dict())
        return
    groups = grouped_names([(e.name, (e.shape, e.format, e.input_format), e) for e in found.entries], every)
    rows = [
        [
            name,
            str(len(g)),
            "x".join(map(str, g[0].shape)),
            g[0].format or "as it is",
            g[0].input_format or "-",
            size(sum(e.num_bytes for e in g)),
        ]
        for name, g in groups
    ]
    columns = ["Layer or tensor", "Count", "Stored shape", "Weight", "Input", "Bytes"]
    out().print(table(columns, rows, right=("Count", "Bytes"), title=str(found.directory), wide=("Stored shape", "Input")))
    print_line("")
    bits = found.bits_per_weight
    share = found.plan.get("coverage")
    facts = [
        ("architecture", found.architecture),
        ("layout", found.layout),
        ("written by", found.producer or "unknown"),
        ("history", " -> ".join(found.steps) or "none"),
        ("quantized layers", str(len(found.quantized))),
        ("bits per weight", "unknown" if bits is None else f"{bits:.3f} in quantized layers"),
        ("weights", f"{size(found.num_bytes)} ({found.num_bytes} bytes of tensors)"),
        ("KV cache", found.kv_cache or "as it is"),
        ("coverage", f"{share:.1%}" if isinstance(share, int | float) else "not recorded"),
        ("files", ", ".join(f"{name} ({size(n)})" for name, n in found.files.items())),
    ]
    print_facts(facts)
