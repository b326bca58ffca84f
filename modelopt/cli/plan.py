"""`modelopt plan`: what quantization would do, without loading weights. `modelopt quantize --dry-run` prints the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from modelopt.cli import options as o
from modelopt.cli.console import out, print_json, print_line, print_warning, size, table

if TYPE_CHECKING:
    from modelopt.recipes.load import Recipe
    from modelopt.recipes.plan import Plan, Row

T = TypeVar("T")


def make_recipe(
    model: str,
    scheme: str,
    kv_cache: str | None = None,
    skip: list[str] | None = None,
    layout: str = "auto",
    calibration: dict[str, object] | None = None,
    dtype: str = "auto",
) -> Recipe:
    """Return the recipe that the options of a command spell: the same job, as data."""
    from modelopt.recipes.load import parse_recipe

    config: object = scheme
    if kv_cache or skip:
        config = {"preset": scheme, **({"kv_cache": kv_cache} if kv_cache else {}), **({"skip": list(skip)} if skip else {})}
    data = {"model": model, "dtype": dtype, "steps": [{"mode": "quantize", "config": config}], "export": {"layout": layout}}
    return parse_recipe({**data, **({"calibration": calibration} if calibration else {})}, "command line")


def plan(
    model: o.Model,
    format: o.Format,
    kv_cache: o.KVCache = None,
    skip: o.Skip = None,
    export: o.Layout = "auto",
    dtype: o.DType = "auto",
    trust_remote_code: o.Trust = False,
    every: o.Every = False,
    json: o.Json = False,
) -> None:
    """Show every tensor with its format, what is left alone and why, sizes and coverage, without loading weights."""
    from modelopt.recipes.plan import plan_model

    made = plan_model(make_recipe(model, format, kv_cache, skip, export, dtype=dtype), trust_remote_code)
    if json:
        print_json(made.to_dict())
    else:
        print_plan(made, every)


def print_plan(plan: Plan, every: bool = False) -> None:
    """Print a plan: one line for all tensors that differ only in the numbers of their names (or for each), then the summary."""
    groups = grouped_names([(r.name, (r.shape, r.format, r.input_format, r.why), r) for r in plan.rows], every)
    rows = [[name, *_cells(members)] for name, members in groups]
    columns = ["Tensor", "Count", "Shape", "Weight", "Input", "Before", "After"]
    narrow = ("Shape", "Input", "Before")
    out().print(table(columns, rows, right=("Count", "Before", "After"), title=f"Plan for {plan.model}", wide=narrow))
    print_line("")
    facts = [
        ("layout", plan.layout),
        ("bits per weight", f"{plan.bits_per_weight:.3f} in quantized layers, {plan.bits_per_parameter:.3f} over all parameters"),
        ("size", f"{size(plan.source_bytes)} -> {size(plan.num_bytes)} ({plan.num_bytes} bytes)"),
        ("peak memory", f"about {size(plan.peak_bytes)} and the libraries themselves"),
        ("calibration", "needs text" if plan.needs_data else "needs no data"),
        ("KV cache", plan.kv_cache or "as it is"),
        ("coverage", f"{plan.coverage:.1%} of the Linear and expert weight bytes that no rule excludes"),
    ]
    print_facts(facts)
    _print_list("left, though no rule excludes it", plan.left)
    _print_list("excluded by default", plan.excluded_by_default)
    _print_list("excluded by your rules", plan.excluded_by_user)
    if plan.refused:
        print_line("")
        out().print(table([f"The layout {plan.layout} refuses", "Reason"], [[n, r] for n, r in _same_reasons(plan.refused)]))
        print_warning(f"{len(plan.refused)} tensors have no place in the layout {plan.layout}; quantize would stop here.")
    if plan.coverage < 0.9:
        print_warning(f"Only {plan.coverage:.1%} of the weight bytes that no rule excludes would be quantized.")


def print_facts(facts: list[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print_line(f"{name:<{width}}  {value}")


def _print_list(title: str, weights: tuple[tuple[str, int, str], ...]) -> None:
    if not weights:
        return
    print_line(f"{title}: {len(weights)} tensors, {size(sum(n for _, n, _ in weights))}")
    for name, reason in _same_reasons(tuple((name, reason) for name, _, reason in weights)):
        print_line(f"  {name}: {reason}")


def _pattern(name: str) -> str:
    """Return a name with its numbers as stars, by which the layers of a model fall together."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _same_reasons(items: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for name, reason in items:
        found.setdefault((_pattern(name), reason), []).append(name)
    return [(names[0] if len(names) == 1 else f"{p} ({len(names)})", reason) for (p, reason), names in found.items()]


def grouped_names(items: Sequence[tuple[str, object, T]], every: bool = False) -> list[tuple[str, list[T]]]:
    """Gather (name, kind, item) whose names differ only in numbers and whose kinds are equal: (name or pattern, items)."""
    groups: dict[tuple[object, ...], list[tuple[str, T]]] = {}
    for name, kind, item in items:
        groups.setdefault((name if every else _pattern(name), kind), []).append((name, item))
    return [(str(key[0]) if len(g) > 1 else g[0][0], [item for _, item in g]) for key, g in groups.items()]


def _cells(rows: list[Row]) -> list[str]:
    one = rows[0]
    sizes = [size(sum(r.before for r in rows)), size(sum(r.after for r in rows))]
    shape = "x".join(str(n) for n in one.shape)
    return [str(len(rows)), shape, one.format or f"as it is: {one.why}", one.input_format or "-", *sizes]
