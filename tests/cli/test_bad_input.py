"""Bad input ends with exit code 2, one clear line without a traceback, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

CALIB = ("--num-samples", 2, "--length", 32, "--device", "cpu")


def refused(done, says: str, left: Path | None = None) -> None:
    """Check how a refused command ended."""
    assert done.code == 2, (done.code, done.out, done.err)
    assert says in done.err, done.err
    assert "Traceback" not in done.err and "Traceback" not in done.out
    if left is not None:
        assert not left.exists()
        assert not [p for p in left.parent.iterdir() if "partial" in p.name]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--format", "nvpf4"), 'Did you mean "nvfp4"'),
        (("--format", "NVFP4_DEFALT_CFG"), 'Did you mean "NVFP4_DEFAULT_CFG"'),
        (("--format", "nvfp4", "--kv-cache", "fp7"), "KV-cache scheme"),
        (("--format", "fp8", "--export", "compresed-tensors"), 'Did you mean "compressed-tensors"'),
        (("--format", "fp8", "--calib", "absent.txt"), "absent.txt does not exist"),
        (("--format", "fp8", "--calib", "wikitext"), "nothing is downloaded"),
        (("--format", "fp8", "--num-samples", 10**6), "Too little text"),
        (("--format", "fp8", "--num-samples", 10**18), "num_samples"),
        (("--format", "fp8", "--num-samples", 0), "--num-samples"),
        (("--format", "fp8", "--dtype", "float8"), "is no dtype"),
        (("--format", "fp8", "--device", "cuda:99"), "CUDA devices"),
        (("--format", "fp8", "--device", "abacus"), "is no device"),
        (("--format", "INT4_AWQ_CFG"), "awq"),
        (("--format", "mxfp6", "--export", "hf"), "--export modelopt"),
        (("--format", "int8-wo", "--skip", "*"), "Nothing"),
    ],
)
def test_options_that_mean_nothing(options: tuple[object, ...], says: str, tiny: Path, tmp_path: Path, modelopt) -> None:
    refused(modelopt("quantize", tiny, "--out", tmp_path / "out", *options), says, tmp_path / "out")


def test_calibration_text_that_is_too_short(tiny: Path, tmp_path: Path, modelopt) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    done = modelopt("quantize", tiny, "--format", "fp8", "--calib", tmp_path / "short.txt", "--out", tmp_path / "out", *CALIB)
    refused(done, "Too little text", tmp_path / "out")


@pytest.mark.parametrize("name", ["absent", "./absent/model", "/absent/model"])
def test_a_model_that_is_not_there(name: str, tmp_path: Path, modelopt) -> None:
    done = modelopt("quantize", name, "--format", "fp8", "--out", tmp_path / "out")
    refused(done, "no model directory", tmp_path / "out")


def damaged(tiny: Path, path: Path, damage: str) -> Path:
    """Copy the model and spoil the copy."""
    shutil.copytree(tiny, path)
    weights = path / "model.safetensors"
    data = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(data[: len(data) // 2])
    elif damage == "header":
        weights.write_bytes(b"\xff" * 64 + data[64:])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "missing":
        weights.unlink()
    elif damage == "config":
        (path / "config.json").write_text("{broken")
    elif damage == "no config":
        (path / "config.json").unlink()
    elif damage == "architecture":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "architectures": ["UnheardOfForCausalLM"]}))
    elif damage == "shapes":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    return path


@pytest.mark.parametrize("damage", ["truncated", "header", "empty", "missing", "config", "no config", "architecture", "shapes"])
@pytest.mark.parametrize("command", ["quantize", "inspect"])
def test_a_damaged_model(command: str, damage: str, tiny: Path, tmp_path: Path, modelopt) -> None:
    model = damaged(tiny, tmp_path / "model", damage)
    if command == "inspect":
        if damage not in ("architecture", "shapes"):
            refused(modelopt("inspect", model), str(model))
        return
    refused(modelopt("quantize", model, "--format", "int8-wo", "--out", tmp_path / "out"), str(model), tmp_path / "out")


def test_a_directory_that_is_not_empty(tiny: Path, tmp_path: Path, modelopt) -> None:
    (tmp_path / "kept").write_text("kept")
    refused(modelopt("quantize", tiny, "--format", "int8-wo", "--out", tmp_path), "--overwrite")
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    refused(modelopt("quantize", tiny, "--format", "int8-wo", "--out", tmp_path / "kept"), "is a file")
    refused(modelopt("quantize", tiny, "--format", "int8-wo"), "--out")


def test_quantizing_twice_and_evaluating_against_another_model(tiny: Path, tmp_path: Path, modelopt) -> None:
    from tests.recipes.tiny_llama import write_tiny

    out = tmp_path / "out"
    assert modelopt("quantize", tiny, "--format", "int8-wo", "--out", out, *CALIB).code == 0
    refused(modelopt("quantize", out, "--format", "fp8", "--out", tmp_path / "again"), "quantized already", tmp_path / "again")
    other = write_tiny(tmp_path / "other", num_hidden_layers=1)
    refused(modelopt("eval", out, "--against", other, "--num-samples", 2, "--length", 32), "num_hidden_layers is 2 and 1")
    refused(modelopt("eval", tmp_path / "absent", "--against", tiny), "absent")
    refused(modelopt("verify", tiny), "quant_method")


def test_usage_errors_are_bad_input_too(tiny: Path, modelopt) -> None:
    assert modelopt("quantize", tiny).code == 2
    assert modelopt("quantise", tiny).code == 2
    assert modelopt("quantize", tiny, "--formt", "fp8").code == 2


@pytest.mark.parametrize("stage", ["calibrate", "export"])
def test_an_interrupt_leaves_no_directory(stage: str, tiny: Path, tmp_path: Path, modelopt, monkeypatch) -> None:
    from modelopt.cli.progress import Bars

    def interrupt(self: Bars, done: int, total: int | None, what: str) -> None:
        if what == stage:
            raise KeyboardInterrupt

    monkeypatch.setattr(Bars, "__call__", interrupt)
    done = modelopt("quantize", tiny, "--format", "fp8", "--out", tmp_path / "out", *CALIB)
    assert done.code == 130 and "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_failure_and_leaves_no_directory(tiny: Path, tmp_path: Path, modelopt, monkeypatch) -> None:
    from modelopt.torch.export.shards import ShardWriter

    def full(self: ShardWriter, *args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "add", full)
    done = modelopt("quantize", tiny, "--format", "int8-wo", "--out", tmp_path / "out", *CALIB)
    assert done.code == 1 and "No space left" in done.err and "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []
