"""Reader for the compressed-tensors layout; the table of tensors is in `writers/compressed_tensors.py`.

Written against the layout and not against the writer: bits are unpacked here by shifts, one position of a word at a time.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelopt.core.errors import CheckpointError
from modelopt.numerics.formats import Format, parse
from modelopt.numerics.packing import pack_bits
from modelopt.numerics.reference import Quantized
from modelopt.torch.export.checkpoint import Checkpoint, KVRecord, LayerRecord
from modelopt.torch.export.readers.files import Tensors, dtype_of, inverse, need, read_json, take

_SCALES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read(directory: str | Path) -> Checkpoint:
    """Read a directory in the compressed-tensors layout. Raises CheckpointError."""
    directory = Path(directory)
    config = read_json(directory / "config.json")
    quantization = config.pop("quantization_config", None)
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "compressed-tensors":
        raise CheckpointError(f"{directory / 'config.json'} has no quantization_config with quant_method compressed-tensors.")
    tensors, used = Tensors(directory), set()
    dtype = dtype_of(config)
    layers = {}
    for key in tensors:
        name, _, last = key.rpartition(".")
        if last == "weight_scale":
            layers[name] = _layer(name, _group_of(name, quantization), quantization, tensors, used, dtype)
    kv = _read_kv(quantization, tensors, used)
    rest = {key: tensors[key] for key in tensors if key not in used}
    ignore = tuple(str(n) for n in quantization.get("ignore") or ())
    return Checkpoint(layers, rest, config, kv, unquantized=ignore, source=directory, dtype=dtype)


def _group_of(name: str, quantization: dict[str, Any]) -> dict[str, Any]:
    """Return the config group of a module: an exact name or `re:` pattern wins over a class name."""
    groups = [g for g in dict(quantization.get("config_groups") or {}).values() if isinstance(g, dict)]
    for group in groups:
        for target in group.get("targets") or ():
            if target == name or (target.startswith("re:") and re.match(target[3:], name)):
                return group
    for group in groups:
        if any(not t.startswith("re:") and "." not in t for t in group.get("targets") or ()):
            return group
    raise CheckpointError(f"No config group targets {name}, which has a weight_scale.")


def _block(args: dict[str, Any], is_input: bool) -> str:
    strategy = args.get("strategy") or ("group" if args.get("group_size") else "tensor")
    if strategy == "block":
        return "[" + ",".join(str(int(n)) for n in args["block_structure"]) + "]"
    named = {"tensor": "[...]", "channel": "[1,...]", "token": "[-1]"}
    return named.get(strategy) or f"[{int(args['group_size'])}]"


def format_of(args: dict[str, Any], scale: str, is_input: bool = False) -> Format:
    """Return the format that QuantizationArgs describe, with scales stored as `scale` (f32, bf16, ... for plain ones)."""
    bits, kind = args.get("num_bits", 8), args.get("type", "int")
    element = {("float", 8): "e4m3", ("float", 4): "e2m1"}.get(
        (kind, bits), f"i{bits}" if args.get("symmetric", True) else f"u{bits}"
    )
    block = _block(args, is_input) + ("~" if args.get("dynamic") else "")
    if args.get("strategy") == "tensor_group":
        return parse(f"{element}{block}*e4m3[...]*f32")
    if kind == "float" and args.get("group_size") == 32 and (bits == 4 or "uint8" in str(args.get("scale_dtype"))):
        return parse(f"{element}{block}*e8m0")
    return parse(f"{element}{block}*{scale}" + (f"+{element}" if element.startswith("u") else ""))


def _layer(
    name: str, group: dict[str, Any], quantization: dict[str, Any], tensors: Tensors, used: set[str], dtype: torch.dtype
) -> LayerRecord:
    args, inputs = group.get("weights") or {}, group.get("input_activations")
    layout = group.get("format") or quantization.get("format")
    scale = need(tensors, f"{name}.weight_scale", used)
    fmt = format_of(args, _SCALES.get(scale.dtype, "f32"))
    bits = fmt.element.bits
    scales: tuple[Tensor, ...] = (scale.reshape(()) if fmt.block.whole else scale,)
    zero = None
    if layout == "pack-quantized":
        shape = torch.Size(int(n) for n in need(tensors, f"{name}.weight_shape", used))
        codes = unpack_words(need(tensors, f"{name}.weight_packed", used), bits, shape[-1])
        if fmt.element.name.startswith("i"):  # offset binary back to two's complement
            codes = ((codes.to(torch.int16) + 2 ** (bits - 1)) % 2**bits).to(torch.uint8)
        packed_zero = take(tensors, f"{name}.weight_zero_point", used)
        if packed_zero is not None:
            zero = unpack_words(packed_zero.T.contiguous(), bits, shape[0]).T.contiguous()
    elif layout in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        both = need(tensors, f"{name}.weight_packed", used)
        codes = torch.stack((both % 16, both // 16), dim=-1).flatten(-2)
        shape = codes.shape
    else:
        codes = need(tensors, f"{name}.weight", used)
        shape, codes = codes.shape, codes.view(torch.uint8)
    if fmt.needs_global:
        scales += (inverse(need(tensors, f"{name}.weight_global_scale", used)),)
    grid = () if fmt.block.whole else fmt.grid(shape)
    if tuple(scales[0].shape) != tuple(grid):
        raise CheckpointError(
            f"{name}.weight_scale has shape {list(scale.shape)}; a weight of {list(shape)} in {fmt} needs {grid}."
        )
    q = Quantized(pack_bits(codes.to(torch.uint8), bits), scales, fmt, torch.Size(shape), dtype, zero)
    input_format, input_scale = None, None
    if inputs:
        input_format = format_of(inputs, "f32", is_input=True)
        plain = take(tensors, f"{name}.input_scale", used)
        divisor = take(tensors, f"{name}.input_global_scale", used)
        input_scale = plain.float().reshape(()) if plain is not None else None if divisor is None else inverse(divisor)
    return LayerRecord(name, q, fmt, input_format, input_scale)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Return `count` codes of `bits` bits from each row of little-endian int32 `words` [R, W], as uint8 [R, count]."""
    wide = words.to(torch.int64) & 0xFFFFFFFF
    index = torch.arange(count) * bits
    word, shift = index // 32, index % 32
    if count and int(word[-1]) >= wide.shape[-1]:
        raise CheckpointError(f"{count} codes of {bits} bits do not fit {wide.shape[-1]} words.")
    following = torch.nn.functional.pad(wide, (0, 1))[:, word + 1]
    both = (wide[:, word] >> shift) | (following << (32 - shift))
    return (both & (2**bits - 1)).to(torch.uint8)


def _read_kv(quantization: dict[str, Any], tensors: Tensors, used: set[str]) -> dict[str, KVRecord]:
    scheme = quantization.get("kv_cache_scheme")
    if not scheme:
        return {}
    fmt = format_of(scheme, "f32", is_input=True)
    found = {}
    for key in list(tensors):
        name, _, last = key.rpartition(".")
        if last == "k_scale":
            k, v = need(tensors, key, used), need(tensors, f"{name}.v_scale", used)
            found[name] = KVRecord(name, fmt, k.float().reshape(()), v.float().reshape(()))
    return found
