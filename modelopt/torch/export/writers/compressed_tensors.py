"""Writer for the compressed-tensors layout, which vLLM and transformers load.

| format               | tensors below the module                                                                          |
|----------------------|---------------------------------------------------------------------------------------------------|
| int-quantized        | weight i8 [N,K], weight_scale [N,1]                                                               |
| float-quantized      | weight e4m3 [N,K], weight_scale [1] / [N,1] / [N/r,K/c]                                           |
| pack-quantized       | weight_packed i32 [N,ceil(K b/32)], weight_scale [N,K/g], weight_shape i64 [2], weight_zero_point |
| nvfp4-pack-quantized | weight_packed u8 [N,K/2], weight_scale e4m3 [N,K/16], weight_global_scale f32 [1] (a divisor)     |
| mxfp4-pack-quantized | weight_packed u8 [N,K/2], weight_scale u8 (E8M0) [N,K/32]                                         |
| mxfp8-quantized      | weight e4m3 [N,K], weight_scale u8 (E8M0) [N,K/32]                                                |

Static inputs add input_scale [1], or input_global_scale f32 [1] (a divisor). pack-quantized codes are offset by 2^(b-1) and
packed densely along K, little-endian; its zero points are packed along N, and its scales have the model's dtype. All other
float scales are float32: there are few of them, and engines that keep the model's dtype round them when they load.
Source: compressed-tensors 0.20, modules quantization/quant_args.py and compressors/.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from modelopt.numerics.packing import pack_bits
from modelopt.numerics.reference import Quantized
from modelopt.torch.export.checkpoint import Checkpoint, KVRecord, LayerRecord
from modelopt.torch.export.passes.round_scales import round_scales
from modelopt.torch.export.schemes import Scheme, input_scheme, ragged, weight_scheme
from modelopt.torch.export.writers.base import Writer

VERSION = "0.20.0"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_CHUNK = 1 << 20  # codes that are packed at a time
_LINEAR_KINDS = ("Linear", "Embedding")


def layout_of(weight: Scheme, inputs: Scheme | None) -> str | None:
    """Return the compressed-tensors format that stores a weight, or None."""
    if weight.key in ("nv:e2m1", "mx:e2m1", "mx:e4m3"):
        wanted = {"nv:e2m1": 16, "mx:e2m1": 32, "mx:e4m3": 32}[weight.key]
        names = {"nv:e2m1": "nvfp4-pack-quantized", "mx:e2m1": "mxfp4-pack-quantized", "mx:e4m3": "mxfp8-quantized"}
        return names[weight.key] if weight.strategy == "group" and weight.size == (wanted,) else None
    if weight.scale in ("e8m0", "two-level", "e4m3"):
        return None
    if weight.element == "e4m3":
        return "float-quantized"
    if weight.kind == "int" and (weight.element.startswith("i") or not weight.symmetric):
        if weight.element == "i8" and inputs is not None and inputs.element == "i8":
            return "int-quantized"
        return "pack-quantized" if weight.strategy != "block" else None
    return None


class CompressedTensorsWriter(Writer):
    """Writes `config.json` with a `quantization_config` of quant_method compressed-tensors."""

    name = "compressed-tensors"

    def why_not_layer(self, record: LayerRecord) -> str | None:
        """Return why compressed-tensors has no place for this layer, or None."""
        if record.note:
            return record.note
        if record.kind not in _LINEAR_KINDS:
            return f"compressed-tensors stores Linear and Embedding weights, not {record.kind}"
        if record.pre_quant_scale is not None:
            return "compressed-tensors has no pre-quant scale; fold it into the layer before"
        if record.output_format is not None:
            return f"an output quantizer ({record.output_format}) has no counterpart in an engine"
        if record.weight_format is None:
            return f"the input is quantized ({record.input_format}) and the weight is not"
        if len(record.shape) != 2:
            return f"the weight has shape {list(record.shape)}; two dimensions are wanted"
        weight = weight_scheme(record.weight_format)
        if isinstance(weight, str):
            return weight
        inputs = input_scheme(record.input_format) if record.input_format is not None else None
        if isinstance(inputs, str):
            return inputs
        if layout_of(weight, inputs) is None:
            return f"compressed-tensors has no layout for the weight format {record.weight_format}"
        if inputs is not None and _args(inputs, is_input=True) is None:
            return f"compressed-tensors has no words for the input format {record.input_format}"
        # A ragged last tile is stored in whole only by the 128x128 kind, and there only for rows.
        if weight.strategy == "block" and record.shape[1] % weight.size[1] == 0:
            return None
        return ragged(record.weight_format, record.shape)

    def why_not_kv(self, record: KVRecord) -> str | None:
        """Return why the cache format has no place, or None: one static FP8 or INT8 scale for keys and one for values."""
        scheme = input_scheme(record.format)
        if isinstance(scheme, str):
            return scheme
        if scheme.key not in ("e4m3", "i8") or scheme.strategy != "tensor" or record.k_scale is None or record.v_scale is None:
            return f"compressed-tensors has no key-value cache in {record.format}; FP8 with static scales is one it has"
        return None

    def prepare(self, record: LayerRecord, quantized: Quantized) -> Quantized:
        """Store the many scales of pack-quantized weights in the model's dtype; the few of the other kinds stay float32."""
        weight = _scheme(weight_scheme(quantized.format))
        inputs = _scheme(input_scheme(record.input_format)) if record.input_format is not None else None
        packed = layout_of(weight, inputs) == "pack-quantized"
        return round_scales(quantized, _scale_dtype(record) if packed else torch.float32)

    def encode(self, record: LayerRecord, quantized: Quantized) -> dict[str, Tensor]:
        """Return the layer's tensors, as in the table of this module."""
        weight = _scheme(weight_scheme(quantized.format))
        inputs = _scheme(input_scheme(record.input_format)) if record.input_format is not None else None
        layout = layout_of(weight, inputs)
        out: dict[str, Tensor] = {}
        scale = quantized.scales[0]
        if layout == "pack-quantized":
            out["weight_packed"] = pack_words(_offset(quantized.unpacked(), weight), weight.bits)
            out["weight_shape"] = torch.tensor(list(quantized.shape), dtype=torch.int64)
            if quantized.zero is not None:
                zero = quantized.zero.view(torch.uint8).reshape(scale.shape)
                out["weight_zero_point"] = pack_words(zero.T.contiguous(), weight.bits).T.contiguous()
        elif layout in ("int-quantized", "float-quantized", "mxfp8-quantized"):
            dtype = torch.int8 if layout == "int-quantized" else torch.float8_e4m3fn
            out["weight"] = quantized.unpacked().view(dtype)
        else:
            out["weight_packed"] = quantized.codes.reshape(quantized.shape[0], -1)
        out["weight_scale"] = scale.reshape(1) if scale.dim() == 0 else scale
        if layout == "nvfp4-pack-quantized":
            out["weight_global_scale"] = quantized.scales[1].float().reshape(1).reciprocal()
        if record.input_scale is not None and inputs is not None:
            if inputs.scale == "two-level":
                out["input_global_scale"] = record.input_scale.float().reshape(1).reciprocal()
            else:
                out["input_scale"] = record.input_scale.float().reshape(1)
        return out

    def encode_kv(self, record: KVRecord, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """Return `k_scale` and `v_scale` [1] of the attention module."""
        scales = {"k_scale": record.k_scale, "v_scale": record.v_scale}
        return {f"{record.name}.{key}": s.float().reshape(1) for key, s in scales.items() if s is not None}

    def config_files(self, checkpoint: Checkpoint) -> dict[str, Mapping[str, Any]]:
        """Return `config.json` with the quantization configuration."""
        return {"config.json": {**checkpoint.config, "quantization_config": quantization_config(checkpoint)}}


def _scheme(value: Scheme | str) -> Scheme:
    if isinstance(value, str):  # why_not has said no before
        raise TypeError(value)
    return value


def _scale_dtype(record: LayerRecord) -> torch.dtype:
    return record.dtype if record.dtype in _FLOATS else torch.float32


def _offset(codes: Tensor, scheme: Scheme) -> Tensor:
    """Turn two's complement codes of b bits into offset binary: adding 2^(b-1) modulo 2^b flips the highest bit."""
    return codes ^ (1 << (scheme.bits - 1)) if scheme.element.startswith("i") else codes


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 `codes` [R, C] densely along the last dimension into int32 words [R, ceil(C bits / 32)], little-endian."""
    words = torch.empty((codes.shape[0], -(-codes.shape[1] * bits // 32)), dtype=torch.int32, device=codes.device)
    step = max(_CHUNK // max(codes.shape[1], 1), 1)
    for i in range(0, codes.shape[0], step):
        stream = pack_bits(codes[i : i + step], bits)
        words[i : i + step] = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 4)).contiguous().view(torch.int32)
    return words


def _args(scheme: Scheme, is_input: bool = False) -> dict[str, Any] | None:
    """Return the QuantizationArgs of a scheme, or None where compressed-tensors has no words for it."""
    args: dict[str, Any] = {"num_bits": scheme.bits, "type": scheme.kind, "symmetric": scheme.symmetric, "dynamic": False}
    args["strategy"] = scheme.strategy
    if scheme.strategy == "group":
        args["group_size"] = scheme.size[0]
    if scheme.strategy == "block":
        args["block_structure"] = list(scheme.size)
    if scheme.key == "nv:e2m1":
        args.update(strategy="tensor_group", dynamic="local" if is_input else False, scale_dtype="torch.float8_e4m3fn")
        return args if scheme.size == (16,) and (scheme.dynamic or not is_input) else None
    if scheme.scale == "e8m0":
        args["scale_dtype"] = "torch.uint8"
        if scheme.size != (32,) or scheme.element not in ("e2m1", "e4m3"):
            return None
    elif scheme.kind == "float" and scheme.element != "e4m3":
        return None
    if is_input:
        args["dynamic"] = scheme.dynamic
        if scheme.kind == "int" and not scheme.element.startswith("i"):
            return None
    return args


def quantization_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the `quantization_config` of config.json: one group for each distinct scheme."""
    groups: dict[str, dict[str, Any]] = {}
    members: dict[str, list[str]] = {}
    for record in checkpoint.records():
        inputs = _scheme(input_scheme(record.input_format)) if record.input_format is not None else None
        weight = _scheme(weight_scheme(record.weight_format)) if record.weight_format is not None else None
        group = {
            "weights": _args(weight) if weight is not None else None,
            "input_activations": _args(inputs, is_input=True) if inputs is not None else None,
            "output_activations": None,
            "format": layout_of(weight, inputs) if weight is not None else None,
        }
        key = str(sorted(group.items(), key=lambda item: item[0]))
        groups.setdefault(key, group)
        members.setdefault(key, []).append(record.name)
    plain_linear = len(groups) == 1 and all(r.kind == "Linear" for r in checkpoint.records())
    formats = sorted({str(g["format"]) for g in groups.values()})
    return {
        "config_groups": {
            f"group_{i}": {**group, "targets": ["Linear"] if plain_linear else members[key]}
            for i, (key, group) in enumerate(groups.items())
        },
        "format": formats[0] if len(formats) == 1 else "mixed-precision" if formats else "dense",
        "global_compression_ratio": None,
        "ignore": list(checkpoint.unquantized),
        "kv_cache_scheme": _kv_scheme(checkpoint),
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def _kv_scheme(checkpoint: Checkpoint) -> dict[str, Any] | None:
    for record in checkpoint.kv.values():
        return _args(_scheme(input_scheme(record.format)), is_input=True)
    return None
