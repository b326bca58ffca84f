"""A model card in Markdown, to lie beside an exported checkpoint."""

from __future__ import annotations

from modelopt.evaluate.report.data import Report
from modelopt.evaluate.report.figures import kl_text
from modelopt.evaluate.report.svg import number


def model_card(report: Report) -> str:
    """Return the card: what was done, what it cost, and how that was measured."""
    data, original = report.data, report.original
    lines = [f"# {_cell(report.title)}", ""]
    lines += [f"Original: {original.name}, {number(original.num_parameters / 1e6)} M parameters. {original.source}".rstrip(), ""]
    lines += ["| format | bits per weight | size (MB) | KL (nats/token) | top-1 agreement | perplexity |"]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    bits, size, ppl = number(original.bits_per_weight), number(original.num_bytes / 1e6), number(original.perplexity, 4)
    lines += [f"| original | {bits} | {size} | 0 | 100 % | {ppl} |"]
    for row in report.rows:
        cells = [
            f"{_cell(row.name)} (`{row.format}`)" if row.format else _cell(row.name),
            number(row.bits_per_weight),
            number(row.num_bytes / 1e6),
            kl_text(row),
            f"{100 * row.top1_agreement:.1f} %",
            number(row.perplexity, 4),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    windows = f"{data.num_windows} windows of {data.window_length}; {data.source}, split {data.split}"
    scored = f"{data.num_tokens} held-out tokens ({windows})"
    lines += ["", f"KL divergence of the quantized model's predictions to the original's, mean ± standard error, on {scored}."]
    if data.calibration:
        lines += ["", f"Calibration: {data.calibration}"]
    if report.export is not None:
        export = report.export
        lines += ["", f"{export.name}, written as {export.layout} and loaded by {export.loaded_with}: logits "]
        lines[-1] += "agree" if export.agrees else "do not agree"
        lines[-1] += f" (largest difference {number(export.largest_logit_difference)})."
    lines += ["", *(f"- {note}" for note in report.notes)] if report.notes else []
    versions = ", ".join(f"{k} {v}" for k, v in report.environment.items())
    return "\n".join([*lines, "", f"Made with modelopt {report.modelopt} on {report.created} ({versions}).", ""])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
