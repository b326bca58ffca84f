"""The commands as a user meets them: what they print, what they write, and how they end."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

COMMANDS = ("quantize", "plan", "eval", "inspect", "verify", "export", "formats", "run", "demo")
CALIB = ("--num-samples", 2, "--length", 32, "--device", "cpu")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str, modelopt) -> None:
    done = modelopt(command, "--help")
    assert done.code == 0
    assert f"Example: modelopt {command}" in " ".join(done.out.split())


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, modelopt.cli.app; sys.exit(bool({'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_as_a_program_it_ends_with_2_and_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "modelopt", "run", str(tmp_path / "absent.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: There is no recipe file") and done.stderr.count("\n") == 1


def test_formats_lists_schemes_algebra_and_recipes(modelopt) -> None:
    done = modelopt("formats")
    assert done.code == 0
    for text in ("nvfp4", "e2m1[32]~*e8m0", "general/nvfp4", "int8-static", "--kv-cache takes: fp8"):
        assert text in done.out
    data = json.loads(modelopt("formats", "--json").out)
    bits = {s["name"]: s["bits"] for s in data["schemes"]}
    assert bits["mxfp4"] == "4.25" and bits["nvfp4"] == "4.50"


def test_dry_run_prints_the_plan_and_writes_nothing(tiny: Path, tmp_path: Path, modelopt, monkeypatch) -> None:
    from modelopt.recipes import source

    monkeypatch.setattr(source, "load_model", lambda *a: pytest.fail("weights were loaded"))
    options = ("--format", "nvfp4", "--kv-cache", "fp8", "--skip", "*down_proj*", "--dry-run", "--out", tmp_path / "out")
    done = modelopt("quantize", tiny, *options)
    assert done.code == 0
    for text in ("coverage", "100.0%", "e2m1[16]~*e4m3[...]*f32", 'rule "*down_proj*"', 'rule "*lm_head*"', "e4m3[...]*f32 in 2"):
        assert text in done.out
    assert not (tmp_path / "out").exists()
    data = json.loads(modelopt("plan", tiny, "--format", "nvfp4", "--json").out)
    assert data["bits_per_weight"] == pytest.approx(4.5, abs=0.1) and data["layout"] == "hf"
    assert modelopt("plan", tiny, "--format", "nvfp4", "--all").out.count("q_proj") == 2


def test_a_model_goes_through_every_command(tiny: Path, tmp_path: Path, modelopt) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    done = modelopt("quantize", tiny, "--format", "int4-g32", "--out", out, *CALIB)
    assert done.code == 0, done.err
    assert f"Wrote {out} in the layout hf" in done.out.replace("\n", "")
    done = modelopt("inspect", out)
    assert done.code == 0
    for text in ("i4[32]*bf16", "LlamaForCausalLM", "100.0%", "layers.*.mlp.down_proj", "recipe.yaml"):
        assert text in done.out
    done = modelopt("eval", out, "--against", tiny, "--num-samples", 2, "--length", 32, "--json")
    assert done.code == 0, done.err
    scores = json.loads(done.out)
    assert 0 < scores["kl"] < 0.1 and scores["num_windows"] == 2
    done = modelopt("export", out, "--to", "compressed-tensors", "--out", other)
    assert done.code == 0, done.err
    with safe_open(other / "model.safetensors", "pt") as file:
        assert "model.layers.0.mlp.up_proj.weight_packed" in file.keys()
    assert modelopt("eval", other, "--against", tiny, "--num-samples", 2, "--length", 32).code == 0


def test_verify_says_equal_or_ends_with_1(tiny: Path, tmp_path: Path, modelopt, monkeypatch) -> None:
    verify = importlib.import_module("modelopt.torch.export.verify")
    out = tmp_path / "out"
    assert modelopt("quantize", tiny, "--format", "int8-wo", "--out", out, "--export", "compressed-tensors", *CALIB).code == 0
    done = modelopt("verify", out)
    assert done.code == 0 and "logits agree" in done.out and "largest difference" in done.out
    bad = verify.VerifyResult(False, "hf", "logits differ by more than rounding", 3.0, 3.0, 0.1, 9.0, 64)
    monkeypatch.setattr(verify, "verify", lambda path: bad)
    done = modelopt("verify", out)
    assert done.code == 1 and "does not verify" in done.err


def test_a_recipe_runs_evaluates_and_can_run_again(tiny: Path, tmp_path: Path, modelopt) -> None:
    text = "{num_samples: 2, length: 32}"
    steps = "steps: [{mode: quantize, config: {preset: fp8, kv_cache: fp8}}]"
    (tmp_path / "job.yaml").write_text(f"model: {tiny}\n{steps}\ncalibration: {text}\nevaluate: {text}\n")
    done = modelopt("run", tmp_path / "job.yaml", "--out", tmp_path / "a", "--device", "cpu")
    assert done.code == 0, done.err
    assert "KL divergence" in done.out
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert len(report["rows"]) == 1
    done = modelopt("run", tmp_path / "a" / "recipe.yaml", "--out", tmp_path / "b", "--device", "cpu")
    assert done.code == 0, done.err
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_overwrite_replaces_the_directory_whole(tiny: Path, tmp_path: Path, modelopt) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    assert modelopt("quantize", tiny, "--format", "int8-wo", "--out", out, "--overwrite", *CALIB).code == 0
    assert (out / "config.json").is_file() and not (out / "old").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
