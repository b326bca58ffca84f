"""A quantized directory against the original that it was made from, on text that calibration did not see."""

from __future__ import annotations

import gc
from pathlib import Path

from modelopt.core.logging import Progress, null_progress
from modelopt.evaluate.kl import Comparison, Reference
from modelopt.recipes.load import Text
from modelopt.recipes.run import text_windows
from modelopt.recipes.source import (
    check_directory,
    compute_device,
    compute_dtype,
    load_any,
    load_model,
    load_tokenizer,
    open_source,
    require_same_architecture,
)


def compare_directories(
    directory: str | Path,
    original: str,
    text: Text,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = null_progress,
) -> Comparison:
    """Load the original, keep what is needed of it, free it, load the quantized model, and compare.

    Raises CheckpointError for a directory that is missing, damaged or of another architecture, ConfigError for too little text.

    >>> compare_directories("out", "org/model", Text()).kl                          # doctest: +SKIP
    """
    path = check_directory(str(directory))
    source = open_source(original)
    require_same_architecture(path, source.directory)
    where, kind = compute_device(device), compute_dtype(source, dtype)
    windows = text_windows(load_tokenizer(source, trust_remote_code), text, "evaluation", source)
    progress(0, 2, "load the models")
    model = load_model(source, kind, where, trust_remote_code)
    progress(1, 2, "load the models")
    reference = Reference(model, windows, batch_size=text.batch_size, progress=progress)
    del model
    gc.collect()
    candidate = load_any(path, kind, trust_remote_code).to(where)
    progress(2, 2, "load the models")
    return reference.compare(candidate, progress=progress, what="quantized")
