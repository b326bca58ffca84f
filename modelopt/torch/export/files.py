"""Output directories that are either complete or absent, and the files of a source directory that travel along.

A directory is written as a hidden sibling `.<name>.<random>.partial` on the same file system and renamed into place at
the end (rename(2) is atomic). Any exception, Ctrl-C included, removes the sibling.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from modelopt.core.errors import ExportError

# Weights, and what the writers write themselves. Everything else of a source directory is carried over.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
_OWN_FILES = ("config.json", "hf_quant_config.json", "modelopt.json")


@contextlib.contextmanager
def staged_directory(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty directory that becomes `target` when the block ends without an exception.

    Raises ExportError if `target` is a file, or a directory that is not empty and `overwrite` is False.

    >>> with staged_directory("out") as d:            # doctest: +SKIP
    ...     (d / "config.json").write_text("{}")
    """
    target = Path(os.path.abspath(target))
    if target.exists() and not target.is_dir():
        raise ExportError(f"{target} is a file; an export needs a directory. Choose another path.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ExportError(f"The directory {target} is not empty. Choose another one, or pass overwrite=True to replace it.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise ExportError(f"Nothing can be written beside {target}: {error.strerror or error}.") from error
    try:
        stage.chmod(0o755)  # mkdtemp makes it private
        yield stage
        _swap(stage, target)
    except OSError as error:
        raise ExportError(f"The export to {target} failed and left nothing behind: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _swap(stage: Path, target: Path) -> None:
    """Put `stage` in the place of `target`; an older `target` disappears only after the new one stands."""
    if not target.exists():
        stage.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".replaced", dir=target.parent))
    try:
        target.rename(old / target.name)
        try:
            stage.rename(target)
        except BaseException:
            (old / target.name).rename(target)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON with a final newline; NaN and infinities are refused, as JSON has none."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def is_weight_file(name: str) -> bool:
    """Return whether a file of a checkpoint directory holds weights, or is the index of such files."""
    return name.endswith(_WEIGHT_SUFFIXES) or name.endswith((".safetensors.index.json", ".bin.index.json"))


def carry_files(source: Path, target: Path) -> list[str]:
    """Copy the files of `source` that hold no weights and that `target` lacks (tokenizer, templates, code, licence).

    Sub-directories travel too, unless hidden. Links that lead out of `source` are left out. Returns the relative names.
    """
    root = source.resolve()
    carried = []
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        name = relative.as_posix()
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or not path.is_file() or is_weight_file(path.name) or name in _OWN_FILES or (target / relative).exists():
            continue
        # The Hub's cache stores every file of a snapshot as a link to ../../blobs: a file linked directly in `source`
        # is meant; a link below it that climbs out is not ours to read.
        if len(relative.parts) > 1 and root not in path.resolve().parents:
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / relative)
        carried.append(name)
    return carried
