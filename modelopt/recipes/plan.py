"""The plan of a job: what quantization would do and what the result would weigh, without loading weights.

    config.json -> model on the meta device -> the real conversion and rules -> the real collector and writer, on meta tensors

The bytes are those of the tensors that the writer makes, so the plan is what `run` does. Peak memory is an estimate:

    model + 10 % + the most of: the largest quantized weight in float32, twice; the largest tensor; logits of one batch
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelopt.core.errors import ConfigError
from modelopt.recipes.load import Recipe
from modelopt.recipes.source import Source, compute_dtype, meta_model, open_source, require_plain
from modelopt.recipes.steps import resolve_steps
from modelopt.torch import kernels
from modelopt.torch.export.checkpoint import Checkpoint, Deferred, LayerRecord
from modelopt.torch.export.collect import collect
from modelopt.torch.export.writers import WRITERS
from modelopt.torch.opt.files import DTYPE_NAMES
from modelopt.torch.opt.mode import record
from modelopt.torch.quantization.config import QuantizeConfig
from modelopt.torch.quantization.conversion import configure, decide, named_quantizers, plan, replace_quant_module
from modelopt.torch.quantization.mode import QuantizeMode
from modelopt.torch.quantization.presets import STANDARD_PATTERNS
from modelopt.torch.quantization.summary import Coverage, coverage
from modelopt.torch.quantization.validate import check

AUTO = ("hf", "compressed-tensors")
OWN_LAYOUT = "modelopt"


@dataclass(frozen=True)
class Row:
    """One tensor of the model: what becomes of it, why, and its bytes before and after."""

    name: str
    shape: tuple[int, ...]
    format: str
    input_format: str
    before: int
    after: int
    why: str


@dataclass(frozen=True)
class Plan:
    """What a job would do. Bytes are those of the safetensors files; `refused` is what the layout cannot hold, and why."""

    model: str
    layout: str
    rows: tuple[Row, ...]
    refused: tuple[tuple[str, str], ...]
    source_bytes: int
    num_bytes: int
    bits_per_weight: float
    bits_per_parameter: float
    peak_bytes: int
    coverage: float
    left: tuple[tuple[str, int, str], ...]
    excluded_by_default: tuple[tuple[str, int, str], ...]
    excluded_by_user: tuple[tuple[str, int, str], ...]
    kv_cache: str
    needs_data: bool

    @property
    def quantized(self) -> tuple[Row, ...]:
        """The rows of the tensors that are quantized."""
        return tuple(r for r in self.rows if r.format)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data."""
        return asdict(self)


@dataclass(frozen=True)
class Sizes:
    """Bytes of the safetensors files of a checkpoint in a layout; of each layer; weights in quantized layers and their bytes."""

    num_bytes: int
    layers: dict[str, int]
    num_weights: int
    weight_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, scales included, for each quantized weight."""
        return 8 * self.weight_bytes / self.num_weights if self.num_weights else 0.0


def plan_model(recipe: Recipe, trust_remote_code: bool = False) -> Plan:
    """Return the plan of a recipe. Raises what `run_recipe` would raise before it loads weights.

    >>> plan_model(parse_recipe({"model": "out/smollm2", "steps": [{"mode": "quantize", "config": "nvfp4"}]}))   # doctest: +SKIP
    """
    if recipe.model is None:
        raise ConfigError("The recipe names no model. Add the key model, or pass --model.")
    source = open_source(recipe.model)
    require_plain(source)
    return plan_source(source, recipe, trust_remote_code)


def plan_source(source: Source, recipe: Recipe, trust_remote_code: bool = False) -> Plan:
    """Return the plan of a recipe for an opened checkpoint."""
    configs = [config for mode, config in resolve_steps(recipe) if mode == "quantize"]
    if len(configs) != 1:
        raise ConfigError(f"The recipe has {len(configs)} quantize steps; a plan needs exactly one.")
    config = QuantizeConfig.parse(configs[0])
    model = meta_model(source, compute_dtype(source, recipe.dtype), trust_remote_code)
    loaded = sum(t.nbytes for t in _tensors(model))
    before = {name: p.nbytes for name, p in model.named_parameters()}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    needs_data = quantize_structure(model, config)
    checkpoint = _untied(model, collect(model, source.directory))
    carried = _carried(source, model, checkpoint)
    layout, refused = choose_layout(checkpoint, recipe.export.layout)
    sizes = measure(checkpoint, layout, carried)
    covered = coverage(model, threshold=0.0)
    why = {w.name: w.reason for w in (*covered.left, *covered.excluded)}
    rows = [*_layer_rows(checkpoint, sizes), *_plain_rows(checkpoint, before, shapes, why)]
    default, user = _by_origin(covered)
    kv = sorted({str(r.format) for r in checkpoint.kv.values()})
    return Plan(
        model=source.name,
        layout=layout,
        rows=tuple(sorted(rows, key=lambda r: _natural(r.name))),
        refused=tuple(refused),
        source_bytes=source.num_bytes,
        num_bytes=sizes.num_bytes,
        bits_per_weight=sizes.bits_per_weight,
        bits_per_parameter=8 * sizes.num_bytes / max(sum(p.numel() for p in model.parameters()), 1),
        peak_bytes=_peak(loaded, checkpoint, recipe, source, needs_data),
        coverage=covered.share,
        left=_triples(covered.left),
        excluded_by_default=default,
        excluded_by_user=user,
        kv_cache=f"{', '.join(kv)} in {len(checkpoint.kv)} attention layers" if kv else "",
        needs_data=needs_data,
    )


def quantize_structure(model: nn.Module, config: QuantizeConfig) -> bool:
    """Quantize a model on the meta device, in place: the real rules and conversion, and ranges without values.

    Returns whether calibration would need data.
    """
    planned = plan(model)
    decisions = decide(planned, config)
    check(planned, decisions, config, has_data=True)
    replace_quant_module(model)
    configure(model, decisions)
    needs_data = False
    for name, quantizer in named_quantizers(model):
        for leaf in quantizer if isinstance(quantizer, nn.Sequential) else [quantizer]:
            if leaf.is_enabled and leaf.amax is None and "weight_quantizer" not in name and leaf.format.needs_calibration:
                leaf.amax = torch.empty((), device="meta")
                needs_data = True
    record(model, model, QuantizeMode(), config)
    return needs_data


def choose_layout(checkpoint: Checkpoint, wanted: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the layout to write and what it refuses: `auto` is the first of `AUTO` that refuses nothing."""
    if wanted == OWN_LAYOUT:
        return OWN_LAYOUT, []
    refused = {name: refusals(checkpoint, name) for name in (AUTO if wanted == "auto" else (wanted,))}
    best = min(refused, key=lambda name: len(refused[name]))
    return best, refused[best]


def refusals(checkpoint: Checkpoint, layout: str) -> list[tuple[str, str]]:
    """Return (name, reason) of every layer and cache that a layout has no place for. Raises UnknownNameError."""
    writer = WRITERS.get(layout)()
    found = [(r.name, reason) for r in checkpoint.records() if (reason := writer.why_not_layer(r)) is not None]
    found += [(r.name, reason) for r in checkpoint.kv.values() if (reason := writer.why_not_kv(r)) is not None]
    found += [(name, "no file can hold this quantizer") for name in checkpoint.unsupported]
    if not found and (reason := writer.why_not(checkpoint)) is not None:
        found.append(("model", reason))
    return found


def measure(checkpoint: Checkpoint, layout: str, carried: dict[str, tuple[tuple[int, ...], str, int]] | None = None) -> Sizes:
    """Return the bytes that `layout` would write: the writer's own tensors, on the meta device, and the header of the file.

    For a layer that the layout refuses, and for the layout "modelopt", the packed form itself counts.
    """
    writer = None if layout == OWN_LAYOUT else WRITERS.get(layout)()
    header: dict[str, tuple[str, list[int], int]] = {}
    layers: dict[str, int] = {}
    weights = weight_bytes = 0
    for one in checkpoint.records():
        tensors = _encoded(one, writer)
        for key, t in tensors.items():
            header[f"{one.name}.{key}"] = (DTYPE_NAMES.get(t.dtype, "U8"), list(t.shape), t.nbytes)
        layers[one.name] = sum(t.nbytes for t in tensors.values())
        weights += math.prod(one.shape)
        weight_bytes += layers[one.name]
    if writer is not None:
        for kv in checkpoint.kv.values():
            if writer.why_not_kv(kv) is None:
                for name, t in writer.encode_kv(kv, checkpoint).items():
                    header[name] = (DTYPE_NAMES[t.dtype], list(t.shape), t.nbytes)
    for name, t in checkpoint.tensors.items():
        header[name] = (DTYPE_NAMES.get(t.dtype, "U8"), list(t.shape), t.nbytes)
    for name, (shape, dtype, nbytes) in (carried or {}).items():
        header[name] = (dtype, list(shape), nbytes)
    total = sum(nbytes for _, _, nbytes in header.values())
    return Sizes(total + _header_bytes(header), layers, weights, weight_bytes)


def _encoded(one: LayerRecord, writer: Any) -> dict[str, Tensor]:
    """Return the tensors of one layer as the writer would store them, without values."""
    weight = one.weight
    if weight is None:
        return {}
    if isinstance(weight, Deferred):
        empty = torch.empty_like(weight.tensor, device="meta")
        ranges = [
            None if t is None else torch.empty_like(t, device="meta") for t in (weight.amax, weight.global_amax, weight.amin)
        ]
        weight = kernels.quantized(empty, weight.format, *ranges)
    scale = None if one.input_scale is None else torch.empty_like(one.input_scale, device="meta")
    bare = LayerRecord(**{**one.__dict__, "weight": weight, "input_scale": scale})
    if writer is not None and writer.why_not_layer(one) is None:
        return writer.encode(bare, writer.prepare(bare, weight))
    parts = {"codes": weight.codes, **{f"scale_{i}": s for i, s in enumerate(weight.scales)}}
    return parts if weight.zero is None else {**parts, "zero": weight.zero}


def _header_bytes(tensors: dict[str, tuple[str, list[int], int]]) -> int:
    """Return the bytes of the header of a safetensors file with these tensors."""
    data: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        data[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    return 8 + len(json.dumps(data, separators=(",", ":")).encode()) + 7


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _untied(model: nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """Drop the second names of parameters that a model shares: on the meta device, memory does not tell them."""
    first = {id(p): name for name, p in model.named_parameters()}
    second = {name for name, p in model.named_parameters(remove_duplicate=False) if first[id(p)] != name}
    kept = {first[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if name in second} & set(
        checkpoint.tensors
    )
    gone = second if kept else set()
    return checkpoint.replace(tensors={k: v for k, v in checkpoint.tensors.items() if k not in gone})


def _carried(source: Source, model: nn.Module, checkpoint: Checkpoint) -> dict[str, tuple[tuple[int, ...], str, int]]:
    """Return the tensors of the source that the model class does not hold and that travel along."""
    known = {*checkpoint.tensors, *checkpoint.tied, *model.state_dict(), *(n for n, _ in model.named_buffers())}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found = {}
    for key, value in source.tensors.items():
        names = {key, key.removeprefix(prefix), prefix + key}
        if not names & known and not {n.rpartition(".")[0] for n in names} & set(checkpoint.layers):
            found[key] = value
    return found


def _layer_rows(checkpoint: Checkpoint, sizes: Sizes) -> list[Row]:
    rows = []
    for one in checkpoint.records():
        before = one.dtype.itemsize * math.prod(one.shape)
        inputs = "" if one.input_format is None else str(one.input_format)
        rows.append(Row(f"{one.name}.weight", one.shape, str(one.weight_format), inputs, before, sizes.layers[one.name], ""))
    return rows


def _plain_rows(
    checkpoint: Checkpoint, before: dict[str, int], shapes: dict[str, tuple[int, ...]], why: dict[str, str]
) -> list[Row]:
    rows = []
    for name, tensor in checkpoint.tensors.items():
        reason = why.get(name) or (
            "embeddings are quantized only on request" if "embed" in name else "no Linear or expert weight"
        )
        rows.append(
            Row(name, shapes.get(name, tuple(tensor.shape)), "", "", before.get(name, tensor.nbytes), tensor.nbytes, reason)
        )
    return rows


def _triples(weights: Any) -> tuple[tuple[str, int, str], ...]:
    return tuple((w.name, w.nbytes, w.reason) for w in weights)


def _by_origin(covered: Coverage) -> tuple[tuple[tuple[str, int, str], ...], tuple[tuple[str, int, str], ...]]:
    """Split what rules exclude into what the presets exclude by themselves and what the user excludes."""
    standard = {f'rule "{p}"' for p in STANDARD_PATTERNS}
    default = [w for w in covered.excluded if w.reason in standard or ": " in w.reason]
    user = [w for w in covered.excluded if w not in default]
    return _triples(default), _triples(user)


def _peak(loaded: int, checkpoint: Checkpoint, recipe: Recipe, source: Source, needs_data: bool) -> int:
    quantized = max((math.prod(one.shape) for one in checkpoint.records()), default=0)
    largest = max((t.numel() for t in checkpoint.tensors.values()), default=0)
    text = recipe.calibration
    logits = text.batch_size * text.length * int(source.config.get("vocab_size") or 0) if needs_data else 0
    return int(1.1 * loaded) + 4 * max(2 * quantized, largest, logits)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
