"""Texts, windows and the loaders built from them."""

from __future__ import annotations

import json

import pytest
import torch

from modelopt.core.errors import ConfigError, UnknownNameError
from modelopt.torch.utils import dataset
from modelopt.torch.utils.dataset import batches, create_forward_loop, get_dataset_dataloader, load_texts, token_windows


def letters(text, *, add_special_tokens):
    assert add_special_tokens is False
    return {"input_ids": [ord(c) for c in text]}


def paragraphs(texts):
    return [" ".join(p.split()) for t in texts for p in t.split("\n\n") if p.strip()]


def test_pydoc_splits_are_disjoint_and_large():
    calibration, evaluation = (paragraphs(load_texts("pydoc", s)) for s in dataset.SPLITS)
    assert not set(calibration) & set(evaluation)
    assert len(set(calibration)) == len(calibration) and len(set(evaluation)) == len(evaluation)
    assert sum(map(len, calibration)) > 100_000 and sum(map(len, evaluation)) > 100_000


def test_pydoc_is_deterministic():
    assert load_texts("pydoc", "evaluation") == load_texts("pydoc", "evaluation")
    assert dataset._half("types") == "evaluation" and dataset._half("compound") == "calibration"


def test_windows_have_an_even_stride_and_no_padding():
    text = "".join(chr(i) for i in range(100, 1103))
    windows = token_windows(letters, [text], 4, 100)
    assert windows.dtype == torch.int64 and windows.shape == (4, 100)
    assert windows[:, 0].tolist() == [100 + 250 * i for i in range(4)]
    assert torch.equal(windows - windows[:, :1], torch.arange(100).expand(4, 100))


def test_windows_join_texts_in_order():
    assert token_windows(letters, ["abc", "", "defg"], 1, 7)[0].tolist() == list(b"abcdefg")


def test_seed_moves_the_windows_inside_the_text():
    text = "".join(chr(i) for i in range(100, 1100))
    starts = {int(token_windows(letters, [text], 4, 100, seed=s)[0, 0]) for s in range(8)}
    assert len(starts) > 3 and min(starts) >= 100 and max(starts) <= 250
    assert torch.equal(token_windows(letters, [text], 4, 100, seed=3), token_windows(letters, [text], 4, 100, seed=3))
    assert token_windows(letters, [text], 10, 100, seed=5)[-1, -1] == 1099


def test_too_little_text_says_how_many_tokens():
    with pytest.raises(ConfigError, match=r"hold 7 tokens.*need 20.*at most 1 windows"):
        token_windows(letters, ["abcdefg"], 4, 5)
    with pytest.raises(ConfigError, match="num_samples=0"):
        token_windows(letters, ["abcdefg"], 0, 5)


def test_batches_cover_all_rows():
    windows = torch.arange(10).view(5, 2)
    assert torch.equal(torch.cat(list(batches(windows, 2))), windows)
    assert [len(b) for b in batches(windows, 2)] == [2, 2, 1]
    with pytest.raises(ConfigError):
        list(batches(windows, 0))


def test_files_and_directories(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe")
    (tmp_path / "d.jsonl").write_text(
        json.dumps({"text": "third"}) + "\n\n" + json.dumps({"messages": [{"role": "user", "content": "hi"}, {"content": "ho"}]})
    )
    assert load_texts(tmp_path) == ["first", "second", "third", "hi\n\nho"]
    assert load_texts([tmp_path / "b.txt", str(tmp_path / "a.md")], "evaluation") == ["second", "first"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": 1}', "line 1 has neither"),
        ("x.jsonl", b'{"text": "a"}\n{"messages": [3]}', "line 2 has neither"),
        ("x.jsonl", b"[1", "line 1 is not JSON"),
        ("x.txt", b"\xff\xfe\xff", "not UTF-8"),
        ("x.txt", b" \n ", "no text"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_texts(tmp_path / name)


def test_unknown_sources(tmp_path):
    with pytest.raises(UnknownNameError, match='Did you mean "pydoc"'):
        load_texts("pydocs")
    with pytest.raises(ConfigError, match="does not exist"):
        load_texts(tmp_path / "none.txt")
    with pytest.raises(ConfigError, match="holds no"):
        load_texts(tmp_path)
    with pytest.raises(ConfigError, match='"train" is no split'):
        load_texts("pydoc", "train")


def test_a_large_file_is_cut_at_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "MAX_CHARACTERS", 10)
    (tmp_path / "a.txt").write_text("12345\n6789012345\n")
    with pytest.warns(UserWarning, match="only the first 10"):
        assert load_texts(tmp_path / "a.txt") == ["12345"]


def test_dataloader_and_forward_loop():
    loader = get_dataset_dataloader("pydoc", letters, batch_size=3, num_samples=7, max_sample_length=16, include_labels=True)
    rows = list(loader)
    assert [len(b["input_ids"]) for b in rows] == [3, 3, 1]
    assert torch.equal(rows[0]["labels"], rows[0]["input_ids"]) and rows[0]["attention_mask"].all()
    seen, steps = [], []

    class Model(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            assert not torch.is_grad_enabled()
            seen.append(input_ids)

    loop = create_forward_loop(
        Model(), tokenizer=letters, num_samples=4, max_sample_length=8, progress=lambda d, t, w: steps.append((d, t))
    )
    loop(Model())
    assert len(seen) == 4 and seen[0].shape == (1, 8) and steps[-1] == (4, 4)
    create_forward_loop(dataloader=[(torch.ones(1, 2), None), {"input_ids": torch.ones(1, 2), "attention_mask": None}])(Model())
    assert len(seen) == 6
    with pytest.raises(ConfigError, match="tokenizer"):
        get_dataset_dataloader("pydoc")
