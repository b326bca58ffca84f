"""Architectures pruned by half and judged by the oracle: a few in every run, all of the zoo's lists in the slow one."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import trace_coverage
from benchmarks.zoo import missing, names

FEW = [
    ("plain", "mlp"), ("plain", "cnn"), ("plain", "residual"), ("plain", "attention"), ("plain", "mha"), ("plain", "lstm"),
    ("hf", "causal:llama"), ("hf", "causal:gpt2"), ("hf", "causal:qwen2_moe"), ("hf", "causal:deepseek_v3"),
    ("hf", "causal:mamba2"), ("hf", "mlm:bert"), ("hf", "s2s:t5"), ("hf", "img:swin"), ("hf", "img:resnet"),
    ("hf", "oth:clip"), ("hf", "oth:whisper"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), FEW)
def test_pruned_by_half_is_exact(kind: str, name: str) -> None:
    if missing(kind):
        pytest.skip(f"needs {', '.join(missing(kind))}")
    row: dict[str, Any] = {}
    trace_coverage.judge(kind, name, row, trace_coverage.Stage())
    assert row["status"] == "exact", row["detail"]
    assert row["root_graph"] and row["removed"] > 0.2 and not row["unknown_ops"], row


@pytest.mark.slow
@pytest.mark.parametrize("which", ["zoo", "further"])
def test_every_architecture(which: str) -> None:
    models = [m for m in names(which) if not missing(m[0])]
    if not models:
        pytest.skip("needs transformers, timm, torchvision or diffusers")
    rows: dict[str, dict[str, Any]] = {}
    trace_coverage.run(
        trace_coverage.preload(models), limit=120, jobs=1, done=lambda kind, name, row: rows.update({f"{kind}/{name}": row})
    )
    wrong = {name: row["status"] for name, row in rows.items() if row["status"] != "exact"}
    assert "differs" not in wrong.values(), wrong
    assert len(wrong) <= 0.01 * len(rows), wrong
