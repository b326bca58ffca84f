"""Damaged and hostile files: a CheckpointError that names the file, and a model that stays as it was."""

from __future__ import annotations

import json
import struct

import pytest
import torch
import toy

from modelopt.core.errors import CheckpointError
from modelopt.torch.opt import apply_mode, history, load_modelopt_state, restore, restore_from_modelopt_state, save
from modelopt.torch.opt.files import read_json

STEP = {"mode": "scale", "config": {}, "state": {"layers": ["head"]}}


def state(**changes):
    return {"modelopt_version": "0.1.0", "steps": [STEP], "nested": {}, **changes}


HOSTILE = {
    "list": [],
    "no steps": {"modelopt_version": "x"},
    "unknown key": state(run="rm -rf /"),
    "version": state(modelopt_version=1),
    "steps dict": state(steps={}),
    "step text": state(steps=["scale"]),
    "step keys": state(steps=[{"mode": "scale"}]),
    "unknown mode": state(steps=[{**STEP, "mode": "os.system"}]),
    "import path": state(steps=[{**STEP, "mode": "os:system"}]),
    "mode type": state(steps=[{**STEP, "mode": ["scale"]}]),
    "config type": state(steps=[{**STEP, "config": "scale"}]),
    "config key": state(steps=[{**STEP, "config": {"facto": 1}}]),
    "config value": state(steps=[{**STEP, "config": {"factor": "much"}}]),
    "state type": state(steps=[{**STEP, "state": []}]),
    "state content": state(steps=[{**STEP, "state": {"layers": 5}}]),
    "state key": state(steps=[{**STEP, "state": {}}]),
    "state name": state(steps=[{**STEP, "state": {"layers": ["nothing.here"]}}]),
    "order": state(steps=[{**STEP, "order": "first"}]),
    "nested type": state(nested=[]),
    "nested traversal": state(nested={"../../etc": [STEP]}),
    "nested dunder": state(nested={"__class__": [STEP]}),
    "nested steps": state(nested={"block": STEP}),
    "many steps": state(steps=[STEP] * 10_001),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_state(tmp_path, toy_modes, case):
    save(apply_mode(toy.Tied(), "scale"), tmp_path / "out")
    (tmp_path / "out/modelopt.json").write_text(json.dumps(HOSTILE[case]))
    model = toy.Tied(seed=1)
    before, classes = toy.bits(model), [type(m) for m in model.modules()]
    with pytest.raises(CheckpointError):
        restore(model, tmp_path / "out")
    assert toy.bits(model) == before and [type(m) for m in model.modules()] == classes and not history(model)
    with pytest.raises(CheckpointError):
        restore_from_modelopt_state(toy.Tied(), modelopt_state_path=tmp_path / "out")


@pytest.mark.parametrize(
    "text",
    ["", "{", "NaN", "[1e999]", "[Infinity]", "9" * 5000, '{"a": 99999999999999999999}', "[" * 100 + "]" * 100, "[" * 100_000],
)
def test_hostile_json(text):
    with pytest.raises(CheckpointError, match="the file"):
        read_json(text, "the file")


def test_binary_and_missing(tmp_path, toy_modes):
    with pytest.raises(CheckpointError, match="does not exist"):
        restore(toy.Tied(), tmp_path / "nowhere")
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="modelopt.json does not exist"):
        restore(toy.Tied(), tmp_path / "out")
    (tmp_path / "out/modelopt.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_modelopt_state(tmp_path / "out")
    (tmp_path / "out/modelopt.json").write_text(json.dumps(state()))
    with pytest.raises(CheckpointError, match="model.safetensors is missing"):
        restore(toy.Tied(), tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated(tmp_path, toy_modes, keep):
    save(apply_mode(toy.Tied(), "scale"), tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    model = toy.Tied(seed=1)
    before = toy.bits(model)
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated.*again"):
        restore(model, tmp_path / "out")
    assert toy.bits(model) == before and not history(model)


def test_damaged_header_and_aliases(tmp_path, toy_modes):
    from safetensors.torch import load_file, save_file

    save(toy.Tied(), tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    good = file.read_bytes()
    file.write_bytes(struct.pack("<Q", 2**62) + good[8:])
    with pytest.raises(CheckpointError, match="truncated, damaged"):
        restore(toy.Tied(), tmp_path / "out")
    file.write_bytes(good)
    tensors = load_file(file)
    for aliases in ("[]", '{"head.weight": "nothing"}', '{"head.weight": 3}', '{"embed.weight": "offset"}', "{"):
        save_file(tensors, file, metadata={"modelopt_aliases": aliases})
        with pytest.raises(CheckpointError, match="modelopt_aliases"):
            restore(toy.Tied(), tmp_path / "out")


@pytest.mark.parametrize("shard", ["../../secret.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin"])
def test_index_with_path_traversal(tmp_path, toy_modes, shard):
    save(toy.Tied(), tmp_path / "out")
    (tmp_path / "out/model.safetensors").rename(tmp_path / "secret.safetensors")
    (tmp_path / "out/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"embed.weight": shard}}))
    with pytest.raises(CheckpointError, match="no safetensors file of the same directory"):
        restore(toy.Tied(), tmp_path / "out")


def test_archives_with_code_are_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            import os

            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"modelopt_state": Bomb()}, tmp_path / "evil.pth")
    for read in (load_modelopt_state, lambda p: restore(toy.Tied(), p)):
        with pytest.raises(CheckpointError, match="cannot be loaded safely"):
            read(tmp_path / "evil.pth")
    assert not (tmp_path / "exploded").exists()
    torch.save({"modelopt_state": [1]}, tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="modelopt_state_dict"):
        load_modelopt_state(tmp_path / "list.pth")
    (tmp_path / "noise.safetensors").write_bytes(b"PK\x03\x04noise")
    with pytest.raises(CheckpointError, match="truncated, damaged"):
        restore(toy.Tied(), tmp_path / "noise.safetensors")
