"""Writer for the unified Hugging Face layout of NVIDIA ModelOpt (quant_method "modelopt"), read by TensorRT-LLM, vLLM, SGLang.

| quant_algo                | weight            | weight_scale              | weight_scale_2    | input_scale |
|---------------------------|-------------------|---------------------------|-------------------|-------------|
| FP8                       | e4m3 [N,K]        | f32 []                    |                   | f32 []      |
| FP8_PER_CHANNEL_PER_TOKEN | e4m3 [N,K]        | f32 [N]                   |                   |             |
| FP8_PB_WO                 | e4m3 [N,K]        | f32 [N/128,1,K/128,1]     |                   |             |
| W8A8_SQ_PER_CHANNEL       | i8 [N,K]          | f32 [N]                   |                   | f32 []      |
| W8A16                     | i8 [N,K]          | f32 [N]                   |                   |             |
| W4A16_AWQ                 | u8 [N/2,K]        | f32 [N,K/g]               |                   |             |
| NVFP4, W4A16_NVFP4        | u8 [N,K/2]        | e4m3 [N,K/16]             | f32 [] = amax/2688 | f32 [] (A4) |
| W4A8_NVFP4_FP8            | u8 [N,K/2]        | e4m3 [N,K/32]             | f32 [] = amax/448 | f32 []      |
| MXFP8                     | e4m3 [N,K]        | u8 (E8M0) [N,K/32]        |                   |             |
| MXFP4, W4A8_MXFP4_FP8     | u8 [N,K/2]        | u8 (E8M0) [N,K/32]        |                   | f32 [] (A8) |

Every scale multiplies codes back to values. FP4 codes: even element in the low nibble. W4A16_AWQ: byte [i, k] holds row 2i in
the low nibble and row 2i+1 in the high one, two's complement. `pre_quant_scale` [K] is present where there is one.
Source: tensors and files of real exports of ModelOpt 0.47, observed. Where those were wrong this writer is right: names of
algorithms in capitals, config groups and group sizes for every algorithm, `pre_quant_scale` only where there is one,
the input scale of W4A8_MXFP4_FP8, and no embeddings among the excluded modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from modelopt.numerics.reference import Quantized
from modelopt.torch.export.checkpoint import Checkpoint, KVRecord, LayerRecord
from modelopt.torch.export.passes.round_scales import round_scales
from modelopt.torch.export.schemes import Scheme, input_scheme, ragged, weight_scheme
from modelopt.torch.export.writers.base import Writer, producer

# (weight key, strategy, block) and (input key, strategy, block, dynamic) or None -> algorithm
_ALGORITHMS: dict[tuple[Any, Any], str] = {
    (("e4m3", "tensor", ()), ("e4m3", "tensor", (), False)): "FP8",
    (("e4m3", "channel", ()), ("e4m3", "token", (), True)): "FP8_PER_CHANNEL_PER_TOKEN",
    (("e4m3", "block", (128, 128)), None): "FP8_PB_WO",
    (("i8", "channel", ()), ("i8", "tensor", (), False)): "W8A8_SQ_PER_CHANNEL",
    (("i8", "channel", ()), None): "W8A16",
    (("nv:e2m1", "group", (16,)), ("nv:e2m1", "group", (16,), True)): "NVFP4",
    (("nv:e2m1", "group", (16,)), None): "W4A16_NVFP4",
    (("nv:e2m1", "group", (32,)), ("e4m3", "tensor", (), False)): "W4A8_NVFP4_FP8",
    (("mx:e4m3", "group", (32,)), ("mx:e4m3", "group", (32,), True)): "MXFP8",
    (("mx:e2m1", "group", (32,)), ("mx:e2m1", "group", (32,), True)): "MXFP4",
    (("mx:e2m1", "group", (32,)), ("e4m3", "tensor", (), False)): "W4A8_MXFP4_FP8",
}
_KV_ALGORITHMS = {"e4m3": "FP8", "nv:e2m1": "NVFP4", "i8": "INT8"}
KV_MAXIMUM = 448.0


def algorithm(weight: Scheme, inputs: Scheme | None) -> str | None:
    """Return the `quant_algo` for a weight and an input scheme, or None if NVIDIA's layout has none."""
    if weight.key == "i4" and weight.strategy == "group" and inputs is None and weight.symmetric:
        return "W4A16_AWQ"
    if not weight.symmetric or weight.scale == "e4m3":
        return None
    key = None if inputs is None else (inputs.key, inputs.strategy, inputs.size, inputs.dynamic)
    return _ALGORITHMS.get(((weight.key, weight.strategy, weight.size), key))


class HFWriter(Writer):
    """Writes NVIDIA's unified layout: `hf_quant_config.json`, and a `quantization_config` in `config.json`."""

    name = "hf"

    def why_not_layer(self, record: LayerRecord) -> str | None:
        """Return why NVIDIA's layout has no place for this layer, or None."""
        if record.note:
            return record.note
        if record.output_format is not None:
            return f"an output quantizer ({record.output_format}) has no counterpart in an engine"
        if record.weight_format is None:
            return f"the input is quantized ({record.input_format}) and the weight is not"
        if len(record.shape) != 2 or record.kind not in ("Linear", "Embedding"):
            return f"NVIDIA's layout stores matrices of Linear layers, not {record.kind} of shape {list(record.shape)}"
        weight = weight_scheme(record.weight_format)
        inputs = input_scheme(record.input_format) if record.input_format is not None else None
        if isinstance(weight, str) or isinstance(inputs, str):
            return weight if isinstance(weight, str) else str(inputs)
        algo = algorithm(weight, inputs)
        if algo is None:
            return f"NVIDIA's layout has no algorithm for weights in {record.weight_format} with inputs in {record.input_format}"
        if algo == "W4A16_AWQ" and record.shape[0] % 2:
            return f"the number of rows ({record.shape[0]}) is odd, and this layout packs rows in pairs"
        if inputs is not None and not inputs.dynamic and record.input_scale is None:
            return "the input range was never calibrated"
        return ragged(record.weight_format, record.shape)

    def why_not_kv(self, record: KVRecord) -> str | None:
        """Return why the cache format has no place, or None."""
        scheme = input_scheme(record.format)
        if isinstance(scheme, str):
            return scheme
        if scheme.key not in _KV_ALGORITHMS or record.k_scale is None or record.v_scale is None:
            return f"NVIDIA's layout has no key-value cache in {record.format}"
        return None

    def prepare(self, record: LayerRecord, quantized: Quantized) -> Quantized:
        """Float scales are float32 in this layout."""
        return round_scales(quantized, torch.float32)

    def encode(self, record: LayerRecord, quantized: Quantized) -> dict[str, Tensor]:
        """Return the layer's tensors, as in the table of this module."""
        algo = _algorithm_of(record)
        scale = quantized.scales[0]
        codes = quantized.unpacked()
        if algo == "W4A16_AWQ":
            out = {"weight": codes[0::2] | (codes[1::2] << 4), "weight_scale": scale}
        elif algo.startswith("W8A"):
            out = {"weight": codes.view(torch.int8), "weight_scale": scale.reshape(-1)}
        elif algo in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8"):
            shape = {"FP8": (), "FP8_PER_CHANNEL_PER_TOKEN": (-1,), "MXFP8": scale.shape}.get(algo)
            if shape is None:
                shape = (scale.shape[0], 1, scale.shape[1], 1)
            out = {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": scale.reshape(shape)}
        else:
            out = {"weight": quantized.codes.reshape(record.shape[0], -1), "weight_scale": scale}
            if len(quantized.scales) == 2:
                out["weight_scale_2"] = quantized.scales[1].reshape(())
        if record.input_scale is not None:
            out["input_scale"] = record.input_scale.float().reshape(())
        if record.pre_quant_scale is not None:
            out["pre_quant_scale"] = record.pre_quant_scale.to(record.dtype).reshape(-1)
        return out

    def encode_kv(self, record: KVRecord, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """Return `k_proj.k_scale` and `v_proj.v_scale`, scalars: amax / 448, the layout's rule for FP8 and NVFP4 alike."""
        out = {}
        for key, scale in (("k", record.k_scale), ("v", record.v_scale)):
            if scale is not None:
                out[f"{record.name}.{key}_proj.{key}_scale"] = scale.float().reshape(()) * kv_ratio(record.format)
        return out

    def config_files(self, checkpoint: Checkpoint) -> dict[str, Mapping[str, Any]]:
        """Return both JSON files."""
        quantization = quantization_summary(checkpoint)
        in_config: dict[str, Any] = {"config_groups": _config_groups(checkpoint), "ignore": list(checkpoint.unquantized)}
        in_config["quant_algo"] = quantization["quant_algo"]
        for key in ("group_size", "quantized_layers"):
            if key in quantization:
                in_config[key] = quantization[key]
        for kv in checkpoint.kv.values():
            scheme = input_scheme(kv.format)
            if isinstance(scheme, Scheme):
                words = {"dynamic": False, "num_bits": 8, "type": scheme.kind}
                in_config["kv_cache_scheme"] = "NVFP4" if scheme.scale == "two-level" else words
            break
        in_config.update(producer=producer(), quant_method="modelopt")
        return {
            "hf_quant_config.json": {"producer": producer(), "quantization": quantization},
            "config.json": {**checkpoint.config, "quantization_config": in_config},
        }


def kv_ratio(fmt: Any) -> float:
    """Return what turns our scale (amax / largest value of the format) into the layout's amax / 448."""
    if fmt.element.kind == "int":
        return 1.0
    top = fmt.element.max * (fmt.scale.element.max if fmt.is_two_level else 1.0)
    return top / KV_MAXIMUM


def _algorithm_of(record: LayerRecord) -> str:
    inputs = input_scheme(record.input_format) if record.input_format is not None else None
    weight = weight_scheme(record.weight_format) if record.weight_format is not None else "no weight"
    found = None if isinstance(weight, str) or isinstance(inputs, str) else algorithm(weight, inputs)
    if found is None:  # why_not has said no before
        raise TypeError(record.name)
    return {"NVFP4": "NVFP4_AWQ"}.get(found, found) if record.pre_quant_scale is not None else found


def layer_summary(record: LayerRecord) -> dict[str, Any]:
    """Return `quant_algo` and, for blocks, what engines want to know beside it."""
    algo = _algorithm_of(record)
    scheme = weight_scheme(record.weight_format) if record.weight_format is not None else None
    out: dict[str, Any] = {"quant_algo": algo}
    if isinstance(scheme, Scheme) and scheme.strategy in ("group", "block"):
        out["group_size"] = scheme.size[-1]
    if algo == "W4A16_AWQ":
        out["has_zero_point"] = False
    if algo.endswith("_AWQ"):
        out["pre_quant_scale"] = record.pre_quant_scale is not None
    return out


def quantization_summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the `quantization` part of hf_quant_config.json."""
    layers = {record.name: layer_summary(record) for record in checkpoint.records()}
    distinct = {str(sorted(v.items())): v for v in layers.values()}
    kv = None
    for record in checkpoint.kv.values():
        scheme = input_scheme(record.format)
        kv = _KV_ALGORITHMS.get(scheme.key) if isinstance(scheme, Scheme) else None
    if len(distinct) > 1:
        excluded = {"exclude_modules": list(checkpoint.unquantized)}
        return {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": kv, "quantized_layers": layers, **excluded}
    only = dict(next(iter(distinct.values()), {"quant_algo": None}))
    algo = only.pop("quant_algo")
    return {"quant_algo": algo, "kv_cache_quant_algo": kv, **only, "exclude_modules": list(checkpoint.unquantized)}


def _words(fmt: Any, scheme: Scheme) -> dict[str, Any]:
    words: dict[str, Any] = {"dynamic": scheme.dynamic and not fmt.needs_global, "num_bits": scheme.bits, "type": scheme.kind}
    if scheme.strategy == "group":
        words["group_size"] = scheme.size[0]
    if scheme.strategy == "block":
        words["block_structure"] = list(scheme.size)
    if scheme.strategy in ("channel", "token"):
        words["strategy"] = scheme.strategy
    return words


def _config_groups(checkpoint: Checkpoint) -> dict[str, Any]:
    groups: dict[str, dict[str, Any]] = {}
    members: dict[str, list[str]] = {}
    for record in checkpoint.records():
        group: dict[str, Any] = {}
        inputs = input_scheme(record.input_format) if record.input_format is not None else None
        weight = weight_scheme(record.weight_format) if record.weight_format is not None else None
        if isinstance(inputs, Scheme):
            group["input_activations"] = _words(record.input_format, inputs)
        if isinstance(weight, Scheme):
            group["weights"] = {**_words(record.weight_format, weight), "dynamic": False}
        key = str(group)
        groups.setdefault(key, group)
        members.setdefault(key, []).append(record.name)
    return {
        f"group_{i}": {**group, "targets": ["Linear"] if len(groups) == 1 else members[key]}
        for i, (key, group) in enumerate(groups.items())
    }
