"""From a quantized model to a checkpoint of references; the model is not changed and no weight is copied.

A model is seen through `QuantModule.quantized_tensors()`, its state dict, and the `k_bmm_quantizer` and `v_bmm_quantizer` that
attention modules carry. Weights are quantized later, one at a time, when a writer asks.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelopt.core.errors import ExportError
from modelopt.numerics.formats import Format
from modelopt.numerics.reference import Quantized, compute_scales
from modelopt.torch.export import huggingface
from modelopt.torch.export.checkpoint import Checkpoint, Deferred, KVRecord, LayerRecord
from modelopt.torch.export.passes.split_experts import expert_records
from modelopt.torch.opt import modelopt_state
from modelopt.torch.quantization.nn.modules import QuantModule, SequentialQuantizer, TensorQuantizer
from modelopt.torch.quantization.nn.modules.packed import PackedTensor
from modelopt.torch.quantization.nn.modules.quant_module import QuantizedTensor
from modelopt.torch.quantization.shared_scales import fused_groups

_KV = ("k_bmm_quantizer", "v_bmm_quantizer")


def collect(model: nn.Module, source: str | Path | None = None, cast: torch.dtype | None = None) -> Checkpoint:
    """Return the checkpoint of a quantized model.

    Args:
        model: a model that `quantize` has been applied to.
        source: the directory whose tokenizer and other files and tensors travel along; None takes the one it was loaded from.
        cast: dtype of the tensors that are not quantized; None keeps theirs.

    Raises ExportError for a static input range that was never calibrated.

    >>> checkpoint = collect(model)             # doctest: +SKIP
    >>> [r.name for r in checkpoint.records()]  # doctest: +SKIP
    """
    dtype = cast or model_dtype(model)
    records, consumed, unsupported = _records(model)
    names = huggingface.layer_names(model, [r.name for r in records if r.kind != "expert"])
    layers = {}
    for record in records:
        renamed = LayerRecord(**{**record.__dict__, "name": names.get(record.name, record.name)})
        layers[renamed.name] = renamed
    tensors, tied = _plain_tensors(model, consumed)
    config = huggingface.config_of(model, dtype)
    if tied_head_is_packed(config, layers, tensors):
        config["tie_word_embeddings"] = False
        for name in [n for n in tied if n.rpartition(".")[0] in layers]:  # its bias is then no longer tied either
            tensors[name] = tensors[tied.pop(name)]
    return Checkpoint(
        layers=layers,
        tensors=huggingface.revert_names(model, tensors),
        config=config,
        kv=_kv_records(model),
        history=(modelopt_state(model),),
        shared_inputs=tuple(tuple(names.get(n, n) for n in g) for g in fused_groups(model, [r.name for r in records])),
        unquantized=_unquantized(model, consumed),
        unsupported=tuple(unsupported),
        tied=tied,
        source=Path(source) if source is not None else huggingface.source_of(model),
        dtype=dtype,
        cast=cast,
    )


def model_dtype(model: nn.Module) -> torch.dtype:
    """Return the type of the first floating-point parameter (float32 if there is none)."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def tied_head_is_packed(config: dict[str, Any], layers: dict[str, LayerRecord], tensors: dict[str, Tensor]) -> bool:
    """Return whether the output head became packed codes while the embedding, its twin in memory, stays as it was."""
    kept = {(t.device, t.data_ptr()) for t in tensors.values() if t.device.type != "meta"}
    shared = (r.weight.tensor for r in layers.values() if isinstance(r.weight, Deferred))
    twins = any((t.device, t.data_ptr()) in kept for t in shared)
    return bool(config.get("tie_word_embeddings")) and (twins or any(name.endswith("lm_head") for name in layers))


def _quantizer_prefixes(model: nn.Module) -> tuple[str, ...]:
    kinds = (TensorQuantizer, SequentialQuantizer, PackedTensor)
    return tuple(f"{name}." for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, kinds))


def _records(model: nn.Module) -> tuple[list[LayerRecord], set[str], list[str]]:
    """Return the layer records, the names of the tensors that they stand for, and what has no place in any checkpoint."""
    records: list[LayerRecord] = []
    consumed: set[str] = set()
    unsupported: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, QuantModule):
            continue
        fused: dict[str, list[QuantizedTensor]] = {}
        weights = list(module.quantized_tensors())
        for qt in weights:
            if not (qt.packed is not None or _on(qt.weight_quantizer) or _on(qt.input_quantizer) or _on(qt.output_quantizer)):
                continue
            if qt.expert is not None:
                fused.setdefault(qt.name, []).append(qt)
                continue
            consumed.add(f"{name}.{qt.name}" if name else qt.name)
            records.append(_record(name, module, qt))
        for parameter, members in fused.items():
            consumed.add(f"{name}.{parameter}" if name else parameter)
            records.extend(expert_records(model, name, parameter, members, _record_of_tensor))
        if not weights:
            unsupported += _stray(name, module)
    plain = {r.name for r in records if r.weight is None}
    return records, {c for c in consumed if c.rpartition(".")[0] not in plain}, unsupported


def _stray(name: str, module: nn.Module) -> list[str]:
    children = ((key, child) for key, child in module.named_children() if key not in _KV)
    return [f"{name}.{key}" for key, child in children if isinstance(child, TensorQuantizer | SequentialQuantizer) and _on(child)]


def _on(quantizer: Any) -> bool:
    return quantizer is not None and quantizer.is_enabled


def _record(name: str, module: nn.Module, qt: QuantizedTensor) -> LayerRecord:
    kind = "Linear" if isinstance(module, nn.Linear) else "Embedding" if isinstance(module, nn.Embedding) else ""
    kind = kind if kind and qt.name == "weight" else type(module).__name__.removeprefix("Quant") + f".{qt.name}"
    return _record_of_tensor(name, kind.removesuffix(".weight"), qt, qt.tensor)


def _record_of_tensor(name: str, kind: str, qt: QuantizedTensor, tensor: Tensor) -> LayerRecord:
    note = ""
    weight: Quantized | Deferred | None = None
    fmt: Format | None = None
    quantizer = qt.weight_quantizer
    if qt.packed is not None:
        weight = _from_packed(qt.packed)
        fmt = weight.format
    elif isinstance(quantizer, SequentialQuantizer):
        note = "the weight passes several quantizers in turn" if quantizer.is_enabled else ""
    elif quantizer.is_enabled:
        note = "the weight quantizer rotates" if quantizer.rotation is not None else ""
        fmt = quantizer.format
        text, amax, global_amax, amin = quantizer.op_arguments()
        weight = Deferred(tensor, fmt, amax, global_amax, amin)
    input_format, input_scale, pre = None, None, None
    inputs = qt.input_quantizer
    if inputs is not None:
        if isinstance(inputs, SequentialQuantizer):
            note = note or ("the input passes several quantizers in turn" if inputs.is_enabled else "")
        else:
            pre = inputs.pre_quant_scale
            if inputs.is_enabled:
                input_format, input_scale = inputs.format, range_scale(f"{name}.input_quantizer", inputs)
                odd = inputs.rotation is not None or inputs.bias_value is not None
                note = note or ("the input quantizer rotates or has a bias" if odd else "")
    output = qt.output_quantizer
    out_format = getattr(output, "format", None) if _on(output) else None
    return LayerRecord(name, weight, fmt, input_format, input_scale, out_format, pre, kind, note)


def _from_packed(packed: PackedTensor) -> Quantized:
    from modelopt.numerics.formats import parse

    return Quantized.from_parts(packed.parts, parse(packed.format), torch.Size(packed.shape), packed.dtype)


def range_scale(name: str, quantizer: TensorQuantizer) -> Tensor | None:
    """Return the scalar f32 scale of a static or two-level activation quantizer, None for a dynamic one.

    Raises ExportError, naming the quantizer, if it was never calibrated.
    """
    fmt = quantizer.format
    if fmt is None or not fmt.needs_calibration:
        return None
    if quantizer.amax is None:
        raise ExportError(f"{name} ({fmt}) was never calibrated. Pass a forward_loop to quantize that reaches this layer.")
    if fmt.needs_global:
        top = quantizer.amax if fmt.dynamic else quantizer.global_amax
        top = quantizer.amax.amax() if top is None else top
        return compute_scales(torch.zeros(1, device=top.device), fmt, global_amax=top).stored[-1].reshape(()).float()
    scale = compute_scales(quantizer.amax, fmt).effective
    return scale.reshape(()) if scale.numel() == 1 else scale


def _kv_records(model: nn.Module) -> dict[str, KVRecord]:
    found = {}
    for name, module in model.named_modules():
        pair = [getattr(module, key, None) for key in _KV]
        if not any(isinstance(q, TensorQuantizer) and q.is_enabled for q in pair):
            continue
        k, v = pair
        if not (_on(k) and _on(v)) or k.format != v.format:
            raise ExportError(f"{name}: keys and values must be quantized alike for an engine's cache. Enable both quantizers.")
        found[name] = KVRecord(name, k.format, range_scale(f"{name}.{_KV[0]}", k), range_scale(f"{name}.{_KV[1]}", v))
    return found


def _plain_tensors(model: nn.Module, consumed: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors that stay as they are, each once, and the second names of those that have two."""
    gone, prefixes = set(consumed), _quantizer_prefixes(model)
    seen: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for key, value in model.state_dict().items():
        if key in gone or not isinstance(value, Tensor) or (prefixes and key.startswith(prefixes)):
            continue
        identity = (value.device, value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if value.numel() and value.device.type != "meta" and identity in seen:
            tied[key] = seen[identity]
            continue
        seen[identity] = key
        tensors[key] = value
    return tensors, tied


def _unquantized(model: nn.Module, consumed: set[str]) -> tuple[str, ...]:
    """Return the modules with a matrix for a weight that stay in full precision; embeddings are no matrix product."""
    names = []
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding) and f"{name}.weight" not in consumed:
            names.append(name)
    mapping = huggingface.layer_names(model, names)
    return tuple(mapping[n] for n in names)
