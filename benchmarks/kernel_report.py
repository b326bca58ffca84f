"""The tables and figures of docs/benchmarks.md that come from GPU runs, made from their JSON files.

    python -m benchmarks.kernel_report [--results benchmarks/results] [--page docs/benchmarks.md] [--figures docs/figures]

Each region `<!-- NAME -->` ... `<!-- end NAME -->` of the page becomes the table of `results/NAME.json`, where there is one.
Figures: `kernels.svg`, the share of its ceiling that each memory-bound op reaches; `linear.svg`, the roofline of the products:
TFLOP/s against operations per byte, 2 M N K over the bytes of codes, scales, x and y, under the measured memory rate.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from modelopt.evaluate.report.svg import Axis, Canvas
from modelopt.numerics import parse

OPS = {"fake_quantize": 0.92, "quantize": 0.85, "dequantize": 0.85, "amax": 0.90, "clipped_gradient": 0.90}
COLOURS = ("#1b6ca8", "#d1495b", "#66a182", "#edae49", "#8d6cab", "#5f5f5f", "#b3752f")
STYLE = "text{font-family:Helvetica,Arial,sans-serif;font-size:12px;fill:#222}.grid{stroke:#e4e4e4}.roof{stroke:#222;fill:none}"
BF16_PEAK, FP8_PEAK = 989.0, 1979.0  # dense TFLOP/s of the data sheet, at the highest clock
SERIES = ("INT4 g128", "NVFP4", "FP8", "FP8 x FP8 static", "INT8 x INT8 per channel and token")

Record = dict[str, Any]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _names(records: Iterable[Record], key: str) -> list[str]:
    return list(dict.fromkeys(str(r[key]) for r in records))


def kernels_table(data: Record) -> str:
    """Return microseconds and shares of the ceiling, a line for each format, a column for each op; the other ops below."""
    parts = []
    for size in sorted({r["size"] for r in data["rows"]}, reverse=True):
        rows = [r for r in data["rows"] if r["size"] == size]
        cells = {(r["format"], r["op"]): f"{r['us']:.0f} us, {r['share']:.2f}" for r in rows}
        formats = _names((r for r in rows if r["op"] in OPS), "format")
        body = [[f, *(cells.get((f, op), "") for op in OPS)] for f in formats]
        others = [[r["op"], str(r["format"]), cells[r["format"], r["op"]]] for r in rows if r["op"] not in OPS]
        parts.append(f"{size} x {size}:\n\n" + table(["format", *(op.replace("_", " ") for op in OPS)], body))
        if others:
            parts.append(table(["op", "of", "time, share"], others))
    return "\n\n".join(parts)


def linear_table(data: Record) -> str:
    """Return the ratios to bf16, a line for each case, a column for each number of rows; shapes (N, K) separated by strokes."""
    records = data["records"]
    shapes = list(dict.fromkeys((r["N"], r["K"]) for r in records))
    rows = sorted({r["M"] for r in records})
    found = {(r["case"], r["M"], (r["N"], r["K"])): r for r in records}

    def line(name: str, cell: Callable[[Record], str]) -> list[str]:
        picked = [[found.get((name, m, s)) for s in shapes] for m in rows]
        return [" / ".join(cell(r) if r else "-" for r in some) for some in picked]

    cases = _names(records, "case")
    body = [["bf16, us", *line(cases[0], lambda r: f"{r['bf16']:.0f}")]]
    body += [[name, *line(name, lambda r: f"{r['ratio']:.2f}")] for name in cases]
    head = " and ".join(f"({n}, {k})" for n, k in shapes)
    return f"(N, K) = {head}:\n\n" + table(["weight x input", *(f"M = {m}" for m in rows)], body)


def generate_table(data: Record) -> str:
    """Return tokens per second, a line for each model and scheme."""
    dense = {r["model"]: r["graph"] for r in data["records"] if r["scheme"] == "bf16"}
    body = []
    for r in data["records"]:
        ratio = r["graph"] / dense[r["model"]]
        body.append([r["model"], r["scheme"], f"{r['GiB']:.2f}", f"{r['graph']:.1f}", f"{ratio:.2f}", f"{r['generate']:.1f}"])
    return table(["model", "weights", "memory, GiB", "tokens/s, graph", "over bf16", "tokens/s, generate"], body)


def peers_table(data: Record) -> str:
    """Return the ratios to bf16 of other libraries' products, and below the rates of others' fake quantization."""
    products = [{**r, "ratio": r.get("ratio", float("nan"))} for r in data["records"] if "N" in r]
    parts = [linear_table({"records": products}).replace("nan", "fails")]
    others = [[r["case"], f"{r['us']:.0f}", f"{r['TB/s']:.2f}"] for r in data["records"] if "TB/s" in r]
    return "\n\n".join([*parts, table(["16384 x 16384 bf16", "us", "TB/s"], others)] if others else parts)


def kernels_figure(data: Record) -> str:
    """Return the shares of the largest size as bars: a row per format, a bar per op, a tick at its goal."""
    size = max(r["size"] for r in data["rows"])
    rows = [r for r in data["rows"] if r["size"] == size and r["op"] in OPS]
    formats = _names(rows, "format")
    bar, left, top = 8, 210.0, 60.0
    step = bar * len(OPS) + 8
    canvas = Canvas(left + 620, top + step * len(formats) + 30)
    colours = dict(zip(OPS, COLOURS, strict=False))
    canvas.parts.append(f"<style>{STYLE}" + "".join(f".{o}{{fill:{c}}}" for o, c in colours.items()) + "</style>")
    canvas.parts.append('<rect width="100%" height="100%" fill="#fff"/>')
    across = Axis(0.0, 1.05, left, left + 580)
    for i, op in enumerate(OPS):
        canvas.dot(left + 6 + 120 * i, 20, op)
        canvas.text(left + 16 + 120 * i, 24, op)
    for tick in across.ticks(5):
        canvas.line(across(tick), top - 8, across(tick), canvas.height - 30, "grid")
        canvas.text(across(tick), top - 12, f"{tick:.1f}", "tick", "middle")
    shares = {(r["format"], r["op"]): r["share"] for r in rows}
    for i, name in enumerate(formats):
        y = top + step * i
        canvas.text(left - 8, y + step / 2, name, "label", "end")
        for j, (op, goal) in enumerate(OPS.items()):
            share = shares.get((name, op))
            if share is not None:
                at = y + bar * j
                box = f'x="{left}" y="{at:.1f}" width="{across(share) - left:.1f}" height="{bar - 1}"'
                canvas.parts.append(f'<rect class="{op}" {box}/>')
                canvas.line(across(goal), at, across(goal), at + bar - 1, "roof")
    canvas.text(left, canvas.height - 10, f"share of the ceiling at {size} x {size}; black ticks are goals")
    return canvas.render("Memory-bound ops: share of the ceiling")


def moved(case: str, n: int, k: int, m: int) -> float:
    """Return the bytes that a product must move: the packed weight, x and y in bf16."""
    from benchmarks.linear import CASES

    bits = 16.0 if case == "bf16" else parse(CASES[case][0]).bits_per_value((n, k))
    return n * k * bits / 8 + 2 * m * (n + k)


def linear_figure(data: Record, memory: float, peak: float) -> str:
    """Return the roofline, a line for each case of the first shape, under `memory` in TB/s and `peak` in TFLOP/s."""
    n, k = data["records"][0]["N"], data["records"][0]["K"]
    mine = [r for r in data["records"] if (r["N"], r["K"]) == (n, k)]
    times = {"bf16": {r["M"]: r["bf16"] for r in mine}}
    times |= {c: {r["M"]: r["us"] for r in mine if r["case"] == c} for c in SERIES}
    points = {
        case: [(2 * m * n * k / moved(case, n, k, m), 2 * m * n * k / us / 1e6, m) for m, us in sorted(found.items())]
        for case, found in times.items()
        if found
    }
    canvas = Canvas(860, 520)
    paint = "".join(f".s{i}{{stroke:{c};fill:none;stroke-width:1.5}}.d{i}{{fill:{c}}}" for i, c in enumerate(COLOURS))
    canvas.parts.append(f"<style>{STYLE}{paint}</style>" + '<rect width="100%" height="100%" fill="#fff"/>')
    across, up = Axis(0.7, 8000, 70, 640, log=True), Axis(2, 4000, 470, 30, log=True)
    for tick in across.ticks():
        canvas.line(across(tick), 30, across(tick), 470, "grid")
        canvas.text(across(tick), 488, f"{tick:g}", "tick", "middle")
    for tick in up.ticks():
        canvas.line(70, up(tick), 640, up(tick), "grid")
        canvas.text(62, up(tick) + 4, f"{tick:g}", "tick", "end")
    for top, name in ((peak, "bf16"), (FP8_PEAK, "FP8")):
        edge = top / memory
        canvas.path([(across(0.7), up(0.7 * memory)), (across(edge), up(top)), (across(8000), up(top))], "roof")
        canvas.text(636, up(top) - 5, f"{top:.0f} TFLOP/s, {name}, data sheet", "label", "end")
    canvas.text(across(1.2), up(1.2 * memory) - 10, f"{memory:.2f} TB/s", "label", "end")
    for i, (case, found) in enumerate(points.items()):
        canvas.path([(across(x), up(y)) for x, y, _ in found], f"s{i}")
        for x, y, m in found:
            canvas.dot(across(x), up(y), f"d{i}", 4, f"{case}, M = {m}: {y:.0f} TFLOP/s")
        canvas.dot(662, 60 + 22 * i, f"d{i}")
        canvas.text(672, 64 + 22 * i, case.replace(" per channel and token", ", token"))
    rows = ", ".join(str(m) for m in times["bf16"])
    canvas.text(355, 510, f"operations per byte moved; (N, K) = ({n}, {k}), M = {rows}", "axis", "middle")
    canvas.text_up(20, 250, "TFLOP/s")
    return canvas.render("Matrix products under the roofline")


TABLES: dict[str, Callable[[Record], str]] = {
    "kernels": kernels_table,
    "kernels_4096": kernels_table,
    "linear": linear_table,
    "linear_large": linear_table,
    "experts": linear_table,
    "generate": generate_table,
    "peers": peers_table,
}


def fill(page: str, name: str, text: str) -> str:
    """Return the page with `text` between the marks of a region. Raises ValueError if it has no such region."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end {name} -->)", re.DOTALL)
    new, count = pattern.subn(lambda m: f"{m.group(1)}\n{text}\n{m.group(2)}", page)
    if count != 1:
        raise ValueError(f"The page has {count} regions <!-- {name} -->; it needs one.")
    return new


def main(argv: list[str] | None = None) -> int:
    """Read what was measured, write tables and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument("--figures", type=Path, default=Path("docs/figures"))
    args = parser.parse_args(argv)
    read = {name: json.loads(p.read_text()) for name in TABLES if (p := args.results / f"{name}.json").exists()}
    page = args.page.read_text()
    for name, data in read.items():
        page = fill(page, name, TABLES[name](data))
    args.page.write_text(page)
    if "kernels" in read:
        (args.figures / "kernels.svg").write_text(kernels_figure(read["kernels"]))
    if "kernels" in read and "linear" in read:
        rates = read["kernels"]["ceilings"]
        (args.figures / "linear.svg").write_text(linear_figure(read["linear"], rates["read"] / 1e12, BF16_PEAK))
    return 0


if __name__ == "__main__":
    sys.exit(main())
