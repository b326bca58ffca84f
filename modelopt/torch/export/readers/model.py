"""A checkpoint directory back into a model.

mode "dequantized"   a plain model whose weights have the values that the codes stand for
mode "fake"          the same, with input and key-value quantizers that act as in the exported model
mode "packed"        as "fake", with the weights held as codes
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modelopt.core.errors import CheckpointError
from modelopt.numerics import Quantized
from modelopt.numerics.formats import Format
from modelopt.torch.export import huggingface
from modelopt.torch.export.checkpoint import Checkpoint, LayerRecord
from modelopt.torch.export.passes.split_experts import PARTS, joined
from modelopt.torch.export.readers import READERS
from modelopt.torch.export.readers.files import read_json
from modelopt.torch.quantization.conversion import replace_quant_module
from modelopt.torch.quantization.nn.modules.packed import PackedExperts, PackedTensor
from modelopt.torch.quantization.nn.modules.quant_module import QuantizedTensor, QuantModule

Load = Literal["dequantized", "fake", "packed"]


def read(directory: str | Path) -> Checkpoint:
    """Read a directory in any layout that there is a reader for. Raises CheckpointError."""
    directory = Path(directory)
    config = read_json(directory / "config.json")
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise CheckpointError(f"The quantization_config of {directory / 'config.json'} is no JSON object. Fetch it again.")
    method = quantization.get("quant_method")
    if method is None and (directory / "hf_quant_config.json").is_file():
        method = "modelopt"
    if not isinstance(method, str) or method not in READERS:
        raise CheckpointError(f"{directory} has quant_method {method!r}; readers exist for {', '.join(READERS)}.")
    try:
        return READERS.get(method)(directory)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError, re.error) as error:
        if isinstance(error, CheckpointError):
            raise
        # The configuration is a stranger's: anything may stand where a number, a name or a list belongs.
        raise CheckpointError(
            f"The configuration of {directory} contradicts itself or its tensors ({type(error).__name__}: {error}). "
            "Fetch the checkpoint again, or export it anew."
        ) from error


def load(
    path: str | Path, mode: Load = "dequantized", model: nn.Module | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """Return the model of an exported directory.

    Args:
        path: the directory.
        mode: see the module.
        model: an unquantized model to fill (plain modules); None builds the transformers model that config.json names.
        dtype: dtype of the weights; None is the one in config.json.

    Raises CheckpointError for missing or damaged files, and for a checkpoint of another architecture.

    >>> model = load("out", mode="fake")    # doctest: +SKIP
    """
    if mode not in ("dequantized", "fake", "packed"):
        raise CheckpointError(f'There is no mode "{mode}"; use dequantized, fake or packed.')
    checkpoint = read(path)
    dtype = dtype or checkpoint.dtype
    tensors = dense_tensors(checkpoint, dtype)
    if model is None:
        model = huggingface.build(checkpoint.config, tensors, dtype)
    else:
        _fill(model, tensors, _tied(Path(path)))
    if mode != "dequantized":
        attach_quantizers(model, checkpoint, packed=mode == "packed")
    return model


def dense_tensors(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return all tensors under their names in an unquantized checkpoint, packed weights dequantized to `dtype`."""
    tensors = dict(checkpoint.tensors)
    for record in checkpoint.records():
        q = record.quantized()
        if q is not None:
            tensors[f"{record.name}.weight"] = q.dequantize(dtype)
    return tensors


def _tied(path: Path) -> dict[str, str]:
    if not (path / "modelopt.json").is_file():
        return {}
    told = read_json(path / "modelopt.json").get("export")
    return dict(told.get("tied") or {}) if isinstance(told, dict) else {}


def _fill(model: nn.Module, tensors: dict[str, Tensor], tied: dict[str, str]) -> None:
    full = {**tensors, **{name: tensors[first] for name, first in tied.items() if first in tensors}}
    try:
        model.load_state_dict(full, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"The checkpoint does not fit this {type(model).__name__}: {' '.join(str(error).split())}"
        ) from error


def attach_quantizers(model: nn.Module, checkpoint: Checkpoint, packed: bool = False) -> nn.Module:
    """Give a dequantized model the input (and key-value) quantizers of `checkpoint`, in place; optionally pack its weights."""
    replace_quant_module(model)
    targets = layer_targets(model)
    for record in checkpoint.records():
        if record.name not in targets:
            raise CheckpointError(f"The {type(model).__name__} has no layer {record.name}, which the checkpoint quantizes.")
        module, weight = targets[record.name]
        if record.input_format is not None:
            _set(weight.input_quantizer, record.input_format, record.input_scale)
        if record.pre_quant_scale is not None:
            weight.input_quantizer.pre_quant_scale = record.pre_quant_scale
        if packed and weight.expert is None:
            _pack(module, weight, record)
    if packed:
        _pack_experts(targets, checkpoint)
    for kv in checkpoint.kv.values():
        module = model.get_submodule(kv.name)
        if not hasattr(module, "k_bmm_quantizer"):
            raise CheckpointError(f"{kv.name} of {type(model).__name__} has no quantizers for keys and values.")
        _set(module.k_bmm_quantizer, kv.format, kv.k_scale)
        _set(module.v_bmm_quantizer, kv.format, kv.v_scale)
    return model


def layer_targets(model: nn.Module) -> dict[str, tuple[Any, QuantizedTensor]]:
    """Return (module, weight) for each layer name that a checkpoint of this model can have."""
    found: dict[str, tuple[Any, QuantizedTensor]] = {}
    plain: dict[str, tuple[Any, QuantizedTensor]] = {}
    for name, module in model.named_modules():
        fused: dict[str, list[QuantizedTensor]] = {}
        for weight in module.quantized_tensors() if isinstance(module, QuantModule) else ():
            if weight.expert is None:
                plain[name] = (module, weight)
            else:
                fused.setdefault(weight.name, []).append(weight)
        for parameter, members in fused.items():
            names = huggingface.expert_names(model, f"{name}.{parameter}", len(members), PARTS.get(parameter, 1)) or []
            found.update({n: (module, w) for w, pieces in zip(members, names, strict=False) for n in pieces})
    names_on_disk = huggingface.layer_names(model, list(plain))
    return {**found, **{names_on_disk[name]: target for name, target in plain.items()}}


def _set(quantizer: Any, fmt: Format, scale: Tensor | None) -> None:
    quantizer.set_from_cfg(str(fmt))
    if scale is not None:
        quantizer.amax = amax_for(scale.float(), fmt)
    quantizer.enable()


def amax_for(scale: Tensor, fmt: Format) -> Tensor:
    """Return a range whose scale is `scale`: of the neighbours of scale * maximum, the one that divides back exactly."""
    top = fmt.element.max
    if isinstance(fmt.scale, Format):
        top *= {"46": 256.0, "fp8": 1 / fmt.element.max * fmt.scale.element.max}.get(fmt.rule, fmt.scale.element.max)
    guess = scale * top
    up, down = torch.full_like(guess, float("inf")), torch.zeros_like(guess)
    for candidate in (guess, torch.nextafter(guess, up), torch.nextafter(guess, down)):
        if torch.equal(candidate / top, scale):
            return candidate
    return guess


def _pack(module: Any, weight: QuantizedTensor, record: LayerRecord) -> None:
    q = record.quantized()
    if q is not None:
        module.weight_packed = PackedTensor(q.parts, str(q.format), q.shape, q.dtype, weight.transposed)
        del module._parameters["weight"]


def _pack_experts(targets: dict[str, tuple[Any, QuantizedTensor]], checkpoint: Checkpoint) -> None:
    """Pack the fused parameters all of whose matrices the checkpoint has; where scales cannot be shared they stay values."""
    found: dict[tuple[int, str], tuple[Any, QuantizedTensor, list[list[Quantized]]]] = {}
    for name, (module, weight) in targets.items():  # in order: the parts of an expert follow one another
        if weight.expert is not None:
            _, _, experts = found.setdefault((id(module), weight.name), (module, weight, []))
            record = checkpoint.layers.get(name)
            q = None if record is None else record.quantized()
            experts += [[] for _ in range(weight.expert + 1 - len(experts))]
            experts[weight.expert] += [] if q is None else [q]
    for module, weight, experts in found.values():
        whole = [joined(pieces) if len(pieces) == PARTS.get(weight.name, 1) else None for pieces in experts]
        packed = [q for q in whole if q is not None]
        if len(packed) == len(experts) and len({str(q.format) for q in packed}) == 1:
            stored = module._parameters.pop(weight.name).shape
            holders = [PackedTensor(q.parts, str(q.format), q.shape, q.dtype) for q in packed]
            module.add_module(f"{weight.name}_packed", PackedExperts.of(holders, weight.transposed, stored))
