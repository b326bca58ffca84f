"""`modelopt formats`: the schemes of --format, the KV-cache schemes, the names of the format algebra, and the recipes."""

from __future__ import annotations

from modelopt.cli import options as o
from modelopt.cli.console import out, print_json, print_line, table


def formats(json: o.Json = False) -> None:
    """List what --format and --kv-cache take, and the number formats behind them."""
    from modelopt.numerics.formats import NAMES
    from modelopt.recipes.load import builtin_recipes
    from modelopt.torch.quantization.presets import KV_SCHEMES, PRESETS, SCHEMES

    schemes = [_scheme_row(name, preset, text) for name, (preset, text) in SCHEMES.items()]
    if json:
        keys = ("name", "weight", "input", "bits", "description")
        data = {
            "schemes": [dict(zip(keys, row, strict=True)) for row in schemes],
            "kv_cache": list(KV_SCHEMES),
            "presets": sorted(PRESETS),
        }
        print_json({**data, "formats": dict(NAMES), "recipes": builtin_recipes()})
        return
    out().print(
        table(
            ["--format", "Weights", "Inputs", "Bits", "What it is"], schemes, right=("Bits",), title="Schemes", wide=("Inputs",)
        )
    )
    print_line("")
    out().print(
        table(
            ["Name", "Algebra"],
            [[n, f] for n, f in NAMES.items()],
            title="Number formats, for the key `format` of a configuration",
        )
    )
    print_line("")
    out().print(
        table(["Recipe", "What it does"], [[n, d] for n, d in builtin_recipes().items()], title="Recipes for `modelopt run`")
    )
    print_line("")
    print_line(f"--kv-cache takes: {', '.join(KV_SCHEMES)}")
    print_line(f"--format also takes the {len(PRESETS)} presets by their names, such as NVFP4_DEFAULT_CFG.")


def _scheme_row(name: str, preset: dict[str, object], text: str) -> list[str]:
    from modelopt.torch.quantization.config import QuantizeConfig

    found = {"weight": "-", "input": "-"}
    bits = ""
    for rule in QuantizeConfig.parse(preset).rules:
        for kind in found:
            if rule.cfgs and rule.enable is not False and f"{kind}_quantizer" in rule.pattern:
                formats = [c.to_format() for c in rule.cfgs]
                found[kind] = " then ".join(str(f) for f in formats)
                if kind == "weight":
                    bits = f"{formats[-1].bits_per_value((4096, 4096)):.2f}"
    return [name, found["weight"], found["input"], bits, text]
