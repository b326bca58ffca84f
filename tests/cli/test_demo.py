"""The demo on less text: the table, the report, and equal logits in a process without this library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelopt.cli import demo


@pytest.mark.slow
@pytest.mark.real
def test_the_demo_on_less_text(tmp_path: Path, modelopt, monkeypatch) -> None:
    monkeypatch.setattr(demo, "FORMATS", demo.FORMATS[4:5])
    monkeypatch.setattr(demo, "SCORED", {"num_samples": 2, "length": 64, "batch_size": 1})
    monkeypatch.setattr(demo, "CALIBRATION", {"num_samples": 1, "length": 64, "batch_size": 1})
    done = modelopt("demo", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "INT4 block 64" in done.out and ": equal" in done.out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    written = sum(f.stat().st_size for f in (tmp_path / "out").rglob("*.safetensors"))
    assert report["rows"][0]["num_bytes"] == pytest.approx(written, rel=1e-3)
    assert report["export"]["agrees"] and "ravity" in report["export"]["text"]
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()


def test_the_demo_covers_the_formats_that_were_promised() -> None:
    schemes = {scheme for _, scheme in demo.FORMATS}
    assert schemes >= {"int8-wo", "int8", "fp8", "fp8-pc-pt", "int4-g64", "nvfp4", "mxfp4", "mxfp8"}
    assert demo.SCORED["num_samples"] * (demo.SCORED["length"] - 1) >= 4096
