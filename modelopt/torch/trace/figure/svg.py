"""Draws a scene: nested rounded boxes, stripes in the colours of families where dimensions enter and leave, lines between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape

from modelopt.torch.trace.figure.layout import Box, Line, place
from modelopt.torch.trace.figure.scene import Item, Scene

COLOURS = (
    "#2166c4", "#e07b1a", "#1f9370", "#b0489a", "#9a7d0a", "#4fa3d9", "#c2453a", "#6a54b8", "#5f8f2f", "#d1628f", "#2f8a9b",
    "#9c6644",
)  # fmt: skip
GREY, INK, SOFT, RULE = "#b9bec5", "#1d2126", "#6a7179", "#d9dde1"
TEXT, SMALL, PAD, HEAD = 11.5, 10.0, 14.0, 26.0
FONT = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"

Paint = Callable[[str, str], list[str]]  # (module name, "in" or "out") -> colours


def width_of(text: str, size: float = TEXT) -> float:
    """Estimate the width of a text in pixels; names are bold, small print is not."""
    return len(text) * size * (0.64 if size >= TEXT else 0.58)


@dataclass(eq=False)
class Node(Box):
    """A box with what is drawn in it."""

    item: Item = field(default_factory=lambda: Item("op", ""))
    inside: list[Node] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)


def arrange(scene: Scene) -> tuple[list[Node], list[Line], float, float]:
    """Size and place everything in a scene; return its boxes, lines, width and height."""
    nodes = [_node(item) for item in scene.items]
    lines = [Line(nodes[a], nodes[b]) for a, b in scene.edges]
    width, height = place(list(nodes), lines)
    return nodes, lines, width, height


def _node(item: Item) -> Node:
    if item.kind == "op":
        side = 22.0 if len(item.title) < 3 else width_of(item.title, SMALL) + 16
        return Node(side, 22.0, item=item)
    if item.kind in ("input", "output"):
        pin = "first" if item.kind == "input" else "last"
        wide = bool(item.subtitle)
        width = max(width_of(item.title), width_of(item.subtitle, SMALL)) + 24
        return Node(width if wide else 8.0, 36.0 if wide else 2.0, pin, item=item)
    label = max(width_of(_title(item)) + width_of(_badge(item)) + 6, width_of(item.subtitle, SMALL))
    if item.inside is None and not item.has_weights:
        return Node(max(width_of(_title(item), SMALL), width_of(item.subtitle, SMALL)) + 22, 20.0, item=item)
    if item.inside is None:
        return Node(max(62.0, label + 22), 40.0, item=item)
    inside, lines, width, height = arrange(item.inside)
    head = width_of(_title(item)) + width_of(item.subtitle, SMALL) + width_of(_badge(item)) + 48
    whole = max(width + 2 * PAD, head)
    for node in inside:
        _move(node, (whole - width) / 2, HEAD + 4)
    for line in lines:
        for lane in line.lanes:
            lane.x, lane.y = lane.x + (whole - width) / 2, lane.y + HEAD + 4
    ends = {kind: [n.x + n.width / 2 for n in inside if n.item.kind == kind] for kind in ("input", "output")}
    made = Node(whole, height + HEAD + 12, item=item, inside=inside, lines=lines)
    made.enter, made.leave = (e[0] if len(e) == 1 else None for e in ends.values())
    return made


def _move(node: Node, dx: float, dy: float) -> None:
    node.x, node.y = node.x + dx, node.y + dy


def _title(item: Item) -> str:
    return f"{item.title} … {item.last}" if item.count > 1 and item.last else item.title


def _badge(item: Item) -> str:
    return f"{'∥' if item.beside else '×'} {item.count}" if item.count > 1 else ""


class Painter:
    """Writes the elements of a scene; `paint` says which colours a module's input and output have."""

    def __init__(self, paint: Paint) -> None:
        self.paint = paint
        self.back: list[str] = []
        self.wires: list[str] = []
        self.front: list[str] = []

    def scene(self, nodes: list[Node], lines: list[Line], x: float, y: float, entry: float | None = None, level: int = 0) -> None:
        """Draw boxes and lines at an offset."""
        colour = self._line_colours(nodes, lines)
        for line in lines:
            self._wire(line, x, y, colour[line.source])
        for node in nodes:
            self._node(node, x + node.x, y + node.y, level, colour.get(node, GREY))

    def _line_colours(self, nodes: list[Node], lines: list[Line]) -> dict[Box, str]:
        colour: dict[Box, str] = {}
        into: dict[Box, list[Box]] = {}
        out: dict[Box, list[Node]] = {}
        for line in lines:
            into.setdefault(line.target, []).append(line.source)
            out.setdefault(line.source, []).append(line.target)  # type: ignore[arg-type]
        for node in nodes:
            own = self.paint(node.item.name, "out") if node.item.kind == "module" else []
            if node.inside:
                within = self._line_colours(node.inside, node.lines)
                own = [within[n] for n in node.inside if n.item.kind == "output"]
            if node.item.kind == "input":
                read = [c for t in out.get(node, ()) if t.item.kind == "module" for c in self.paint(self._entry(t.item), "in")]
                own = read[:1]
            inherited = [colour[s] for s in into.get(node, ()) if colour[s] != GREY]
            colour[node] = own[-1] if own else inherited[0] if inherited else GREY
        return colour

    @staticmethod
    def _entry(item: Item) -> str:
        while item.inside is not None:
            item = next((i for i in item.inside.items if i.kind == "module"), item)
            if item.inside is None:
                break
        return item.name

    def _wire(self, line: Line, x: float, y: float, colour: str) -> None:
        source, target = line.source, line.target
        px, py = x + source.bottom, y + source.y + source.height
        path = f"M{px:.1f},{py:.1f}"
        for stop in (*line.lanes, target):
            qx, qy = x + stop.top, y + stop.y
            bend = max(8.0, (qy - py) / 2)
            path += f" C{px:.1f},{py + bend:.1f} {qx:.1f},{qy - bend:.1f} {qx:.1f},{qy:.1f}"
            px, py = qx, qy + (stop.height if stop is not target else 0)
            if stop is not target:
                path += f" L{px:.1f},{py:.1f}"
        self.front.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.8" stroke-linecap="round"/>')

    def _node(self, node: Node, x: float, y: float, level: int, colour: str) -> None:
        item = node.item
        if item.kind == "op":
            self._rect(x, y, node.width, node.height, 11, "#fff", colour, 1.4)
            self._text(x + node.width / 2, y + 15, item.title, SMALL if len(item.title) > 2 else 13, INK, "middle")
        elif item.kind in ("input", "output"):
            self._end(node, x, y, colour)
        elif item.inside is None:
            self._leaf(node, x, y)
        else:
            self._card(node, x, y, level)

    def _end(self, node: Node, x: float, y: float, colour: str) -> None:
        if node.item.subtitle:
            self._rect(x, y, node.width, node.height, 18, "#fff", RULE, 1)
            self._text(x + node.width / 2, y + 16, node.item.title, TEXT, INK, "middle", 600)
            self._text(x + node.width / 2, y + 29, node.item.subtitle, SMALL, SOFT, "middle")
        else:
            self.front.append(f'<circle cx="{x + node.width / 2:.1f}" cy="{y + 1:.1f}" r="2.2" fill="{colour}"/>')

    def _leaf(self, node: Node, x: float, y: float) -> None:
        item = node.item
        if not item.has_weights:
            self._rect(x, y, node.width, node.height, 10, "#f3f4f6", RULE, 1)
            self._text(x + node.width / 2, y + 14, f"{item.subtitle} {_badge(item)}".strip(), SMALL, SOFT, "middle")
            return
        entering, leaving = self.paint(item.name, "in"), self.paint(item.name, "out")
        plain = not entering and not leaving
        shadow = 3.0 if item.count > 1 else 0.0
        if shadow:
            self._rect(x + shadow, y + shadow, node.width, node.height, 6, "#fff", RULE, 1)
        self._rect(x, y, node.width, node.height, 6, "#f6f7f8" if plain else "#fff", RULE, 1)
        self._stripe(x + 6, y, node.width - 12, entering)
        self._stripe(x + 6, y + node.height - 4, node.width - 12, leaving)
        badge = _badge(item)
        self._text(x + node.width / 2, y + 18, f"{_title(item)} {badge}".strip(), TEXT, SOFT if plain else INK, "middle", 600)
        self._text(x + node.width / 2, y + 31, item.subtitle, SMALL, SOFT, "middle")

    def _card(self, node: Node, x: float, y: float, level: int) -> None:
        item = node.item
        if item.count > 1:
            for shift in (8.0, 4.0):
                self._rect(x + shift, y + shift, node.width, node.height, 10, "#fff", RULE, 1)
        fill = ("#f4f6f8", "#fbfcfd")[level % 2]
        self._rect(x, y, node.width, node.height, 10, fill, RULE, 1)
        self._text(x + 12, y + 17, _title(item), TEXT, INK, "start", 650)
        self._text(x + 18 + width_of(_title(item)), y + 17, item.subtitle, SMALL, SOFT, "start")
        if item.count > 1:
            wide = width_of(_badge(item), TEXT) + 12
            self._rect(x + node.width - wide - 8, y + 5, wide, 17, 8.5, INK, INK, 0)
            self._text(x + node.width - wide / 2 - 8, y + 17, _badge(item), TEXT - 0.5, "#fff", "middle", 600)
        self.scene(node.inside, node.lines, x, y, level=level + 1)
        self._joints(node, x, y)

    def _joints(self, node: Node, x: float, y: float) -> None:
        """Lead the line from the middle of the card's edge to where it goes on inside."""
        colour = self._line_colours(node.inside, node.lines)
        for end in node.inside:
            if end.item.kind not in ("input", "output") or not any(end in (k.source, k.target) for k in node.lines):
                continue
            ex, top = x + end.top, end.item.kind == "input"
            y0, y1 = (y, y + end.y + 2) if top else (y + end.y, y + node.height)
            x0, x1 = (x - node.x + node.top, ex) if top else (ex, x - node.x + node.bottom)
            middle = (y0 + y1) / 2
            self.front.append(
                f'<path d="M{x0:.1f},{y0:.1f} C{x0:.1f},{middle:.1f} {x1:.1f},{middle:.1f} {x1:.1f},{y1:.1f}" fill="none" '
                f'stroke="{colour.get(end, GREY)}" stroke-width="1.8"/>'
            )

    def _stripe(self, x: float, y: float, width: float, colours: list[str]) -> None:
        shown = colours or []
        for i, colour in enumerate(shown):
            part = width / len(shown)
            self.front.append(
                f'<rect x="{x + i * part:.1f}" y="{y:.1f}" width="{part:.1f}" height="4" rx="1.5" fill="{colour}"/>'
            )

    def _rect(self, x: float, y: float, w: float, h: float, r: float, fill: str, stroke: str, line: float) -> None:
        self.front.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="{r}" fill="{fill}" stroke="{stroke}" '
            f'stroke-width="{line}"/>'
        )

    def _text(self, x: float, y: float, text: str, size: float, fill: str, anchor: str, weight: int = 400) -> None:
        self.front.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" font-weight="{weight}">'
            f"{escape(text)}</text>"
        )
