"""Directories and files that appear whole or not at all.

What is written goes to a hidden sibling `.<name>.<random>.partial` on the same file system, which is renamed into place at the
end (rename(2) is atomic). Any exception, Ctrl-C included, removes the sibling.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelopt.core.errors import CheckpointError, ModelOptError


@contextmanager
def staged_directory(
    path: str | Path,
    overwrite: bool = False,
    own: Collection[str] = (),
    last: str | None = None,
    error: type[ModelOptError] = CheckpointError,
) -> Iterator[Path]:
    """Yield an empty directory that becomes `path` when the block ends without an exception.

    A directory that is empty, or holds nothing but files named in `own`, is replaced. Any other one is refused unless
    `overwrite`, and is then replaced in whole; with `last`, the new files replace those of the same name instead and the rest
    stays: the file `last` goes first and comes last, so that an interrupted merge is seen as incomplete.

    Raises `error` for a directory that is refused, and for anything that the file system refuses.

    >>> with staged_directory("out") as stage:            # doctest: +SKIP
    ...     (stage / "config.json").write_text("{}")
    """
    target = Path(os.path.abspath(path))
    if target.exists() and not target.is_dir():
        raise error(f"{path} is a file, and a directory is to be written there. Choose another path.")
    names = set(os.listdir(target)) if target.is_dir() else set()
    if not (names <= set(own) or overwrite):
        shown = ", ".join(sorted(names)[:3])
        raise error(f"The directory {path} is not empty ({shown}). Choose another one, or pass overwrite=True to replace it.")
    if not names <= set(own) and last is None and (target == Path.cwd() or target in Path.cwd().parents):
        raise error(f"{path} holds the current directory, which is not replaced. Choose a directory for the model alone.")
    stage = _sibling(target, "partial")
    try:
        stage.mkdir(parents=True)
        yield stage
        if names <= set(own) or last is None:
            _swap(stage, target)
        else:
            _merge(stage, target, last)
    except OSError as failure:
        what = f"{failure.strerror or failure}. Nothing was left behind"
        raise error(f"{path} could not be written: {what}. Free the cause, or choose another path.") from failure
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _sibling(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.{suffix}")


def _swap(stage: Path, target: Path) -> None:
    """Put `stage` in the place of `target`; an older `target` disappears only after the new one stands."""
    if not target.exists():
        os.rename(stage, target)
        return
    old = _sibling(target, "replaced")
    os.rename(target, old)
    try:
        os.rename(stage, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _merge(stage: Path, target: Path, last: str) -> None:
    (target / last).unlink(missing_ok=True)
    for name in sorted(os.listdir(stage), key=lambda n: n == last):
        os.replace(stage / name, target / name)


@contextmanager
def staged_file(path: str | Path, overwrite: bool = False, error: type[ModelOptError] = CheckpointError) -> Iterator[Path]:
    """Yield the path of a temporary sibling, which becomes the file `path` when the block ends without an exception."""
    target = Path(os.path.abspath(path))
    if target.exists() and not overwrite:
        raise error(f"{path} exists. Choose another path, or pass overwrite=True.")
    stage = _sibling(target, "partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield stage
        os.replace(stage, target)
    except OSError as failure:
        what = failure.strerror or failure
        raise error(f"{path} could not be written: {what}. Free the cause, or choose another path.") from failure
    finally:
        stage.unlink(missing_ok=True)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON with a final newline; NaN and infinities are refused, as JSON has none."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
