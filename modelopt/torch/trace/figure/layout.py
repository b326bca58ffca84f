"""Places boxes in rows from top to bottom so that lines run down and seldom cross.

Rows by longest path; a line that passes a row gets a lane in it; order within rows by barycentres; positions by weighted least
squares that keep the order (pool adjacent violators). After Sugiyama, Tagawa, Toda, "Methods for visual understanding of
hierarchical system structures" (1981).
"""

from __future__ import annotations

from dataclasses import dataclass, field

GAP_X, LANE = 18.0, 14.0


@dataclass(eq=False)
class Box:
    """Something to place: its size is given, its upper left corner is found. `pin` keeps it in the first or last row."""

    width: float
    height: float
    pin: str = ""
    x: float = 0.0
    y: float = 0.0
    row: int = 0
    enter: float | None = None
    leave: float | None = None
    lane: bool = False

    @property
    def top(self) -> float:
        """Where lines enter, horizontally: the centre unless `enter` says otherwise."""
        return self.x + (self.width / 2 if self.enter is None else self.enter)

    @property
    def bottom(self) -> float:
        """Where lines leave."""
        return self.x + (self.width / 2 if self.leave is None else self.leave)


@dataclass(eq=False)
class Line:
    """From one box to another; `lanes` are the boxes that hold its place in the rows between."""

    source: Box
    target: Box
    lanes: list[Box] = field(default_factory=list)


def place(boxes: list[Box], lines: list[Line], gap_y: float = 24.0) -> tuple[float, float]:
    """Set x, y of all boxes (in topological order) and the lanes of all lines; return the width and height of the whole."""
    if not boxes:
        return 0.0, 0.0
    _rows(boxes, lines)
    rows: list[list[Box]] = [[] for _ in range(max(b.row for b in boxes) + 1)]
    for box in boxes:
        rows[box.row].append(box)
    links: list[tuple[Box, Box]] = []
    for line in lines:
        previous = line.source
        for number in range(line.source.row + 1, line.target.row):
            lane = Box(LANE, 0.0, row=number, lane=True)
            rows[number].append(lane)
            line.lanes.append(lane)
            links.append((previous, lane))
            previous = lane
        links.append((previous, line.target))
    _order(rows, links)
    _positions(rows, links)
    y = 0.0
    for row in rows:
        height = max(b.height for b in row)
        for box in row:
            box.y = y + (height - box.height) / 2
            if box.lane:
                box.y, box.height = y, height
        y += height + gap_y
    left = min(b.x for row in rows for b in row)
    for row in rows:
        for box in row:
            box.x -= left
    return max(b.x + b.width for row in rows for b in row), y - gap_y


def _rows(boxes: list[Box], lines: list[Line]) -> None:
    into: dict[Box, list[Box]] = {b: [] for b in boxes}
    out: dict[Box, list[Box]] = {b: [] for b in boxes}
    for line in lines:
        into[line.target].append(line.source)
        out[line.source].append(line.target)
    for box in boxes:
        box.row = max((s.row + 1 for s in into[box]), default=0)
    last = max(b.row for b in boxes)
    for box in reversed(boxes):
        if box.pin == "last":
            box.row = last
        elif box.pin != "first" and not into[box] and out[box]:  # a source stands just above its reader
            box.row = min(t.row for t in out[box]) - 1


def _order(rows: list[list[Box]], links: list[tuple[Box, Box]]) -> None:
    above: dict[Box, list[Box]] = {}
    below: dict[Box, list[Box]] = {}
    for source, target in links:
        above.setdefault(target, []).append(source)
        below.setdefault(source, []).append(target)
    for sweep in range(6):
        near, order = (above, rows[1:]) if sweep % 2 == 0 else (below, rows[-2::-1])
        for row in order:
            rank = {b: i / max(1, len(r) - 1) for r in rows for i, b in enumerate(r)}
            now = {b: i / max(1, len(row) - 1) for i, b in enumerate(row)}
            row.sort(key=lambda b: sum(rank[n] for n in near[b]) / len(near[b]) if b in near else now[b])


def _positions(rows: list[list[Box]], links: list[tuple[Box, Box]]) -> None:
    above: dict[Box, list[Box]] = {}
    below: dict[Box, list[Box]] = {}
    for source, target in links:
        above.setdefault(target, []).append(source)
        below.setdefault(source, []).append(target)

    def wanted(box: Box) -> float:
        """Where the middle should be so that the lines of this box run straight down, on average."""
        pulls = [(n.bottom - box.top, 8.0 if box.lane and n.lane else 1.0) for n in above.get(box, ())]
        pulls += [(n.top - box.bottom, 8.0 if box.lane and n.lane else 1.0) for n in below.get(box, ())]
        total = sum(weight for _, weight in pulls)
        return box.x + box.width / 2 + (sum(p * weight for p, weight in pulls) / total if pulls else 0.0)

    for row in rows:
        _fit(row, [0.0] * len(row))
    for sweep in range(16):
        for row in rows if sweep % 2 == 0 else rows[::-1]:
            _fit(row, [wanted(b) for b in row])


def _fit(row: list[Box], wanted: list[float]) -> None:
    """Put the middles of a row as near to `wanted` as the order and the gaps allow."""
    offsets, offset = [], 0.0
    for i, box in enumerate(row):
        if i:
            offset += row[i - 1].width / 2 + GAP_X + box.width / 2
        offsets.append(offset)
    blocks: list[list[float]] = []  # [mean, weight, members]
    for box, want, shift in zip(row, wanted, offsets, strict=True):
        blocks.append([want - shift, 8.0 if box.lane else 1.0, 1.0])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, weight, members = blocks.pop()
            last = blocks[-1]
            last[0] = (last[0] * last[1] + mean * weight) / (last[1] + weight)
            last[1] += weight
            last[2] += members
    index = 0
    for mean, _, members in blocks:
        for _ in range(int(members)):
            row[index].x = mean + offsets[index] - row[index].width / 2
            index += 1
