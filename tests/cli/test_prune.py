"""`modelopt prune`: a directory that transformers loads, what is printed, and bad input."""

from __future__ import annotations

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")


def logits(path):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model(input_ids=torch.arange(8)[None]).logits, model


def test_half_of_everything_loads_in_plain_transformers(modelopt, tiny, tmp_path):
    done = modelopt("prune", tiny, "--ratio", "0.5", "--multiple-of", 8, "--no-evaluate", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "proved" in done.out and "equal logits after from_pretrained" in done.out
    _, model = logits(tmp_path / "out")
    assert model.config.hidden_size == 32 and (tmp_path / "out" / "pruning.json").is_file()


def test_a_limit_data_and_the_comparison_as_json(modelopt, tiny, tmp_path):
    done = modelopt(
        "prune", tiny, "--params", "80%", "--importance", "activation", "--ranking", "global", "--multiple-of", 4,
        "--num-samples", 2, "--length", 16, "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["costs"]["params"]["after"] <= 0.8 * found["costs"]["params"]["before"]
    assert found["comparison"]["kl"] > 0 and found["verified"]["exact"] and "equal logits" in found["read_back"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "Nothing says how much"),
        (("--ratio", "half"), "is no number"),
        (("--ratio", "1.5"), "between 0 and 1"),
        (("--ratio", "fnn=0.5"), "No family"),
        (("--params", "0.1%"), "cannot be met"),
        (("--ratio", "0.5", "--importance", "tailor"), "taylor"),
    ],
)
def test_bad_input_writes_nothing(modelopt, tiny, tmp_path, arguments, words):
    done = modelopt("prune", tiny, *arguments, "--no-evaluate", "--out", tmp_path / "out")
    assert done.code == 2 and words in done.err and not (tmp_path / "out").exists()


def test_the_original_is_never_replaced(modelopt, tiny):
    done = modelopt("prune", tiny, "--ratio", "0.5", "--out", tiny, "--overwrite")
    assert done.code == 2 and "original model itself" in done.err and (tiny / "config.json").is_file()
