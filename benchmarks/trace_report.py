"""Tables of the results that `benchmarks.trace_coverage` writes."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

SOURCES = {"hf": "transformers", "diff": "diffusers", "timm": "timm", "tv": "torchvision", "plain": "plain torch"}
Rows = dict[str, dict[str, Any]]


def median(values: list[float]) -> float | None:
    """Return the median, or None of nothing."""
    return statistics.median(values) if values else None


def _percent(part: float | None) -> str:
    return "" if part is None else f"{part:.1%}"


def line(name: str, rows: Rows) -> str:
    """Return one row of the table."""
    status = Counter(r["status"].split(":")[0] for r in rows.values())
    removed = median([r["removed"] for r in rows.values() if r["status"] == "exact"])
    trace = [sum(r.get("cpu", {}).get(k, 0) for k in ("trace", "relax")) for r in rows.values() if "trace" in r.get("cpu", {})]
    graphs = [bool(r["root_graph"]) for r in rows.values() if "root_graph" in r]
    cells = [name, str(len(rows)), f"{status['exact']} ({status['exact'] / max(1, len(rows)):.1%})"]
    cells += [str(status[k]) for k in ("differs", "crash", "refused", "noop", "timeout")]
    seconds = median(trace)
    cells += [
        _percent(removed),
        "" if seconds is None else f"{seconds:.2f}",
        _percent(sum(graphs) / len(graphs)) if graphs else "",
    ]
    return "| " + " | ".join(cells) + " |"


def table(rows: Rows) -> str:
    """Return the table by source."""
    head = "| source | models | exact | differs | crash | refused | noop | timeout | parameters removed, median "
    text = [head + "| trace and analysis, CPU s, median | root graph |", "|---|" + "---|" * 10]
    for kind, source in SOURCES.items():
        part = {k: v for k, v in rows.items() if k.startswith(kind + "/")}
        text += [line(source, part)] if part else []
    return "\n".join([*text, line("all", rows)])


def failures(rows: Rows) -> str:
    """Return one line for each model that is not exact."""
    text = []
    for name, row in sorted(rows.items()):
        if row["status"] != "exact":
            detail = " ".join(str(row.get("detail", "")).split())
            text.append(f"| {name} | {row['status']} | {detail.replace('|', chr(92) + '|')} |")
    return "\n".join(["| model | status | reason |", "|---|---|---|", *text]) if text else "None."


def frozen(rows: Rows, shown: int = 15) -> str:
    """Return the most frequent reasons for which a dimension was kept."""
    count: Counter[str] = Counter()
    for row in rows.values():
        for reason in row.get("frozen", {}):
            count[reason] += 1
    return "\n".join(
        ["| reason | models |", "|---|---|", *(f"| {r.replace('|', '/')} | {n} |" for r, n in count.most_common(shown))]
    )


def little(rows: Rows, below: float = 0.2) -> str:
    """Return the exact models of which little was removed, with the most frequent reason."""
    lines = []
    for name, row in sorted(rows.items(), key=lambda item: item[1].get("removed", 0)):
        if row["status"] == "exact" and row["removed"] < below:
            reasons = [*list(row["given_back"])[:1], *list(row["frozen"])[:2]]
            lines.append(f"| {name} | {row['removed']:.0%} | {'; '.join(reasons)[:300].replace('|', '/')} |")
    return "\n".join(["| model | removed | what kept the rest |", "|---|---|---|", *lines]) if lines else "None."


def seconds(rows: list[dict[str, Any]]) -> str:
    """Return the table of `trace_coverage --time`."""
    keys = ("model", "cpu_s", "peak_mb", "before_mb", "families")
    lines = ["| " + " | ".join(str(row.get(k, "")) for k in keys) + " |" for row in rows]
    head = "| model | CPU s after imports | peak memory, MB | of it before the trace | families |"
    return "\n".join([head, "|---|---|---|---|---|", *lines])


def markdown(paths: list[Path]) -> str:
    """Return the page for several result files."""
    parts = [PAGE]
    for path in paths:
        data = json.loads(path.read_text())
        title = path.stem.replace("_", " ").capitalize()
        if isinstance(data, list):
            parts.append(f"## {title}\n\n`python -m benchmarks.trace_coverage --time`\n\n{seconds(data)}\n")
            continue
        rows = data["rows"]
        unknown = Counter(op for r in rows.values() for op in r.get("unknown_ops", {}))
        packages = ", ".join(f"{k} {v}" for k, v in data["versions"].items())
        note = f"{data['note']}\n\n" if "note" in data else ""
        parts.append(f"## {title}\n\n`{data['command']}` ({packages})\n\n{note}{table(rows)}\n")
        parts.append(f"### Not exact\n\n{failures(rows)}\n\n### Little removed\n\n{little(rows)}\n")
        parts.append(f"### Why dimensions were kept\n\n{frozen(rows)}\n")
        listed = ", ".join(f"{op} ({n})" for op, n in unknown.most_common()) or "none"
        parts.append(f"Ops without a rule, which keep what they touch (and the number of models): {listed}.\n")
    return "\n".join(parts)


PAGE = """# Coverage of axis inference

Half of every prunable family of dimensions is removed, at random, and the result is judged by `verify_pruning`: the pruned model
against the dense model with the removed entries dead, in float64, and a permutation of every family. `exact` means that both hold
to 1e-7. The commands below repeat the measurements; the packages that they need are in `benchmarks/zoo/README.md`. Other pruners
on the list of 186: Torch-Pruning 1.6.1 39 % exact, 67 % of the parameters removed (median); NVIDIA ModelOpt 0.47 FastNAS 66 %
exact, 23 % removed.
"""
