"""The report of a comparison: `report.json`, a self-contained `report.html` with its figures, and a model card."""

from __future__ import annotations

from modelopt.evaluate.report.card import model_card
from modelopt.evaluate.report.data import Data, Export, LayerError, Original, Report, Row, environment, read_report, write_json
from modelopt.evaluate.report.html import render_html, write_html

__all__ = [
    "Data",
    "Export",
    "LayerError",
    "Original",
    "Report",
    "Row",
    "environment",
    "model_card",
    "read_report",
    "render_html",
    "write_html",
    "write_json",
]
