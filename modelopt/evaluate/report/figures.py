"""The three figures of a report, as inline SVG: KL by format, size against loss, error by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator

from modelopt.evaluate.report.data import Report, Row
from modelopt.evaluate.report.svg import Axis, Canvas, log_axis, number, text_width, tick_text

WIDTH = 760.0
NUM_COLOURS = 8
RADIUS = 4.5
Box = tuple[float, float, float, float]  # x1, y1, x2, y2


def kl_by_format(report: Report) -> str:
    """Dots on a log axis, the best format first, with a bar of one standard error to each side."""
    rows = sorted(report.rows, key=lambda r: (math.isnan(r.kl), r.kl))
    left = max(text_width(r.name, 13) for r in rows) + 24
    top, step, right = 10.0, 30.0, WIDTH - 24 - max(text_width(kl_text(r), 12.5) for r in rows)
    bottom = top + step * len(rows)
    canvas = Canvas(WIDTH, bottom + 46)
    spread = [v for r in rows for v in (r.kl - (r.kl_standard_error or 0), r.kl, r.kl + (r.kl_standard_error or 0))]
    axis = log_axis(spread, left, right)
    _grid_x(canvas, axis, top, bottom)
    canvas.text(
        (left + right) / 2,
        bottom + 38,
        "KL divergence to the original (nats per token, log scale; lower is better)",
        "axis",
        "middle",
    )
    canvas.line(left, bottom, right, bottom, "rim")
    for i, row in enumerate(rows):
        y = top + step * (i + 0.5)
        error = row.kl_standard_error or 0.0
        canvas.text(left - 12, y + 4.5, row.name, "label name", "end")
        canvas.line(left, y, right, y, "rail")
        if row.kl > 0:
            _whisker(canvas, axis(max(row.kl - error, axis.low)), axis(row.kl + error), y)
            canvas.dot(axis(row.kl), y, "dot c0", hint=f"{row.name}: {number(row.kl)} ± {number(error, 2)}")
        canvas.text(right + 14, y + 4.5, kl_text(row), "label value")
    return canvas.render("KL divergence to the original, by format: " + "; ".join(f"{r.name} {number(r.kl)}" for r in rows))


def size_against_loss(report: Report) -> str:
    """Size on disk (linear) against KL (log); a line joins the formats that no other beats in both."""
    left, right, top, bottom = 74.0, WIDTH - 18, 14.0, 360.0
    canvas = Canvas(WIDTH, bottom + 46)
    rows = [r for r in report.rows if r.kl > 0 and math.isfinite(r.kl)]
    sizes = [r.num_bytes / 1e6 for r in rows] + [report.original.num_bytes / 1e6]
    x = Axis(0.0, max(sizes) * 1.08, left, right)
    y = log_axis([r.kl for r in rows], bottom, top)
    _grid_x(canvas, x, top, bottom)
    _grid_y(canvas, y, left, right)
    canvas.text((left + right) / 2, bottom + 38, "size on disk (MB)", "axis", "middle")
    canvas.text_up(16, (top + bottom) / 2, "KL to the original (nats per token, log scale)")
    canvas.line(left, bottom, right, bottom, "rim")
    at = x(report.original.num_bytes / 1e6)
    canvas.line(at, top, at, bottom, "mark")
    original = f"original, {number(report.original.num_bytes / 1e6)} MB"
    canvas.text(at - 8, bottom - 10, original, "label small", "end")
    taken: list[Box] = [(at - 8 - text_width(original, 11), bottom - 22, at, bottom - 6)]
    front = [(x(r.num_bytes / 1e6), y(r.kl)) for r in _pareto(rows)]
    canvas.path(front, "front")
    points = [(x(r.num_bytes / 1e6), y(r.kl)) for r in rows]
    taken += [(px - 7, py - 7, px + 7, py + 7) for px, py in points]
    for (x1, y1), (x2, y2) in zip(front, front[1:], strict=False):  # labels keep off the line
        taken += [_around(x1 + (x2 - x1) * t / 24, y1 + (y2 - y1) * t / 24, 2) for t in range(25)]
    for row, (px, py) in sorted(zip(rows, points, strict=True), key=lambda p: p[1]):
        _label(canvas, row.name, px, py, taken, (left + 4, top, right, bottom))
        canvas.dot(px, py, "dot c0", hint=f"{row.name}: {number(row.num_bytes / 1e6)} MB, KL {number(row.kl)}")
    return canvas.render(
        "Size on disk against KL divergence: " + "; ".join(f"{r.name} {number(r.num_bytes / 1e6)} MB" for r in rows)
    )


def layer_error(report: Report) -> str:
    """One panel for each format with measured layers: relative output error by block, one line for each kind of layer."""
    rows = [r for r in report.rows if any(e.index is not None for e in r.layers)]
    if not rows:
        return ""
    kinds = list(dict.fromkeys(e.kind for r in rows for e in r.layers if e.index is not None))[:NUM_COLOURS]
    columns = 1 if len(rows) == 1 else 2
    head, panel_height = 30.0, 250.0 if columns == 1 else 196.0
    height = head + panel_height * math.ceil(len(rows) / columns) + 18
    canvas = Canvas(WIDTH, height)
    place = 8.0
    for c, kind in enumerate(kinds):
        canvas.line(place, 12, place + 18, 12, f"series c{c}")
        canvas.text(place + 24, 16, kind, "label small")
        place += 24 + text_width(kind, 11) + 18
    gap = 22.0
    width = (WIDTH - gap * (columns - 1)) / columns
    for i, row in enumerate(rows):
        x, y = (i % columns) * (width + gap), head + (i // columns) * panel_height
        _panel(canvas, row, kinds, (x, y, x + width, y + panel_height))
    canvas.text(WIDTH / 2, height - 4, "block of the model", "axis", "middle")
    return canvas.render("Relative output error of each layer, by block: " + ", ".join(r.name for r in rows))


def kl_text(row: Row) -> str:
    """Return `0.0371 ± 0.0012`, both with the same number of decimals."""
    value = number(row.kl)
    if row.kl_standard_error is None or not math.isfinite(row.kl) or "e" in value:
        return value
    decimals = len(value.partition(".")[2])
    error = f"{row.kl_standard_error:.{decimals}f}"
    return f"{value} ± {error if float(error) else number(row.kl_standard_error, 1)}"


def _panel(canvas: Canvas, row: Row, kinds: list[str], box: Box) -> None:
    left, right, top, bottom = box[0] + 46, box[2] - 8, box[1] + 24, box[3] - 26
    layers = [e for e in row.layers if e.index is not None and e.kind in kinds]
    last = max(e.index or 0 for e in layers)
    x = Axis(0, max(last, 1), left + 6, right - 6)
    y = Axis(0, max(max(e.output_error for e in layers), 1e-9) * 1.06 * 100, bottom, top)
    canvas.text(left, top - 9, row.name, "label name")
    canvas.line(left, bottom, right, bottom, "rim")
    _grid_y(canvas, y, left, right, count=4, unit=" %")
    for tick in x.ticks(6):
        if tick == int(tick):
            canvas.text(x(tick), bottom + 15, str(int(tick)), "tick", "middle")
    for c, kind in enumerate(kinds):
        points = sorted((e.index or 0, e.output_error) for e in layers if e.kind == kind)
        if len(points) == 1:
            canvas.dot(x(points[0][0]), y(points[0][1] * 100), f"dot c{c}", 3)
        elif points:
            canvas.path([(x(i), y(v * 100)) for i, v in points], f"series c{c}")


def _grid_x(canvas: Canvas, axis: Axis, top: float, bottom: float) -> None:
    for tick in axis.ticks(7):
        canvas.line(axis(tick), top, axis(tick), bottom, "grid")
        canvas.text(axis(tick), bottom + 17, tick_text(tick), "tick", "middle")


def _grid_y(canvas: Canvas, axis: Axis, left: float, right: float, count: int = 5, unit: str = "") -> None:
    for tick in axis.ticks(count):
        canvas.line(left, axis(tick), right, axis(tick), "grid")
        canvas.text(left - 8, axis(tick) + 4, tick_text(tick) + unit, "tick", "end")


def _whisker(canvas: Canvas, x1: float, x2: float, y: float) -> None:
    if x2 - x1 < 2 * RADIUS + 2:
        return  # narrower than the dot
    canvas.line(x1, y, x2, y, "whisker")
    for x in (x1, x2):
        canvas.line(x, y - 5, x, y + 5, "whisker")


def _pareto(rows: list[Row]) -> list[Row]:
    """Return the rows that no other row beats in both size and KL, the smallest first."""
    best, front = math.inf, []
    for row in sorted(rows, key=lambda r: (r.num_bytes, r.kl)):
        if row.kl < best:
            best = row.kl
            front.append(row)
    return front


def _around(x: float, y: float, r: float) -> Box:
    return x - r, y - r, x + r, y + r


def _places(px: float, py: float, width: float) -> Iterator[tuple[float, float]]:
    """Yield (left end, baseline) of a label near a point: right, left, above, below, then further away."""
    for far in (0, 12, 24, 36, 50, 64, 80):
        for dx, dy in ((10, 4), (-10 - width, 4), (8, -8 - far), (-8 - width, -8 - far), (8, 16 + far), (-8 - width, 16 + far)):
            yield px + dx, py + dy
        yield px - width / 2, py - 10 - far
        yield px - width / 2, py + 20 + far


def _label(canvas: Canvas, text: str, px: float, py: float, taken: list[Box], frame: Box) -> None:
    """Write `text` near a point where nothing is yet; a thin line leads to a label that had to go far."""
    width = text_width(text)
    for x, y in _places(px, py, width):
        box = (x - 1, y - 11, x + width + 1, y + 4)
        inside = frame[0] <= box[0] and box[2] <= frame[2] and frame[1] <= box[1] and box[3] <= frame[3]
        if inside and not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            break
    else:
        x, y = px + 10, py + 4
        box = (x, y - 11, x + width, y + 4)
    taken.append(box)
    nearest = min(max(px, box[0]), box[2]), min(max(py, box[1]), box[3])
    if math.dist(nearest, (px, py)) > 16:
        canvas.line(px, py, *nearest, "leader")
    canvas.text(x, y, text, "label")
