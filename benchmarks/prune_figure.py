"""The figure of `benchmarks.prune_quality`: quality against parameters removed, a line for each criterion.

    python -m benchmarks.prune_figure fashion.json smollm2.json --svg docs/figures/prune_quality.svg

Dashed: right after pruning. Solid: after the recovery training. Left panel: accuracy; right panel: KL divergence (log scale).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from modelopt.evaluate.report.svg import Axis, Canvas, log_axis

COLOURS = {
    "random": "#9d9d9d", "l1": "#4c78a8", "l2": "#72b7b2", "fpgm": "#b279a2", "activation": "#f58518", "taylor": "#54a24b",
}  # fmt: skip
STYLE = (
    "text{font-family:Helvetica,Arial,sans-serif;font-size:13px;fill:#222}.grid{stroke:#e4e4e4}"
    ".title{font-weight:bold;font-size:15px}"
)
TOP, BOTTOM = 50.0, 330.0


def panel(canvas: Canvas, rows: list[dict[str, Any]], left: float, right: float, title: str, scale: Axis) -> None:
    """Draw one task: x is the share of parameters removed, y what the scale says."""
    removed = [1 - r["params"] for r in rows]
    across = Axis(0.0, max(removed) * 1.04, left, right)
    canvas.text(left, 26, title, "title")
    for tick in across.ticks(6):
        canvas.line(across(tick), TOP, across(tick), BOTTOM, "grid")
        canvas.text(across(tick), BOTTOM + 20, f"{tick:.0%}", "tick", "middle")
    for tick in scale.ticks(6):
        canvas.line(left, scale(tick), right, scale(tick), "grid")
        canvas.text(left - 8, scale(tick) + 4, f"{tick:g}", "tick", "end")
    canvas.text((left + right) / 2, BOTTOM + 42, "parameters removed", "axis", "middle")
    dense = [r for r in rows if r["criterion"] == "dense"]
    for name in COLOURS:
        for key in ("score", "recovered"):
            mine = sorted((1 - r["params"], r[key]) for r in [*dense, *rows] if r["criterion"] in (name, "dense") and key in r)
            points = [(across(x), scale(y)) for x, y in dict(mine).items()]
            canvas.path(points, f"{name} {key}")
            for x, y in points:
                canvas.dot(x, y, f"{name}-dot", 3.2)


def figure(rows: list[dict[str, Any]]) -> str:
    """Return the SVG of all tasks that are in `rows`."""
    canvas = Canvas(980, 430)
    lines = "".join(
        f".{n}{{stroke:{c};stroke-width:2;fill:none}}.{n}-dot{{fill:{c}}}" for n, c in COLOURS.items()
    )  # fmt: skip
    canvas.parts.append(f"<style>{STYLE}{lines}.score{{stroke-dasharray:5 4;opacity:.75}}</style>")
    canvas.parts.append('<rect width="100%" height="100%" fill="#fff"/>')
    fashion = [r for r in rows if r["task"] == "fashion"]
    language = [r for r in rows if r["task"] == "smollm2"]
    if fashion:
        panel(canvas, fashion, 60, 430, "CNN on Fashion-MNIST: test accuracy", Axis(0.0, 1.0, BOTTOM, TOP))
    if language:
        values = [r[k] for r in language for k in ("score", "recovered") if k in r]
        panel(canvas, language, 560, 940, "SmolLM2-135M: KL to the original, nats", log_axis(values, BOTTOM, TOP))
    for i, name in enumerate(COLOURS):
        x = 60 + 150 * i
        canvas.line(x, 408, x + 26, 408, name)
        canvas.text(x + 34, 412, name)
    return canvas.render("Quality against parameters removed")


def main(argv: list[str] | None = None) -> int:
    """Read the measurements, write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, nargs="+")
    parser.add_argument("--svg", type=Path, required=True)
    args = parser.parse_args(argv)
    args.svg.write_text(figure([row for path in args.json for row in json.loads(path.read_text())["rows"]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
