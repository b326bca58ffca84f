"""Checkpoints of strangers: whatever stands in their files, a CheckpointError answers, soon and without running anything."""

from __future__ import annotations

import json
import shutil
import struct

import pytest

import modelopt.torch.quantization as mtq
from modelopt.core.errors import CheckpointError
from modelopt.torch.export import export, load

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def exported(tmp_path_factory, quantized):
    """exported(writer) -> a directory of several shards, written once."""
    root = tmp_path_factory.mktemp("exported")
    model = quantized(mtq.NVFP4_DEFAULT_CFG)
    for writer in ("hf", "compressed-tensors"):
        export(model, root / writer, writer, max_shard_size="400KB")
    return root


@pytest.fixture
def damaged(exported, tmp_path):
    def copy(writer):
        return shutil.copytree(exported / writer, tmp_path / "copy")

    return copy


def change(file, function):
    data = json.loads(file.read_text())
    function(data)
    file.write_text(json.dumps(data))


def _shard(directory):
    return sorted(directory.glob("*.safetensors"))[1]


def _header(shape):
    text = json.dumps({"a.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(4)


SHARDS = {
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:500]),
    "empty": lambda p: p.write_bytes(b""),
    "missing": lambda p: p.unlink(),
    "a directory": lambda p: (p.unlink(), p.mkdir()),
    "a header of 4 EiB": lambda p: p.write_bytes(struct.pack("<Q", 2**62) + p.read_bytes()[8:]),
    "a tensor of 2^80 values": lambda p: p.write_bytes(_header([2**40, 2**40])),
    "a link to nowhere": lambda p: (p.unlink(), p.symlink_to("/nonexistent/x.safetensors")),
}


@pytest.mark.parametrize("kind", list(SHARDS))
@pytest.mark.parametrize("writer", ["hf", "compressed-tensors"])
def test_damaged_shards(damaged, writer, kind):
    directory = damaged(writer)
    SHARDS[kind](_shard(directory))
    with pytest.raises(CheckpointError):
        load(directory)


@pytest.mark.parametrize("name", ["../../x.safetensors", "/etc/passwd", "/x.safetensors", "..", "", "a/x.safetensors", 3, None])
def test_an_index_that_leads_out(damaged, name):
    directory = damaged("hf")
    change(directory / INDEX, lambda data: data["weight_map"].update({"lm_head.weight": name}))
    with pytest.raises(CheckpointError):
        load(directory)


CONFIGS = [
    {"quantization_config": [1]},
    {"quantization_config": {"quant_method": ["x"]}},
    {"architectures": 5},
    {"architectures": ["os.system"]},
    {"architectures": None},
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": "two"},
    {"hidden_size": 2**60},
]


@pytest.mark.parametrize("data", CONFIGS, ids=str)
def test_hostile_model_configurations(damaged, data):
    directory = damaged("compressed-tensors")
    change(directory / "config.json", lambda config: config.update(data))
    with pytest.raises(CheckpointError):
        load(directory)


def test_a_configuration_cannot_choose_code_to_run(damaged):
    directory = damaged("hf")
    evil = {"auto_map": {"AutoConfig": "evil.Evil"}, "_attn_implementation": "evil/kernel", "attn_implementation": "evil/kernel"}
    change(directory / "config.json", lambda config: config.update(evil, dtype="load"))
    assert load(directory).config._attn_implementation != "evil/kernel"


GROUPS = [
    {"targets": [1]},
    {"targets": ["re:((("]},
    {"weights": [1]},
    {"weights": {"num_bits": [4]}},
    {"weights": {"num_bits": 10**9, "strategy": "group", "group_size": 16}},
    {"weights": {"num_bits": 4, "type": "float", "strategy": ["x"]}},
    {"weights": {"num_bits": 4, "type": "float", "strategy": "block"}},
    {"weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": "x"}},
]


@pytest.mark.parametrize("data", GROUPS, ids=str)
def test_hostile_config_groups(damaged, data):
    directory = damaged("compressed-tensors")
    change(directory / "config.json", lambda c: c["quantization_config"]["config_groups"]["group_0"].update(data))
    with pytest.raises(Exception) as caught:
        load(directory)
    assert type(caught.value).__module__ == "modelopt.core.errors", repr(caught.value)


@pytest.mark.parametrize("data", [{"config_groups": [1]}, {"kv_cache_scheme": [1]}, {"ignore": 3}], ids=str)
def test_hostile_quantization_configs(damaged, data):
    directory = damaged("compressed-tensors")
    change(directory / "config.json", lambda c: c["quantization_config"].update(data))
    with pytest.raises(CheckpointError):
        load(directory)


SUMMARIES = [
    {"quant_algo": [1]},
    {"quant_algo": "W4A16_AWQ", "group_size": 10**40},
    {"quant_algo": "MXFP4"},
    {"quant_algo": "MIXED_PRECISION", "quantized_layers": [3]},
    {"kv_cache_quant_algo": ["x"]},
    {"exclude_modules": 5},
]


@pytest.mark.parametrize("data", SUMMARIES, ids=str)
def test_hostile_hf_quant_configs(damaged, data):
    directory = damaged("hf")
    change(directory / "hf_quant_config.json", lambda c: c["quantization"].update(data))
    with pytest.raises(CheckpointError):
        load(directory)
