"""Text to token windows: calibration and evaluation data that is at hand offline and is the same on every run.

    windows = token_windows(tokenizer, load_texts("pydoc", "evaluation"), num_samples=8, length=512)      # int64 [8, 512]

Sources: `"pydoc"` (the language reference inside the standard library, `pydoc_data.topics`), text files, directories of
`.txt`/`.md` files, and `.jsonl` files with a `"text"` or `"messages"` field. Nothing is ever fetched from a network.

Split of a named source: a topic belongs to calibration where the first byte of SHA-256(topic name) is even, else to
evaluation. Topics quote one another, so a paragraph counts once, and one that calibration has is left out of evaluation:
the two splits share no paragraph. Files of the user are not split: all of their text serves the split that was asked for.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from modelopt.core.errors import ConfigError, UnknownNameError
from modelopt.core.logging import Progress, null_progress, warn
from modelopt.core.registry import Registry

SPLITS = ("calibration", "evaluation")
SUFFIXES = (".txt", ".md", ".rst", ".jsonl")
MAX_CHARACTERS = 64 * 1024 * 1024

SOURCES: Registry[Callable[[str], list[str]]] = Registry("text source", pydoc="modelopt.torch.utils.dataset:pydoc_texts")


class Tokenizer(Protocol):
    """What is asked of a tokenizer; those of transformers have it."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, Any]: ...


def load_texts(source: str | Path | Iterable[str | Path], split: str = "calibration") -> list[str]:
    """Return the texts of a source: a name in `SOURCES`, a file, a directory, or a list of these.

    Raises ConfigError for a missing, unreadable or empty file and UnknownNameError for a name that is neither source nor path.

    >>> len(load_texts("pydoc", "evaluation")) > 10
    True
    """
    if split not in SPLITS:
        raise ConfigError(f'"{split}" is no split. Choose "calibration" or "evaluation".')
    if not isinstance(source, str | Path):
        return [text for one in source for text in load_texts(one, split)]
    if isinstance(source, str) and source in SOURCES:
        return SOURCES.get(source)(split)
    path = Path(source)
    if path.is_dir():
        return _read_directory(path)
    if path.is_file():
        return _read_file(path)
    if len(path.parts) > 1 or path.suffix:
        raise ConfigError(f"The text file {path} does not exist. Give a file, a directory or one of: {', '.join(SOURCES)}.")
    unknown = SOURCES.unknown(str(source))
    raise UnknownNameError(f"{unknown} A file or directory of text serves too; nothing is downloaded.")


def token_windows(
    tokenizer: Tokenizer, texts: Iterable[str], num_samples: int, length: int, *, seed: int | None = None
) -> Tensor:
    """Cut texts into `num_samples` windows of `length` tokens, int64 [num_samples, length], at an even stride over all of them.

    No padding and no special tokens; windows do not overlap. `seed` moves all windows together within the slack of
    the stride (None: the first window starts at the first token). Raises ConfigError if there is too little text.
    """
    if num_samples < 1 or length < 2:
        raise ConfigError(f"num_samples={num_samples} and length={length}: at least 1 window of 2 tokens is needed.")
    # A tokenizer of transformers would warn that a whole text is longer than the model's context.
    quiet: dict[str, Any] = {"verbose": False} if hasattr(tokenizer, "model_max_length") else {}
    parts = [tokenizer(text, add_special_tokens=False, **quiet)["input_ids"] for text in texts if text]
    ids = torch.tensor([token for part in parts for token in part], dtype=torch.int64)
    wanted = num_samples * length
    if ids.numel() < wanted:
        raise ConfigError(
            f"Too little text: {len(parts)} texts hold {ids.numel()} tokens; {num_samples} windows of {length} need {wanted}. "
            f"Give more text, or ask for at most {ids.numel() // length} windows of {length}."
        )
    stride = ids.numel() // num_samples
    slack = stride - length
    shift = 0 if seed is None else int(torch.randint(slack + 1, (), generator=torch.Generator().manual_seed(seed)))
    return ids.as_strided((num_samples, length), (stride, 1), shift).clone()


def batches(windows: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Yield the rows of `windows` [n, length] in order, `batch_size` at a time; the last batch may be smaller."""
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: at least 1 is needed.")
    yield from windows.split(batch_size)


def get_dataset_dataloader(
    dataset_name: str | Path | Iterable[str | Path] = "pydoc",
    tokenizer: Tokenizer | None = None,
    batch_size: int = 1,
    num_samples: int = 64,
    max_sample_length: int = 512,
    device: torch.device | str | None = None,
    include_labels: bool = False,
    split: str = "calibration",
) -> DataLoader[dict[str, Tensor]]:
    """Return a loader of dicts with `input_ids` and `attention_mask` (all ones), int64 [batch_size, max_sample_length].

    `dataset_name` is any source of `load_texts`. With `include_labels`, `labels` repeats `input_ids`.
    """
    if tokenizer is None:
        raise ConfigError("A tokenizer is needed to turn text into tokens: pass tokenizer=...")
    windows = token_windows(tokenizer, load_texts(dataset_name, split), num_samples, max_sample_length)

    def collate(rows: list[Tensor]) -> dict[str, Tensor]:
        ids = torch.stack(rows).to(device or "cpu")
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return {**batch, "labels": ids.clone()} if include_labels else batch

    return DataLoader(windows, batch_size=batch_size, collate_fn=collate)  # type: ignore[arg-type]


def create_forward_loop(
    model: nn.Module | None = None,
    dataset_name: str | Path | Iterable[str | Path] = "pydoc",
    tokenizer: Tokenizer | None = None,
    batch_size: int = 1,
    num_samples: int = 64,
    max_sample_length: int = 512,
    device: torch.device | str | None = None,
    include_labels: bool = False,
    dataloader: Iterable[Any] | None = None,
    progress: Progress = null_progress,
) -> Callable[[nn.Module], None]:
    """Return `forward_loop(model)`, which runs a model over calibration data without gradients.

    The data are those of `get_dataset_dataloader`, or any `dataloader` of dicts, tuples or tensors.
    `model` only serves to find the device.
    """
    if device is None and model is not None:
        device = next((p.device for p in model.parameters()), None)
    if dataloader is None:
        dataloader = get_dataset_dataloader(
            dataset_name, tokenizer, batch_size, num_samples, max_sample_length, device, include_labels
        )
    data = dataloader

    def forward_loop(model: nn.Module) -> None:
        total = len(data) if hasattr(data, "__len__") else None  # type: ignore[arg-type]
        with torch.no_grad():
            for done, batch in enumerate(data):
                progress(done, total, "calibrate")
                if isinstance(batch, Mapping):
                    model(**batch)
                elif isinstance(batch, tuple | list):
                    model(*batch)
                else:
                    model(batch)
        progress(total or 0, total, "calibrate")

    return forward_loop


def pydoc_texts(split: str) -> list[str]:
    """Return the topics of Python's language reference that belong to `split`, without repeated paragraphs."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    seen: set[str] = set()
    chosen: dict[str, list[str]] = {"calibration": [], "evaluation": []}
    for half in SPLITS:  # calibration first: what it has, evaluation leaves out
        for name in sorted(topics):
            if _half(name) != half:
                continue
            kept = []
            for paragraph in topics[name].split("\n\n"):
                key = " ".join(paragraph.split())
                if key and key not in seen:
                    seen.add(key)
                    kept.append(paragraph.strip("\n"))
            if kept:
                chosen[half].append("\n\n".join(kept) + "\n\n")
    return chosen[split]


def _half(topic: str) -> str:
    return SPLITS[hashlib.sha256(topic.encode()).digest()[0] % 2]


def _read_directory(path: Path) -> list[str]:
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in SUFFIXES)
    if not files:
        raise ConfigError(f"The directory {path} holds no {', '.join(SUFFIXES)} file.")
    texts: list[str] = []
    size = 0
    for file in files:
        if size >= MAX_CHARACTERS:
            warn(f"{path}: text after the first {MAX_CHARACTERS} characters was not read (from {file.name} on).")
            break
        texts += _read_file(file)
        size = sum(map(len, texts))
    return texts


def _read_file(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8") as stream:
            text = stream.read(MAX_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}.") from error
    if len(text) > MAX_CHARACTERS:
        warn(f"{path}: only the first {MAX_CHARACTERS} characters were read.")
        text = text[:MAX_CHARACTERS].rpartition("\n")[0] or text[:MAX_CHARACTERS]
    texts = _jsonl_texts(path, text) if path.suffix.lower() == ".jsonl" else [text]
    if not any(t.strip() for t in texts):
        raise ConfigError(f"{path} holds no text.")
    return texts


def _jsonl_texts(path: Path, text: str) -> list[str]:
    texts = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"{path}, line {number} is not JSON: {error}") from error
        texts.append(_row_text(row, f"{path}, line {number}"))
    return texts


def _row_text(row: Any, where: str) -> str:
    """Return the text of one JSON line: `"text"`, or the contents of `"messages"` one after the other."""
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row["text"]
    messages = row.get("messages") if isinstance(row, dict) else None
    contents = [m.get("content") if isinstance(m, dict) else None for m in messages] if isinstance(messages, list) else [None]
    if not all(isinstance(c, str) for c in contents):
        keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise ConfigError(f'{where} has neither "text" nor "messages" with a text "content" (it has: {keys}).')
    return "\n\n".join(str(c) for c in contents)
