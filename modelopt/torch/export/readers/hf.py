"""Reader for NVIDIA's unified Hugging Face layout; the table of tensors is in `writers/hf.py`.

It also reads what NVIDIA's own exporter writes: lower-case algorithms, no config groups, excluded modules as patterns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from modelopt.core.errors import CheckpointError
from modelopt.numerics.formats import Format, parse
from modelopt.numerics.packing import pack_bits
from modelopt.numerics.reference import Quantized
from modelopt.torch.export.checkpoint import Checkpoint, KVRecord, LayerRecord
from modelopt.torch.export.readers.files import Tensors, dtype_of, need, read_json, take

# algorithm -> (weight, input); {g} is the group size
FORMATS: dict[str, tuple[str, str | None]] = {
    "FP8": ("e4m3[...]*f32", "e4m3[...]*f32"),
    "FP8_PER_CHANNEL_PER_TOKEN": ("e4m3[1,...]*f32", "e4m3[-1]~*f32"),
    "FP8_PB_WO": ("e4m3[128,128]*f32", None),
    "W8A8_SQ_PER_CHANNEL": ("i8[1,...]*f32", "i8[...]*f32"),
    "W8A16": ("i8[1,...]*f32", None),
    "W4A16_AWQ": ("i4[{g}]*f32", None),
    "NVFP4": ("e2m1[16]*e4m3[...]*f32", "e2m1[16]~*e4m3[...]*f32"),
    "NVFP4_AWQ": ("e2m1[16]*e4m3[...]*f32", "e2m1[16]~*e4m3[...]*f32"),
    "W4A16_NVFP4": ("e2m1[16]*e4m3[...]*f32", None),
    "W4A8_NVFP4_FP8": ("e2m1[32]*e4m3:fp8[...]*f32", "e4m3[...]*f32"),
    "MXFP8": ("e4m3[32]*e8m0", "e4m3[32]~*e8m0"),
    "MXFP4": ("e2m1[32]*e8m0", "e2m1[32]~*e8m0"),
    "W4A8_MXFP4_FP8": ("e2m1[32]*e8m0", "e4m3[...]*f32"),
}
_KV = {"FP8": "e4m3[...]*f32", "NVFP4": "e2m1[16]~*e4m3[...]*f32", "INT8": "i8[...]*f32"}


def read(directory: str | Path) -> Checkpoint:
    """Read a directory in NVIDIA's unified layout. Raises CheckpointError."""
    directory = Path(directory)
    config = read_json(directory / "config.json")
    config.pop("quantization_config", None)
    quantization = read_json(directory / "hf_quant_config.json").get("quantization")
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{directory / 'hf_quant_config.json'} has no object called quantization.")
    tensors, used = Tensors(directory), set()
    dtype = dtype_of(config)
    layers = {}
    for key in tensors:
        name, _, last = key.rpartition(".")
        if last == "weight_scale":
            layers[name] = _layer(name, _summary_of(name, quantization), tensors, used, dtype)
    kv = _read_kv(quantization, tensors, used)
    rest = {key: tensors[key] for key in tensors if key not in used}
    excluded = tuple(str(n) for n in quantization.get("exclude_modules") or ())
    return Checkpoint(layers, rest, config, kv, unquantized=excluded, source=directory, dtype=dtype)


def _summary_of(name: str, quantization: dict[str, Any]) -> dict[str, Any]:
    layers = quantization.get("quantized_layers")
    if str(quantization.get("quant_algo")).upper() != "MIXED_PRECISION":
        return quantization
    if not isinstance(layers, dict) or not isinstance(layers.get(name), dict):
        raise CheckpointError(f"{name} has a weight_scale, and quantized_layers does not name it.")
    return layers[name]


def formats_of(summary: dict[str, Any]) -> tuple[Format, Format | None]:
    """Return the weight and the input format of a `quant_algo`. Raises CheckpointError for one that is not known."""
    algo = str(summary.get("quant_algo")).upper()
    if algo not in FORMATS:
        raise CheckpointError(f'The quant_algo "{summary.get("quant_algo")}" is not known. Known: {", ".join(FORMATS)}.')
    weight, inputs = FORMATS[algo]
    group = summary.get("group_size") or 128
    if not isinstance(group, int) or group <= 0:
        raise CheckpointError(f"group_size is {group!r}; a positive integer is wanted.")
    return parse(weight.format(g=group)), None if inputs is None else parse(inputs)


def _layer(name: str, summary: dict[str, Any], tensors: Tensors, used: set[str], dtype: torch.dtype) -> LayerRecord:
    fmt, input_format = formats_of(summary)
    stored = need(tensors, f"{name}.weight", used)
    scale = need(tensors, f"{name}.weight_scale", used)
    if fmt.element.name == "i4":
        low, high = stored % 16, stored // 16
        codes = torch.stack((low, high), dim=1).flatten(0, 1)
    elif fmt.element.bits == 4:
        codes = torch.stack((stored % 16, stored // 16), dim=-1).flatten(-2)
    else:
        codes = stored.view(torch.uint8)
    grid = fmt.grid(codes.shape)
    expected = 1
    for n in grid:
        expected *= n
    if scale.numel() != expected:
        raise CheckpointError(f"{name}.weight_scale has shape {list(scale.shape)}; {fmt} on {list(codes.shape)} needs {grid}.")
    scales = (scale.reshape(grid),)
    if fmt.needs_global:
        scales += (need(tensors, f"{name}.weight_scale_2", used).reshape(()),)
    q = Quantized(pack_bits(codes, fmt.element.bits), scales, fmt, torch.Size(codes.shape), dtype)
    input_scale = take(tensors, f"{name}.input_scale", used)
    pre_quant = take(tensors, f"{name}.pre_quant_scale", used)
    return LayerRecord(name, q, fmt, input_format, input_scale, pre_quant_scale=pre_quant)


def _read_kv(quantization: dict[str, Any], tensors: Tensors, used: set[str]) -> dict[str, KVRecord]:
    algo = quantization.get("kv_cache_quant_algo")
    if algo is None:
        return {}
    if algo not in _KV:
        raise CheckpointError(f'The kv_cache_quant_algo "{algo}" is not known. Known: {", ".join(_KV)}.')
    fmt = parse(_KV[algo])
    ratio = 6.0 if algo == "NVFP4" else 1.0  # the layout's scale is amax / 448, ours amax / (6 * 448)
    found = {}
    for key in list(tensors):
        if key.endswith(".k_proj.k_scale"):
            name = key.removesuffix(".k_proj.k_scale")
            k, v = need(tensors, key, used), need(tensors, f"{name}.v_proj.v_scale", used)
            found[name] = KVRecord(name, fmt, k.reshape(()) / ratio, v.reshape(()) / ratio)
    return found
