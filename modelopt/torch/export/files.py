"""The files of a source directory that travel along with an export: all but weights and what a writer writes itself."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager
from pathlib import Path

from modelopt.core import files
from modelopt.core.errors import ExportError
from modelopt.core.files import write_json as write_json

# Weights, and what the writers write themselves. Everything else of a source directory is carried over.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
_OWN_FILES = ("config.json", "hf_quant_config.json", "modelopt.json")


def staged_directory(target: str | Path, overwrite: bool = False) -> AbstractContextManager[Path]:
    """Return `core.files.staged_directory`, which replaces an older directory in whole and raises ExportError.

    >>> with staged_directory("out") as d:            # doctest: +SKIP
    ...     (d / "config.json").write_text("{}")
    """
    return files.staged_directory(target, overwrite, error=ExportError)


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
