"""`modelopt prune`: a smaller model, proved to be the masked one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from modelopt.cli import options as o
from modelopt.cli.console import out, print_json, print_line, size, table
from modelopt.cli.plan import print_facts
from modelopt.core.errors import ConfigError


def prune(
    model: o.Model,
    out: o.Out,
    ratio: Annotated[
        list[str] | None,
        typer.Option(
            "--ratio", "-r", help="Share to remove: 0.25 of everything, or ffn=0.25, kv_heads=0.5, layers=0.2. Repeatable."
        ),
    ] = None,
    params: Annotated[str | None, typer.Option("--params", help="Parameters that may remain: 60% or a number.")] = None,
    flops: Annotated[str | None, typer.Option("--flops", help="Operations that may remain: 60% or a number.")] = None,
    importance: Annotated[str, typer.Option("--importance", help="l1, l2, fpgm, activation, taylor, random.")] = "l2",
    ranking: Annotated[str, typer.Option("--ranking", help="local: the same share everywhere; global: the least.")] = "local",
    multiple_of: Annotated[int, typer.Option("--multiple-of", min=1, help="Surviving sizes are multiples of this.")] = 16,
    exclude: Annotated[list[str] | None, typer.Option("--exclude", help="Leave families or parameters alone.")] = None,
    calib: o.Calib = "pydoc",
    num_samples: o.NumSamples = 16,
    length: o.Length = 256,
    evaluate: Annotated[bool, typer.Option(help="Compare with the original on text: KL divergence, perplexity.")] = True,
    overwrite: o.Overwrite = False,
    device: o.Device = "auto",
    dtype: o.DType = "auto",
    trust_remote_code: o.Trust = False,
    json: o.Json = False,
) -> None:
    """Remove FFN channels, heads, hidden channels, experts or layers of a causal language model."""
    fields: dict[str, Any] = {"importance": importance, "ranking": ranking, "multiple_of": multiple_of}
    fields |= {"ratio": _ratio(ratio)} if ratio else {}
    fields |= {"exclude": tuple(exclude)} if exclude else {}
    fields["constraints"] = {k: _limit(v) for k, v in (("params", params), ("flops", flops)) if v is not None}
    if not ratio and not fields["constraints"]:
        raise ConfigError("Nothing says how much to prune. Pass --ratio ffn=0.25, or a limit such as --params 60%.")

    from modelopt.cli.progress import Bars
    from modelopt.recipes.load import Evaluation, Text
    from modelopt.recipes.prune import prune_model

    text = Text.parse({"source": calib, "num_samples": num_samples, "length": length}, "options")
    scored = Evaluation.parse({"source": calib, "num_samples": 6, "length": length}, "options") if evaluate else None
    with Bars() as bars:
        found = prune_model(
            model, out, fields, calibration=text, evaluation=scored, overwrite=overwrite, device=device, dtype=dtype,
            trust_remote_code=trust_remote_code, progress=bars,
        )  # fmt: skip
    if json:
        print_json(found.to_dict())
    else:
        _print(found)


def _ratio(given: list[str]) -> float | dict[str, float]:
    if len(given) == 1 and "=" not in given[0]:
        return _number(given[0])
    rules = {}
    for entry in given:
        pattern, equals, share = entry.rpartition("=")
        rules[pattern if equals else "default"] = _number(share)
    return rules


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f'--ratio "{text}" is no number. Write --ratio 0.25, or --ratio ffn=0.25.') from None


def _limit(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _print(found: Any) -> None:
    report = found.report
    print_line(f"Wrote {found.directory}.", "bold")
    rows: dict[tuple[str, int, int], int] = {}
    for family in report["families"]:
        key = (family["kind"], family["before"], family["after"])
        rows[key] = rows.get(key, 0) + 1
    columns = ["Families", "Kind", "Before", "After"]
    lines = [[str(n), kind, str(before), str(after)] for (kind, before, after), n in rows.items()]
    lines += [["1", "layers", "", str(len(kept))] for kept in report["layers"].values()]
    out().print(table(columns, lines, right=("Families", "Before", "After")))
    costs = report["costs"]
    facts = [(name, f"{c['before']:,.0f} -> {c['after']:,.0f} ({c['after'] / c['before']:.1%})") for name, c in costs.items()]
    facts[-1] = ("memory", f"{size(int(costs['memory']['before']))} -> {size(int(costs['memory']['after']))}")
    if found.comparison is not None:
        c = found.comparison
        facts.append(("KL divergence", f"{c.kl:.4f} nats per token over {c.num_tokens} tokens, before any recovery training"))
        facts.append(("perplexity", f"{c.original_perplexity:.2f} -> {c.perplexity:.2f}"))
    proof = report["verified"]
    facts.append(("proved", f"equal to the masked model, error {proof['error']:.1e}" if proof else "not asked for (over 100 M)"))
    facts.append(("read back", found.verified))
    if report["kept_back"]:
        facts.append(("kept", f"{len(report['kept_back'])} families that the model's code needs whole; see pruning.json"))
    print_facts(facts)
