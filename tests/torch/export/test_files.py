"""Output directories are complete or absent; shards hold what was put in."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from modelopt.core.errors import ExportError
from modelopt.torch.export import files, shards


def leftovers(directory) -> list[str]:
    return [p.name for p in directory.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), RuntimeError])
@pytest.mark.parametrize("old", [False, True])
def test_a_failure_leaves_the_target_as_it_was(tmp_path, error, old):
    target = tmp_path / "out"
    if old:
        target.mkdir()
        (target / "old").write_text("1")
    with pytest.raises((KeyboardInterrupt, ExportError, RuntimeError)):
        with files.staged_directory(target, overwrite=True) as stage:
            (stage / "new").write_text("2")
            raise error
    assert target.exists() == old
    assert not old or [p.name for p in target.iterdir()] == ["old"]
    assert leftovers(tmp_path) == []


def test_refuses_what_is_not_empty_and_replaces_it_when_told(tmp_path):
    (tmp_path / "old").write_text("1")
    with pytest.raises(ExportError, match="not empty"):
        with files.staged_directory(tmp_path):
            pass
    with pytest.raises(ExportError, match="is a file"):
        with files.staged_directory(tmp_path / "old"):
            pass
    target = tmp_path / "out"
    for text in ("1", "2"):
        with files.staged_directory(target, overwrite=True) as stage:
            (stage / text).write_text(text)
    assert [p.name for p in target.iterdir()] == ["2"]
    assert leftovers(tmp_path) == []


def test_carries_everything_but_weights_and_links_that_lead_out(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "sub").mkdir(parents=True)
    target.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "model.safetensors", "config.json", "sub/extra.txt", "mine.txt"):
        (source / name).write_text(name)
    (target / "mine.txt").write_text("kept")
    (tmp_path / "secret").write_text("x")
    (source / "sub" / "link").symlink_to(tmp_path / "secret")
    assert files.carry_files(source, target) == ["chat_template.jinja", "sub/extra.txt", "tokenizer.json"]
    assert (target / "mine.txt").read_text() == "kept"


def test_shards_hold_every_dtype_aligned_and_are_indexed(tmp_path):
    torch.manual_seed(0)
    wanted = {
        "a": torch.randn(3, 5).to(torch.float8_e4m3fn),
        "b": torch.randn(7, dtype=torch.float32),
        "c": torch.randn(5, 3).to(torch.bfloat16).T,
        "d": torch.tensor(3.0),
        "e": torch.zeros(0, 4),
        "f": torch.arange(4),
        "g": torch.randint(0, 255, (11,), dtype=torch.uint8),
    }
    with shards.ShardWriter(tmp_path, 64) as writer:
        for name, tensor in wanted.items():
            writer.add(name, tensor)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(wanted)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in wanted.values())
    assert sorted(set(index["weight_map"].values())) == sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(list(tmp_path.iterdir())) == len(set(index["weight_map"].values())) + 1
    for name, tensor in wanted.items():
        with safe_open(tmp_path / index["weight_map"][name], "pt") as file:
            got = file.get_tensor(name)
        assert got.dtype == tensor.dtype and got.shape == tensor.shape
        assert torch.equal(got.contiguous().reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8))


def test_one_shard_has_the_plain_name_and_a_name_is_written_once(tmp_path):
    with shards.ShardWriter(tmp_path) as writer:
        writer.add("w", torch.ones(2))
        with pytest.raises(ExportError, match="both called"):
            writer.add("w", torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], torch.ones(2))


@pytest.mark.parametrize("text, size", [("10GB", 10**10), ("5 MiB", 5 * 2**20), (17, 17), ("1.5kb", 1500)])
def test_sizes(text, size):
    assert shards.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "10 apples", "-1GB", "0"])
def test_sizes_that_are_none(text):
    with pytest.raises(ExportError, match="max_shard_size"):
        shards.parse_size(text)


def test_the_current_directory_and_the_original_model_are_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "thesis").write_text("1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match="current directory"):
        with files.staged_directory(".", overwrite=True):
            pass
    assert (tmp_path / "thesis").exists()
