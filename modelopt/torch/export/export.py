"""Write a quantized model as a checkpoint directory that engines load.

collect -> writer -> source's other tensors and files -> modelopt.json -> rename into place
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelopt.core.errors import CheckpointError, ExportError
from modelopt.core.logging import Progress, null_progress, warn
from modelopt.torch.export import huggingface
from modelopt.torch.export.checkpoint import Checkpoint
from modelopt.torch.export.collect import collect
from modelopt.torch.export.files import carry_files, staged_directory, write_json
from modelopt.torch.export.readers.files import Tensors
from modelopt.torch.export.writers import WRITERS
from modelopt.torch.export.writers.base import Writer, producer


def export(
    model: nn.Module | Checkpoint,
    directory: str | Path,
    writer: str = "compressed-tensors",
    source: str | Path | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    max_shard_size: int | str = "10GB",
    dtype: torch.dtype | None = None,
    progress: Progress = null_progress,
) -> Path:
    """Write `model` in the layout of `writer` and return the directory, which is complete or, on any failure, absent.

    Args:
        model: a quantized model, or a checkpoint from `collect` or a reader. It is not changed.
        directory: where to write; refused if it is not empty and `overwrite` is False.
        writer: "compressed-tensors" (vLLM, transformers) or "hf" (NVIDIA's unified layout).
        source: directory of the original model, whose tokenizer and other files and unknown tensors travel along.
        tokenizer: anything with `save_pretrained`, saved into the directory as well.
        dtype: dtype of the tensors that stay unquantized; None keeps theirs.

    Raises ExportError if the layout cannot hold the model (the message names the layer and a writer that can).

    >>> export(model, "out", writer="hf")    # doctest: +SKIP
    """
    checkpoint = model if isinstance(model, Checkpoint) else collect(model, source, dtype)
    chosen: Writer = WRITERS.get(writer)()
    _refuse(chosen, checkpoint)
    if not checkpoint.layers:
        raise ExportError("Nothing in the model is quantized. Call quantize(model, config, forward_loop) first.")
    original = None if checkpoint.source is None else checkpoint.source.resolve()
    if isinstance(model, nn.Module) and original is not None and Path(directory).resolve() in (original, *original.parents):
        raise ExportError(f"{directory} holds the original model, which the export would replace. Choose another directory.")
    with staged_directory(directory, overwrite) as stage:
        extra = unknown_tensors(model, checkpoint) if isinstance(model, nn.Module) else {}
        full = checkpoint.replace(tensors={**checkpoint.tensors, **extra})
        chosen.write(full, stage, max_shard_size, progress)
        if isinstance(model, nn.Module):
            _generation_config(model, stage)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
        if checkpoint.source is not None:
            carry_files(checkpoint.source, stage)
        _compare_keys(full, stage, chosen)
        write_json(stage / "modelopt.json", story(full, chosen))
    return Path(directory)


def _refuse(writer: Writer, checkpoint: Checkpoint) -> None:
    reason = writer.why_not(checkpoint)
    if reason is None:
        return
    able = [name for name in WRITERS if name != writer.name and WRITERS.get(name)().why_not(checkpoint) is None]
    other = (
        f'The writer "{able[0]}" can.'
        if able
        else "No other writer can either; modelopt.torch.opt.save(model, path) keeps it. To export the rest, leave such layers "
        'unquantized: disable_quantizer(model, "*NAME*").'
    )
    raise ExportError(f"The layout {writer.name} cannot hold this model. {reason}. {other}")


def story(checkpoint: Checkpoint, writer: Writer) -> dict[str, Any]:
    """Return modelopt.json: the steps that made the model, and what was exported how."""
    state = dict(checkpoint.history[0]) if checkpoint.history else {}
    layers = {
        r.name: {"weight": str(r.weight_format), "input": None if r.input_format is None else str(r.input_format)}
        for r in checkpoint.records()
    }
    kv = {name: str(r.format) for name, r in checkpoint.kv.items()}
    told = {"writer": writer.name, "producer": producer(), "layers": layers, "kv_cache": kv, "tied": dict(checkpoint.tied)}
    return {**state, "export": told}


def unknown_tensors(model: nn.Module, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return the tensors of the source directory that the model class does not hold (further prediction heads, for instance)."""
    if checkpoint.source is None or not any(checkpoint.source.glob("*.safetensors")):
        return {}
    source = Tensors(checkpoint.source)
    known = {*checkpoint.tensors, *checkpoint.tied, *model.state_dict()}
    modules = set(checkpoint.layers)
    buffers = {name for name, _ in model.named_buffers()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    extra = {}
    for key in source:
        names = {key, key.removeprefix(prefix), prefix + key}
        if names & known or names & buffers or {n.rpartition(".")[0] for n in names} & modules:
            continue
        extra[key] = source[key]
    if extra:
        warn(f"{len(extra)} tensors of {checkpoint.source} that the model does not hold are carried over: {_some(extra)}.")
    return extra


def _some(names: Iterable[str], n: int = 3) -> str:
    listed = list(names)
    return ", ".join(listed[:n]) + (", ..." if len(listed) > n else "")


def _generation_config(model: nn.Module, stage: Path) -> None:
    generation = getattr(model, "generation_config", None)
    if huggingface.is_pretrained(model) and generation is not None:
        generation.save_pretrained(stage)


def _compare_keys(checkpoint: Checkpoint, stage: Path, writer: Writer) -> None:
    """Every tensor of the model must be in the files, as itself or as a packed layer. Raises ExportError."""
    try:
        written = set(Tensors(stage))
    except CheckpointError as error:
        raise ExportError(f"What was written cannot be read back: {error}") from error
    lost = [name for name in checkpoint.tensors if name not in written]
    lost += [name for name in checkpoint.layers if not any(k.startswith(f"{name}.weight") for k in written)]
    if lost:
        raise ExportError(f"{len(lost)} tensors of the model did not reach the files: {_some(lost)}.")


def export_hf_checkpoint(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    export_dir: str | Path = ".",
    save_modelopt_state: bool = False,
    max_shard_size: int | str = "10GB",
    overwrite: bool = False,
    **kwargs: Any,
) -> None:
    """Write NVIDIA's unified Hugging Face checkpoint, as their function of the same name does; see `export`.

    `save_modelopt_state` is accepted and changes nothing: modelopt.json is always written.

    >>> export_hf_checkpoint(model, export_dir="out")    # doctest: +SKIP
    """
    unknown = sorted(set(kwargs) - {"source", "tokenizer", "progress"})
    if unknown:
        raise ExportError(f"export_hf_checkpoint does not know the arguments {unknown}.")
    export(model, export_dir, "hf", overwrite=overwrite, max_shard_size=max_shard_size, dtype=dtype, **kwargs)
