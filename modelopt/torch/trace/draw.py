"""`draw(graphs)`: a figure of a model as SVG. Boxes are modules, colours are families of dimensions, lines are tensors.

A box has a stripe on top in the colours of the families that its input has, and one below for its output; two colours side by
side are a product or a concatenation. Grey is what must keep its size. Repeated blocks are drawn once, with their number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape

from modelopt.core.errors import TraceError
from modelopt.torch.trace.analyzer import Analyzer, analyze_symbols
from modelopt.torch.trace.figure.scene import build
from modelopt.torch.trace.figure.svg import COLOURS, FONT, GREY, INK, RULE, SMALL, SOFT, TEXT, Painter, arrange, width_of
from modelopt.torch.trace.symbols import Symbol
from modelopt.torch.trace.tracer import GraphCollection

MARGIN, LEGEND = 28.0, 290.0


@dataclass
class Pattern:
    """Families that differ only in the numbers in their names: the same thing in every layer."""

    name: str
    kind: str
    size: int
    count: int
    slots: int
    colour: str


def patterns(analyzer: Analyzer) -> dict[str, Pattern]:
    """Return the patterns of the families of a model by pattern name, in order; every pattern has a colour of its own.

    Beyond twelve patterns, the smaller ones share the last colours.
    """
    found: dict[str, Pattern] = {}
    for name, kind, size, slots in families(analyzer):
        key = pattern_of(name)
        if key in found:
            found[key].count += 1
        else:
            found[key] = Pattern(key, kind, size, 1, slots, "")
    for index, one in enumerate(sorted(found.values(), key=lambda p: -p.slots * p.count)):
        one.colour = COLOURS[index] if index < len(COLOURS) else COLOURS[index % len(COLOURS)]
    return found


def families(analyzer: Analyzer) -> list[tuple[str, str, int, int]]:
    """Return (name, kind, size, number of parameter dimensions) of each family."""
    if analyzer.axes is not None:
        return [(f.name, f.kind, f.size, len(f.slots)) for f in analyzer.axes.families]
    symbols = list(analyzer.named_dangling_symbols())
    return [(name, "", s.size or 0, 1 + len(s.dependents)) for name, s in symbols]


def pattern_of(name: str) -> str:
    """Return a family's name with layer numbers as `*`, and without the number of a part.

    >>> pattern_of("model.layers.3.mlp.up_proj.weight.0")
    'model.layers.*.mlp.up_proj.weight.0'
    """
    stem, _, dim = name.rpartition(".")
    return re.sub(r"\.\d+(?=\.)", ".*", f".{stem}.")[1:-1] + "." + re.sub(r"/\d+$", "", dim)


def draw(graphs: GraphCollection, analyzer: Analyzer | None = None, *, module: str = "", depth: int = 8) -> str:
    """Return the figure of a model, or of one module in it, as an SVG document.

    Args:
        graphs: the graphs of the model (`recursive_trace`); they need inputs, given or guessed.
        analyzer: its symbols; None analyzes it.
        module: dotted name of the module to show.
        depth: how many levels of boxes within boxes.

    Raises TraceError if the model does not run.
    """
    if graphs.recording.error is not None:
        raise TraceError(f"There is nothing to draw: {graphs.recording.error}")
    analyzer = analyzer or analyze_symbols(graphs.root, graphs)
    legend = patterns(analyzer)
    nodes, lines, width, height = arrange(build(graphs, module, depth))
    painter = Painter(Paint(analyzer, legend))
    title = type(graphs.module(module)).__name__
    painter.scene(nodes, lines, MARGIN, MARGIN + 46)
    below = _legend(painter, list(legend.values()), analyzer, width + 2 * MARGIN + 10, MARGIN + 46)
    whole = (width + 2 * MARGIN + LEGEND + 60, max(height + 46 + 2 * MARGIN, below + MARGIN))
    count = sum(p.numel() for p in graphs.module(module).parameters())
    head = (
        f'<text x="{MARGIN}" y="{MARGIN + 12}" font-size="17" font-weight="650" fill="{INK}">{escape(title)}</text>'
        f'<text x="{MARGIN}" y="{MARGIN + 30}" font-size="{TEXT}" fill="{SOFT}">{escape(_subtitle(module, count))}</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole[0]:.0f} {whole[1]:.0f}" width="{whole[0]:.0f}" '
        f'height="{whole[1]:.0f}" font-family="{FONT}" role="img"><title>{escape(title)}</title>'
        f'<rect width="100%" height="100%" fill="#fff"/>{head}{"".join(painter.front)}</svg>\n'
    )


def _subtitle(module: str, count: int) -> str:
    scales = (("B", 1e9), ("M", 1e6), ("k", 1e3))
    text = next((f"{count / scale:.1f} {unit}" for unit, scale in scales if count >= scale), str(count))
    where = f"{module}, " if module else ""
    return f"{where}{text} parameters. Stripes are families of dimensions: above what enters, below what leaves."


class Paint:
    """Answers which colours a module shows: on top ("in") those of what comes in, below ("out") those of what goes out."""

    def __init__(self, analyzer: Analyzer, legend: dict[str, Pattern]) -> None:
        self.analyzer, self.legend = analyzer, legend
        self.memo: dict[tuple[str, str], list[str]] = {}
        axes = analyzer.axes
        self.calls = {} if axes is None else {c.name: c for c in reversed(axes.calls)}
        self.family_of = {} if axes is None else {atom: f.name for f in axes.families for atom in f.atoms}

    def __call__(self, name: str, side: str) -> list[str]:
        """Return the colours of one side of a module, in order; none where the module has no sizes of its own."""
        if (name, side) not in self.memo:
            self.memo[name, side] = self._colours(name, side)
        return self.memo[name, side]

    def _colours(self, name: str, side: str) -> list[str]:
        info = self.analyzer.sym_map.get_sym_info(name)
        if info is None:
            return []
        shown = [s for _, s in (info.named_in_symbols() if side == "in" else info.named_out_symbols()) if s.slots]
        if not shown and info.is_shape_preserving:
            shown = [s for _, s in info.named_in_symbols()]
        if shown:
            return self._of_symbol(shown[0])
        if not any(s.is_cross_layer and s.slots for _, s in info.named_symbols()) and name in self.calls:
            return self._of_call(name, side)
        return []

    def _of_symbol(self, symbol: Symbol) -> list[str]:
        names = ["" if s.is_constant else s.family or self.analyzer.name_of(s) for s in symbol.sources]
        return self._of_names(names)

    def _of_call(self, name: str, side: str) -> list[str]:
        """A module without a rule: what the tensors say that it was called with."""
        call, axes = self.calls[name], self.analyzer.axes
        tensors = [t for t in (call.inputs if side == "in" else call.outputs) if t.dtype.is_floating_point and t.axes]
        axis = axes.resolve(tensors[0].axes[-1]) if tensors else None
        if axis is None:
            return [GREY]
        return self._of_names([self.family_of.get(int(a), "") for a in axes.store.atoms(axis.ids)])

    def _of_names(self, names: list[str]) -> list[str]:
        keys = dict.fromkeys(pattern_of(n) if n else "" for n in names)
        return list(dict.fromkeys(self.legend[k].colour if k in self.legend else GREY for k in keys))


def _legend(painter: Painter, rows: list[Pattern], analyzer: Analyzer, x: float, y: float) -> float:
    painter._text(x, y + 4, "Families of dimensions", 13, INK, "start", 650)
    y += 24
    for row in sorted(rows, key=lambda r: -r.slots * r.count)[: len(COLOURS) + 12]:
        painter._rect(x, y - 9, 12, 12, 3, row.colour, row.colour, 0)
        times = f" × {row.count}" if row.count > 1 else ""
        painter._text(x + 20, y + 1, f"{row.kind or 'size'} {row.size}{times}", TEXT, INK, "start", 600)
        painter._text(x + 20 + width_of(f"{row.kind or 'size'} {row.size}{times}") + 8, y + 1, _uses(row), SMALL, SOFT, "start")
        painter._text(x + 20, y + 15, row.name if len(row.name) < 52 else "…" + row.name[-51:], SMALL, SOFT, "start")
        y += 36
    painter._rect(x, y - 9, 12, 12, 3, GREY, GREY, 0)
    painter._text(x + 20, y + 1, "keeps its size", TEXT, INK, "start", 600)
    painter.front.append(f'<line x1="{x - 22}" y1="60" x2="{x - 22}" y2="{y + 10}" stroke="{RULE}"/>')
    return y + 20


def _uses(row: Pattern) -> str:
    return f"in {row.slots} parameter dimensions{' each' if row.count > 1 else ''}"
