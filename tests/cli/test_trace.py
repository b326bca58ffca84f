"""`modelopt trace`: tables, JSON, figure, and the ways to name a model."""

from __future__ import annotations

import json
from xml.etree import ElementTree


def test_directory_without_reading_weights(modelopt, tiny, tmp_path):
    config = tmp_path / "model"
    config.mkdir()
    (config / "config.json").write_text((tiny / "config.json").read_text())
    done = modelopt("trace", config, "--svg", tmp_path / "m.svg")
    assert done.code == 0, done.err
    assert "Families of dimensions" in done.out and "Keep their size" in done.out and "lm_head" in done.out
    assert "q_proj" in (tmp_path / "m.svg").read_text()
    ElementTree.parse(tmp_path / "m.svg")
    again = modelopt("trace", config, "--svg", tmp_path / "m.svg")
    assert again.code == 2 and "--overwrite" in again.err


def test_json(modelopt, tiny):
    found = json.loads(modelopt("trace", tiny, "--module", "model.layers.0.mlp", "--json").out)
    assert found["class"] == "LlamaForCausalLM" and found["traced_by"] == "recorded"
    assert [n["does"] for n in found["nodes"] if n["name"] == "gate_proj"] == ["Linear gate_proj"]
    assert {"name", "kind", "size", "slots"} == set(found["families"][0]) and found["frozen"][0]["reason"]
    assert ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"] in found["shared_inputs"]


def test_aten_of_a_module(modelopt, tiny):
    done = modelopt("trace", tiny, "--module", "model.layers.0.mlp", "--aten")
    assert done.code == 0 and "aten.silu.default" in done.out


def test_a_python_callable(modelopt):
    done = modelopt("trace", "tests.torch.trace.models:Classic")
    assert done.code == 0 and "depthwise" in done.out and "conv1.bias" in done.out.replace("bn1", "conv1")


def test_bad_names(modelopt, tiny, tmp_path):
    for name, words in (
        (tmp_path / "nowhere", "no model directory"),
        (tmp_path, "no config.json"),
        ("no_such_package:thing", "no module"),
        ("torch.nn:Nothing", 'no "Nothing"'),
        ("torch.nn:Linear", "without arguments"),
        ("json:dumps", "without arguments"),
        ("collections:OrderedDict", "not a model"),
    ):
        done = modelopt("trace", name)
        assert done.code == 2 and words in done.err, (name, done.err)
    done = modelopt("trace", tiny, "--module", "model.layers.0.mpl")
    assert done.code == 2 and 'Did you mean "model.layers.0.mlp"' in done.err
