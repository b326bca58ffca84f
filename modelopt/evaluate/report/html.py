"""`report.html`: one file with its style and figures inside, for screens light and dark and for paper.

No script, no font, no image and no address is fetched; every text from outside is escaped.
"""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path

from modelopt.evaluate.report.data import Report, Row, write_text
from modelopt.evaluate.report.figures import kl_by_format, kl_text, layer_error, size_against_loss
from modelopt.evaluate.report.svg import number

_STYLE = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")


def write_html(report: Report, path: str | Path) -> Path:
    """Write the report as one HTML file, whole or not at all, and return its path."""
    return write_text(path, render_html(report))


def render_html(report: Report) -> str:
    """Return the report as an HTML document."""
    sections = (_header(report), _table(report), _figures(report), _export(report), _method(report), _footer(report))
    body = "\n".join(section for section in sections if section)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(report.title)}</title>\n<style>\n{_STYLE}</style>"
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n<body><main>\n{body}\n</main></body></html>\n'


def megabytes(num_bytes: int) -> str:
    """Return bytes as MB (10^6) with three significant digits."""
    return number(num_bytes / 1e6)


def _header(report: Report) -> str:
    original = report.original
    facts = [
        ("model", original.name),
        ("parameters", f"{number(original.num_parameters / 1e6)} M"),
        ("original", f"{megabytes(original.num_bytes)} MB, perplexity {number(original.perplexity, 4)}"),
        ("scored", f"{report.data.num_tokens:,} tokens"),
        ("date", report.created),
    ]
    cells = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    lead = f"<h1>{escape(report.title)}</h1>\n<p class=lead>{escape(summary(report))}</p>"
    return f"<header>{lead}\n<dl class=facts>{cells}</dl></header>"


def summary(report: Report) -> str:
    """Return the result in two sentences."""
    rows = [r for r in report.rows if math.isfinite(r.kl)]
    if not rows:
        return "No format was measured."
    nearest, smallest = min(rows, key=lambda r: r.kl), min(rows, key=lambda r: (r.num_bytes, r.kl))
    text = f"{len(report.rows)} formats, each compared with the original on the same held-out text. "
    text += f"Nearest to the original: {_place(report, nearest)} "
    if smallest is not nearest:
        text += f"Smallest: {_place(report, smallest)}"
    return text.strip()


def _place(report: Report, row: Row) -> str:
    share = 100 * row.num_bytes / report.original.num_bytes
    return f"{row.name}, at {number(row.kl)} nats per token and {share:.0f} % of its size."


def _table(report: Report) -> str:
    heads = [
        ("format", ""),
        ("bits per weight", "n"),
        ("size (MB)", "n"),
        ("KL to original (nats/token)", "n"),
        ("KL, 99th percentile", "n"),
        ("top-1 agreement", "n"),
        ("perplexity", "n"),
        ("quantized in (s)", "n"),
    ]
    original = report.original
    first = [
        "<span class=name>original</span>",
        number(original.bits_per_weight),
        megabytes(original.num_bytes),
        "0",
        "0",
        "100 %",
        number(original.perplexity, 4),
        "–",
    ]
    lines = [_line(first, "original")]
    for row in report.rows:
        note = row.description or row.format
        cells = [
            f"<span class=name>{escape(row.name)}</span><span class=note>{escape(note)}</span>",
            number(row.bits_per_weight),
            megabytes(row.num_bytes),
            escape(kl_text(row)),
            number(row.kl_p99),
            f"{100 * row.top1_agreement:.1f} %",
            number(row.perplexity, 4),
            f"{row.seconds:.1f}",
        ]
        lines.append(_line(cells))
    head = "".join(f'<th scope="col" class="{css}">{text}</th>' for text, css in heads)
    caption = (
        "KL divergence: mean over all scored positions ± one standard error of the mean over windows. "
        "Bits per weight count the scales; size is that of all tensors on disk, what stays unquantized included."
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f"<section><h2>Results</h2><div class=wide>{table}</div><p class=caption>{caption}</p></section>"


def _line(cells: list[str], css: str = "") -> str:
    inner = "".join(f'<td class="n">{c}</td>' if i else f'<th scope="row">{c}</th>' for i, c in enumerate(cells))
    return f'<tr class="{css}">{inner}</tr>' if css else f"<tr>{inner}</tr>"


def _figures(report: Report) -> str:
    if not report.rows:
        return ""
    where = f"{report.data.num_tokens:,} tokens ({report.data.num_windows} windows of {report.data.window_length})"
    figures = [
        (
            "Distance from the original",
            kl_by_format(report),
            "Mean KL divergence of each format's predictions to the original's over the full vocabulary, "
            f"on {where}. Bars: one standard error, where it is wider than the dot.",
        ),
        (
            "Size against loss",
            size_against_loss(report),
            "Lower left is better. The line joins the formats that no other beats in both size and divergence.",
        ),
        (
            "Error by layer",
            layer_error(report),
            "Relative error of each quantized layer's output, given the original's own input to it: "
            "what the layer adds by itself. Each panel has its own scale.",
        ),
    ]
    return "\n".join(
        f"<section><h2>{title}</h2><figure>{svg}<figcaption class=caption>{caption}</figcaption></figure></section>"
        for title, svg, caption in figures
        if svg
    )


def _export(report: Report) -> str:
    export = report.export
    if export is None:
        return ""
    verdict = "<b class=good>agrees</b>" if export.agrees else "<b class=bad>DOES NOT AGREE</b>"
    text = (
        f"<p><b>{escape(export.name)}</b> was written as {escape(export.layout)} and loaded by {escape(export.loaded_with)} "
        f"in another process. With the model that was exported it {verdict}: "
        f"largest difference of a logit {number(export.largest_logit_difference)}.</p>"
    )
    if export.text:
        text += f"<blockquote><b>{escape(export.prompt)}</b>{escape(export.text)}</blockquote>"
    return f"<section><h2>Exported and read back</h2>{text}</section>"


def _method(report: Report) -> str:
    data = report.data
    source = f" {report.original.source.rstrip('.')}." if report.original.source else ""
    items = [
        f"Original: {report.original.name}.{source}",
        f"Evaluation: {data.source}, split “{data.split}”, {data.num_windows} windows of {data.window_length} tokens "
        "at an even stride, without padding and special tokens.",
        f"Calibration: {data.calibration}" if data.calibration else "",
        "KL(original ‖ quantized) over the full vocabulary at every position, with log-softmax in float32; "
        "the standard error is that of the mean of per-window means.",
        "Top-1 agreement: share of positions where both put the same token first. "
        "Perplexity: next-token loss over all positions of a window but its last.",
        *report.notes,
    ]
    listed = "".join(f"<li>{escape(item)}</li>" for item in items if item)
    return f"<section><h2>How this was measured</h2><ul>{listed}</ul></section>"


def _footer(report: Report) -> str:
    facts = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in report.environment.items())
    recipe = (
        f"<h2>Recipe</h2><pre>{escape(json.dumps(report.recipe, indent=2, ensure_ascii=False))}</pre>" if report.recipe else ""
    )
    versions = f"<h2>Environment</h2><dl class=facts>{facts}</dl>"
    return f"<section>{recipe}{versions}</section><footer>modelopt {escape(report.modelopt)}</footer>"
