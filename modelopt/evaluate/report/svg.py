"""A small SVG canvas: lines, dots, text, axes. Colours come from the page's CSS classes and follow its light or dark theme.

Coordinates are pixels from the upper left corner. `Axis` maps values to pixels, linearly or by logarithm, and knows its ticks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

FONT = 12.0
WIDTH_PER_FONT = 0.56  # mean width of a character of the page's font, relative to its size


def text_width(text: str, size: float = FONT) -> float:
    """Estimate the width of a text in pixels."""
    return len(text) * size * WIDTH_PER_FONT


def number(value: float, digits: int = 3) -> str:
    """Return a number for people: `digits` significant digits, no exponent between 0.0001 and 100 000."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞"
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(value)))
    if not -5 < power < 6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - power)}f}"


def tick_text(value: float) -> str:
    """Return a tick's label without trailing zeros."""
    return f"{value:.10f}".rstrip("0").rstrip(".") if 1e-6 < abs(value) < 1e6 or value == 0 else f"{value:.0e}"


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` onto pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value; values outside are put on the edge."""
        value = min(max(value, self.low), self.high)
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Return round values inside the axis: 1, 2, 5 times powers of ten (fewer where a log axis spans many decades)."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1, 2, 5) if last - first <= 3 else (1,)
            candidates = [s * 10.0**p for p in range(first, last + 1) for s in steps]
        else:
            rough = (self.high - self.low) / count
            unit = 10.0 ** math.floor(math.log10(rough))
            step = next(s * unit for s in (1, 2, 5, 10) if s * unit >= rough * 0.999)
            candidates = [step * i for i in range(math.floor(self.low / step), math.ceil(self.high / step) + 1)]
        slack = 1e-9 * abs(self.high)
        return [t for t in candidates if self.low - slack <= t <= self.high + slack]


def log_axis(values: list[float], start: float, end: float) -> Axis:
    """Return a log axis that holds all positive `values` with room at both ends."""
    positive = [v for v in values if v > 0 and math.isfinite(v)] or [0.1, 1.0]
    low, high = min(positive), max(positive)
    room = max((high / low) ** 0.06, 1.25)
    return Axis(low / room, high * room, start, end, log=True)


class Canvas:
    """Collects SVG elements; `render` returns the whole `<svg>` with a title for those who cannot see it."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.parts: list[str] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        """Draw a straight line."""
        self.parts.append(f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')

    def path(self, points: list[tuple[float, float]], css: str) -> None:
        """Draw a line through points."""
        self.parts.append(f'<polyline class="{css}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')

    def dot(self, x: float, y: float, css: str, radius: float = 4.5, hint: str = "") -> None:
        """Draw a filled circle; `hint` shows when a pointer rests on it."""
        title = f"<title>{escape(hint)}</title>" if hint else ""
        self.parts.append(f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{title}</circle>')

    def text(self, x: float, y: float, text: str, css: str = "label", anchor: str = "start") -> None:
        """Write text with its baseline at y; anchor: start, middle or end."""
        self.parts.append(f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def text_up(self, x: float, y: float, text: str, css: str = "axis") -> None:
        """Write text that runs upwards, centred on y."""
        place = f'x="{x:.1f}" y="{y:.1f}" transform="rotate(-90 {x:.1f} {y:.1f})"'
        self.parts.append(f'<text class="{css}" {place} text-anchor="middle">{escape(text)}</text>')

    def render(self, title: str) -> str:
        """Return the SVG element."""
        size = f'viewBox="0 0 {self.width:.0f} {self.height:.0f}"'
        return (
            f'<svg {size} role="img" aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">{"".join(self.parts)}</svg>'
        )
