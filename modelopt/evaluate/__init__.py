"""What optimization cost: KL divergence to the original, perplexity, per-layer error, the report, and a reference model.

Imports neither transformers nor matplotlib; every name is loaded at first use. The function `perplexity` stays in the
module of that name.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelopt.evaluate.kl import Comparison, Reference, compare
    from modelopt.evaluate.outputs import OutputError, compare_outputs
    from modelopt.evaluate.perplexity import Perplexity
    from modelopt.evaluate.reference_model import smollm2, smollm2_small
    from modelopt.evaluate.report import LayerError, Report, model_card, read_report, write_html, write_json
    from modelopt.evaluate.sensitivity import layer_errors

_HOME = {
    "Comparison": "kl",
    "LayerError": "report",
    "OutputError": "outputs",
    "Perplexity": "perplexity",
    "Reference": "kl",
    "Report": "report",
    "compare": "kl",
    "compare_outputs": "outputs",
    "layer_errors": "sensitivity",
    "model_card": "report",
    "read_report": "report",
    "smollm2": "reference_model",
    "smollm2_small": "reference_model",
    "write_html": "report",
    "write_json": "report",
}

__all__ = [
    "Comparison",
    "LayerError",
    "OutputError",
    "Perplexity",
    "Reference",
    "Report",
    "compare",
    "compare_outputs",
    "layer_errors",
    "model_card",
    "read_report",
    "smollm2",
    "smollm2_small",
    "write_html",
    "write_json",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOME[name]}")
    value = getattr(module, name)
    globals()[name] = value
    return value
