"""The table of docs/benchmarks.md as a figure: the share of its ceiling that each op reaches, and its goal.

python -m benchmarks.kernels_figure docs/benchmarks.md docs/kernels.svg
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

OPS = {
    "fake_quantize": ("#1b6ca8", 0.92),
    "quantize": ("#d1495b", 0.85),
    "dequantize": ("#66a182", 0.85),
    "amax": ("#edae49", 0.90),
}
LEFT, WIDE, ROW, TOP = 200, 560, 44, 60


def rows(page: str) -> list[tuple[str, list[float | None]]]:
    """Return (format, shares in the order of OPS) of the kernels' table in the page."""
    table = page[page.index("| format | fake_quantize |") :].split("\n\n")[0].splitlines()[2:]
    found = []
    for line in table:
        name, *cells = (c.strip() for c in line.strip().strip("|").split("|"))
        shares = [re.search(r", ([0-9.]+)", cell) for cell in cells[: len(OPS)]]
        found.append((name, [float(m.group(1)) if m else None for m in shares]))
    return found


def svg(data: list[tuple[str, list[float | None]]]) -> str:
    """Return the figure: a row per format, a bar per op, a tick at its goal."""
    height = TOP + ROW * len(data) + 30
    size = f'width="{LEFT + WIDE + 60}" height="{height}"'
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">']
    out.append(f'<rect width="100%" height="{height}" fill="white"/>')
    for i, (op, (color, _)) in enumerate(OPS.items()):
        out.append(f'<rect x="{LEFT + 130 * i}" y="14" width="12" height="12" fill="{color}"/>')
        out.append(f'<text x="{LEFT + 130 * i + 18}" y="24">{op}</text>')
    for tenth in range(0, 11, 2):
        x = LEFT + WIDE * tenth / 10
        out.append(f'<line x1="{x}" y1="{TOP - 10}" x2="{x}" y2="{height - 30}" stroke="#ddd"/>')
        out.append(f'<text x="{x}" y="{TOP - 14}" text-anchor="middle" fill="#555">{tenth / 10:.1f}</text>')
    for r, (name, shares) in enumerate(data):
        y = TOP + ROW * r
        out.append(f'<text x="{LEFT - 8}" y="{y + 24}" text-anchor="end">{name}</text>')
        for i, ((color, goal), share) in enumerate(zip(OPS.values(), shares, strict=True)):
            if share is not None:
                bar, top = WIDE * min(share, 1.05), y + 2 + 9 * i
                out.append(f'<rect x="{LEFT}" y="{top}" width="{bar:.0f}" height="8" fill="{color}"/>')
                out.append(
                    f'<line x1="{LEFT + WIDE * goal}" y1="{top}" x2="{LEFT + WIDE * goal}" y2="{top + 8}" stroke="black"/>'
                )
    out.append(f'<text x="{LEFT}" y="{height - 10}" fill="#555">share of the ceiling; black ticks are goals</text></svg>')
    return "\n".join(out) + "\n"


def main() -> None:
    """Read the page, write the figure."""
    page, figure = sys.argv[1:]
    Path(figure).write_text(svg(rows(Path(page).read_text())))


if __name__ == "__main__":
    main()
