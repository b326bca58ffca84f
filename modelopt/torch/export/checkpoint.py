"""The packed form of a quantized model that every writer and reader shares.

    Checkpoint = layers (packed weights with their formats) + tensors (everything else) + config + history

Weights that are not packed yet are `Deferred`: a reference to the model's own tensor with its calibrated range. They are
quantized one at a time while a file is written, so that the whole packed model is never in memory beside the original.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelopt.numerics.formats import Format
from modelopt.numerics.reference import Quantized
from modelopt.torch import kernels


@dataclass(frozen=True, eq=False)
class Deferred:
    """A weight [.., N, K] and what is needed to quantize it: `amax` for static ranges, `global_amax` for two-level scales.

    `amin` belongs to formats with a zero point.
    """

    tensor: Tensor
    format: Format
    amax: Tensor | None = None
    global_amax: Tensor | None = None
    amin: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight."""
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weight before quantization."""
        return self.tensor.dtype

    def quantized(self) -> Quantized:
        """Quantize now, in chunks: little more than the codes is allocated."""
        with torch.no_grad():
            weight = self.tensor.detach()
            return kernels.quantized(weight, self.format, amax=self.amax, global_amax=self.global_amax, amin=self.amin)


@dataclass(frozen=True, eq=False)
class LayerRecord:
    """One quantized layer: `name` is its module path in the checkpoint, `<name>.weight` the tensor it replaces.

    `input_scale` is the scalar f32 that multiplies input codes back to values (two-level inputs: the second level), or
    None where the input is not quantized or its range is dynamic. `pre_quant_scale` [K] multiplies the input first.
    """

    name: str
    weight: Quantized | Deferred | None
    weight_format: Format | None
    input_format: Format | None = None
    input_scale: Tensor | None = None
    output_format: Format | None = None
    pre_quant_scale: Tensor | None = None
    kind: str = "Linear"
    note: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight [N, K]."""
        return tuple(self.weight.shape) if self.weight is not None else ()

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weight before quantization."""
        return self.weight.dtype if self.weight is not None else torch.float32

    def quantized(self) -> Quantized | None:
        """Return the packed weight, quantizing it now if that was put off."""
        return self.weight.quantized() if isinstance(self.weight, Deferred) else self.weight


@dataclass(frozen=True, eq=False)
class KVRecord:
    """Quantized keys and values of the attention module `name`; scales are scalar f32, or None where they are dynamic."""

    name: str
    format: Format
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A quantized model as values. `==` compares what a file can hold: packed codes, scales, tensors and formats.

    `unquantized` are matrices left in full precision, `unsupported` quantizers that no file can hold, `tied` second names of
    tensors, `cast` the dtype in which `tensors` are to be written (None: their own), `history` the model's `modelopt_state`.
    """

    layers: Mapping[str, LayerRecord]
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    kv: Mapping[str, KVRecord] = field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()
    shared_inputs: tuple[tuple[str, ...], ...] = ()
    unquantized: tuple[str, ...] = ()
    unsupported: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    source: Path | None = None
    dtype: torch.dtype = torch.float32
    cast: torch.dtype | None = None

    def replace(self, **changes: Any) -> Checkpoint:
        """Return a copy with some fields changed."""
        return replace(self, **changes)

    def map_layers(self, function: Any) -> Checkpoint:
        """Return a copy with `function` applied to every layer record."""
        return self.replace(layers={name: function(record) for name, record in self.layers.items()})

    def records(self) -> Iterator[LayerRecord]:
        """Yield the layer records in order."""
        yield from self.layers.values()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Checkpoint) and not differences(self, other)

    __hash__ = None  # type: ignore[assignment]


def stored_form(fmt: Format | None) -> Format | None:
    """Return what a file says about a weight format: how to decode it, not how its range or scale was chosen."""
    if fmt is None:
        return None
    plain = fmt.scale.with_(rule="", dynamic=False) if isinstance(fmt.scale, Format) else fmt.scale
    return fmt.with_(scale=plain, rule="", dynamic=False)


def differences(one: Checkpoint, two: Checkpoint, ulps: int = 0) -> list[str]:
    """Return where two checkpoints differ, in words; float32 scales may differ by `ulps` units in the last place.

    Block scales and codes must be identical. Histories and source directories are not compared.
    """
    found = [f"layer {n}: only in one of the two" for n in sorted(set(one.layers) ^ set(two.layers))]
    found += [f"tensor {n}: only in one of the two" for n in sorted(set(one.tensors) ^ set(two.tensors))]
    found += [f"KV cache of {n}: only in one of the two" for n in sorted(set(one.kv) ^ set(two.kv))]
    for name in sorted(set(one.tensors) & set(two.tensors)):
        found += _tensor_difference(f"tensor {name}", one.tensors[name], two.tensors[name], 0)
    for name in sorted(set(one.layers) & set(two.layers)):
        found += _layer_differences(one.layers[name], two.layers[name], ulps)
    for name in sorted(set(one.kv) & set(two.kv)):
        a, b = one.kv[name], two.kv[name]
        if stored_form(a.format) != stored_form(b.format):
            found.append(f"KV cache of {name}: format {a.format} and {b.format}")
        found += _tensor_difference(f"{name}.k_scale", a.k_scale, b.k_scale, ulps)
        found += _tensor_difference(f"{name}.v_scale", a.v_scale, b.v_scale, ulps)
    if dict(one.config) != dict(two.config):
        found.append("the model configurations differ")
    return found


def _layer_differences(a: LayerRecord, b: LayerRecord, ulps: int) -> list[str]:
    found = []
    if stored_form(a.weight_format) != stored_form(b.weight_format):
        found.append(f"{a.name}: weight format {a.weight_format} and {b.weight_format}")
    if a.input_format != b.input_format:
        found.append(f"{a.name}: input format {a.input_format} and {b.input_format}")
    found += _tensor_difference(f"{a.name} input scale", a.input_scale, b.input_scale, ulps)
    found += _tensor_difference(f"{a.name} pre-quant scale", a.pre_quant_scale, b.pre_quant_scale, 0)
    x, y = a.quantized(), b.quantized()
    if x is None or y is None:
        return found + ([f"{a.name}: only one has a weight"] if (x is None) != (y is None) else [])
    if tuple(x.shape) != tuple(y.shape):
        return found + [f"{a.name}: shape {tuple(x.shape)} and {tuple(y.shape)}"]
    found += _tensor_difference(f"{a.name} codes", x.codes, y.codes, 0)
    found += _tensor_difference(f"{a.name} zero points", x.zero, y.zero, 0)
    for level, (s, t) in enumerate(zip(x.scales, y.scales, strict=False)):
        found += _tensor_difference(f"{a.name} scale level {level + 1}", s, t, ulps if level else 0)
    return found


def _tensor_difference(what: str, a: Tensor | None, b: Tensor | None, ulps: int) -> list[str]:
    if a is None or b is None:
        return [] if a is b else [f"{what}: only in one of the two"]
    if a.dtype != b.dtype or a.shape != b.shape:
        return [f"{what}: {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"]
    x, y = (t.detach().cpu().contiguous().reshape(-1) for t in (a, b))
    if ulps and x.dtype == torch.float32:
        distance = (x.view(torch.int32).to(torch.int64) - y.view(torch.int32).to(torch.int64)).abs()
        worst = int(distance.max()) if distance.numel() else 0
        return [f"{what}: {worst} units in the last place apart"] if worst > ulps else []
    return [] if torch.equal(x.view(torch.uint8), y.view(torch.uint8)) else [f"{what}: values differ"]
