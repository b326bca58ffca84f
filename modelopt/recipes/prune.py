"""One pruning job: a model on disk, what may go, a directory that transformers loads.

Where one config describes the result, plain `from_pretrained` loads it, which is proven here by doing so; where layers differ in
shape, `modelopt.torch.opt.load_pretrained` does. `modelopt.json` in the directory is the whole story.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelopt.core.errors import ExportError
from modelopt.core.logging import Progress, null_progress
from modelopt.evaluate.kl import Comparison, Reference
from modelopt.recipes.load import Evaluation, Text
from modelopt.recipes.run import VERIFY_BYTES, check_apart, check_target, text_windows
from modelopt.recipes.source import Source, compute_device, compute_dtype, load_model, load_tokenizer, open_source, require_plain
from modelopt.torch.export.files import carry_files, staged_directory
from modelopt.torch.opt.huggingface import load_pretrained, save_pretrained
from modelopt.torch.prune.config import StructuredConfig
from modelopt.torch.prune.pruning import prune

NEEDS_DATA = ("activation", "taylor")


@dataclass(frozen=True)
class PruneResult:
    """Where the result is, what was removed (see `prune`), what it cost, and how it was checked."""

    directory: Path
    report: dict[str, Any] = field(repr=False)
    comparison: Comparison | None = None
    verified: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON data."""
        compared = None if self.comparison is None else self.comparison.to_dict()
        return {"directory": str(self.directory), **self.report, "comparison": compared, "read_back": self.verified}


def prune_model(
    model: str,
    out: str | Path,
    fields: Mapping[str, Any],
    *,
    calibration: Text | None = None,
    evaluation: Evaluation | None = None,
    overwrite: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = null_progress,
) -> PruneResult:
    """Prune the causal language model `model` (a directory or an id) and write it to `out`.

    `fields`: those of StructuredConfig. `calibration`: text for criteria that need data. `evaluation`: text on which the result
    is compared with the original. Raises what `prune` raises, ConfigError and CheckpointError; nothing is half written.

    >>> prune_model("./SmolLM2", "./small", {"ratio": {"ffn": 0.25}})                 # doctest: +SKIP
    """
    config = StructuredConfig.parse(dict(fields), "prune")
    target = check_target(out, overwrite)
    source = open_source(model)
    require_plain(source)
    check_apart(target, source)
    where, kind = compute_device(device), compute_dtype(source, dtype)
    tokenizer = None
    if evaluation is not None or config.importance in NEEDS_DATA:
        tokenizer = load_tokenizer(source, trust_remote_code)
    progress(0, 1, "load the model")
    loaded = load_model(source, kind, where, trust_remote_code)
    progress(1, 1, "load the model")
    reference = None
    if evaluation is not None:
        scored = text_windows(tokenizer, evaluation, "evaluation", source)
        reference = Reference(loaded, scored, batch_size=evaluation.batch_size, progress=progress)
    data = _data(source, tokenizer, config, calibration or Text(num_samples=16, length=256), where)
    call = {"input_ids": torch.arange(16, device=where).unsqueeze(0), "use_cache": False}
    progress(0, 1, "prune")
    pruned, report = prune(loaded, [("structured", dict(fields))], {}, call, config=data)
    progress(1, 1, "prune")
    comparison = None if reference is None else reference.compare(pruned, progress=progress, what="pruned")
    verified = _write(pruned, target, source, report, overwrite)
    return PruneResult(target, report, comparison, verified)


def _data(source: Source, tokenizer: Any, config: StructuredConfig, text: Text, where: torch.device) -> dict[str, Any]:
    if config.importance not in NEEDS_DATA:
        return {}
    windows = text_windows(tokenizer, text, "calibration", source).to(where)
    batches = [{"input_ids": ids, "use_cache": False} for ids in windows.split(text.batch_size)]
    return {"forward_loop": batches, "data_loader": [{**b, "labels": b["input_ids"]} for b in batches]}


def _write(model: nn.Module, target: Path, source: Source, report: Mapping[str, Any], overwrite: bool) -> str:
    with staged_directory(target, overwrite) as stage:
        save_pretrained(model, stage, overwrite=True)
        carry_files(source.directory, stage)
        (stage / "pruning.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        if source.num_bytes > VERIFY_BYTES:
            return "not read back: the model is large"
        return _read_back(model, stage, uniform=report["described_by_config"])


@torch.no_grad()
def _read_back(model: Any, stage: Path, uniform: bool) -> str:
    """Load the directory as a user would, and compare the logits with the model's, bit for bit. Raises ExportError."""
    device = next(model.parameters()).device
    ids = torch.arange(24, device=device).reshape(1, 24) % model.get_input_embeddings().num_embeddings
    wanted = model(input_ids=ids, use_cache=False).logits
    loader = type(model).from_pretrained if uniform else load_pretrained
    again = loader(stage, dtype=model.dtype).to(device).eval()
    if not torch.equal(again(input_ids=ids, use_cache=False).logits, wanted):
        raise ExportError("The written model computes other logits than the pruned one. Nothing was kept; please report this.")
    name = "from_pretrained of transformers" if uniform else "modelopt.torch.opt.load_pretrained (its layers differ in shape)"
    return f"equal logits after {name}"
