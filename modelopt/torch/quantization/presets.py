"""The named configurations, as plain data in NVIDIA's list dialect, and the short scheme names of the command line.

    INT8_DEFAULT_CFG = {"quant_cfg": [everything off, weight entry, input entry, *default_disabled], "algorithm": "max"}

Names and meaning are those of NVIDIA ModelOpt 0.47. Every preset first disables everything, then enables what it quantizes,
then disables what is rarely worth it (heads, routers, vision towers, norms). Presets without an `algorithm` key describe a
KV cache and are meant to be merged (`update_quant_cfg_with_kv_cache_quant`); alone they calibrate with "max".
"""

from __future__ import annotations

import copy
from typing import Any

from modelopt.core.errors import UnknownNameError, did_you_mean

Attributes = dict[str, Any]
Entry = dict[str, Any]
Preset = dict[str, Any]


def _block(num_bits: Any, size: int, scale_bits: tuple[int, int] | None, dynamic: bool = True, **more: Any) -> Attributes:
    sizes: dict[Any, Any] = {-1: size, "type": "dynamic" if dynamic else "static"}
    if scale_bits is not None:
        sizes["scale_bits"] = scale_bits
    return {"num_bits": num_bits, "block_sizes": {**sizes, **more}}


INT8_CHANNEL: Attributes = {"num_bits": 8, "axis": 0}
INT8_TENSOR: Attributes = {"num_bits": 8, "axis": None}
FP8_TENSOR: Attributes = {"num_bits": (4, 3), "axis": None}
FP8_CHANNEL: Attributes = {"num_bits": (4, 3), "axis": 0}
FP8_TOKEN: Attributes = {"num_bits": (4, 3), "axis": None, "type": "dynamic", "block_sizes": {-1: None}}
FP8_TILE: Attributes = {"num_bits": (4, 3), "axis": None, "block_sizes": {-1: 128, -2: 128}}
INT4_BLOCK: Attributes = _block(4, 128, None, dynamic=False)
NVFP4: Attributes = {**_block((2, 1), 16, (4, 3)), "effective_bits": 4.5}
NVFP4_32: Attributes = _block((2, 1), 32, (4, 3))
NVFP4_32_FP8: Attributes = _block((2, 1), 32, (4, 3), scale_rule="fp8")  # code * block scale fits FP8, as engines read it
NVFP4_STATIC: Attributes = _block((2, 1), 16, (4, 3), dynamic=False)
NVFP4_46: Attributes = _block((2, 1), 16, (4, 3), dynamic=False, four_over_six=True)
MXFP4: Attributes = _block((2, 1), 32, (8, 0))
MXFP6: Attributes = _block((3, 2), 32, (8, 0))
MXFP8: Attributes = _block((4, 3), 32, (8, 0))
MXINT8: Attributes = _block(8, 32, (8, 0))


def _off(*patterns: str) -> list[Entry]:
    return [{"quantizer_name": p, "enable": False} for p in patterns]


def _on(pattern: str, cfg: Attributes | list[Attributes]) -> Entry:
    return {"quantizer_name": pattern, "cfg": copy.deepcopy(cfg)}


OFF_CLASSES = ("nn.BatchNorm1d", "nn.BatchNorm2d", "nn.BatchNorm3d", "nn.LeakyReLU", "nn.Embedding")
default_disabled: list[Entry] = [
    *_off("*block_sparse_moe.gate*", "*linear_attn.conv1d*", "*self_attention.conv1d*", "*linear_attn.in_proj_a*"),
    *_off("*linear_attn.in_proj_b*", "*lm_head*", "*mixer.conv1d*", "*mlp.gate.*", "*mlp.shared_expert_gate.*"),
    *_off("*output_layer*", "*proj_out.*", "*router*", "mtp.*", "output.*", "*embed_vision*", "*vision_tower*"),
    *_off("*visual*", "*vision_model*", "*multi_modal_projector*"),
    *[{"quantizer_name": "*", "parent_class": name, "enable": False} for name in OFF_CLASSES],
]
# Heads that NVIDIA's list does not know: sequence, token and question heads, and the masked-language heads of BERT and its kin.
heads_disabled: list[Entry] = _off("classifier.*", "score.*", "qa_outputs.*", "cls.*", "vocab_projector.*", "generator_lm_head.*")
mamba_moe_disabled: list[Entry] = _off(
    *("*fc1_latent_proj*", "*fc2_latent_proj*", "*q_proj*", "*k_proj*", "*v_proj*", "*o_proj*"),
    *("*self_attention.linear_qkv*", "*self_attention.linear_proj*"),
)
_MIXER_PROJ = _off("*mixer.in_proj*", "*mixer.out_proj*")


def _preset(entries: list[Entry], algorithm: Any, off: list[Entry] | None = None) -> Preset:
    tail = copy.deepcopy([*default_disabled, *heads_disabled, *(off or [])])
    return {"quant_cfg": [*_off("*"), *entries, *tail], "algorithm": algorithm}


def _both(
    weight: Attributes | list[Attributes], inputs: Attributes | None, algorithm: Any, off: list[Entry] | None = None
) -> Preset:
    """Weights (and inputs; None: weight-only) of every layer that is not disabled."""
    last = [_on("*input_quantizer", inputs)] if inputs is not None else _off("*input_quantizer")
    return _preset([_on("*weight_quantizer", weight), *last], algorithm, off)


def _selected(places: tuple[str, ...], weight: Attributes, inputs: Attributes | None, algorithm: Any) -> Preset:
    """Only the layers whose names contain one of `places`."""
    entries = []
    for place in places:
        entries.append(_on(f"{place}weight_quantizer", weight))
        if inputs is not None:
            entries.append(_on(f"{place}input_quantizer", inputs))
    return _preset(entries, algorithm)


def _kv(*entries: Entry) -> Preset:
    return {"quant_cfg": list(entries)}


_MIXER = ("*.mixer.up_proj.", "*.mixer.down_proj.")
_MLP = ("*mlp*", *_MIXER, "*block_sparse_moe*")
_KV = "*[kv]_bmm_quantizer"
_AFFINE = {"bias": {-2: None, -4: None, "type": "static"}}

INT8_DEFAULT_CFG = _both(INT8_CHANNEL, INT8_TENSOR, "max")
INT8_SMOOTHQUANT_CFG = _both(INT8_CHANNEL, INT8_TENSOR, "smoothquant")
INT8_WEIGHT_ONLY_CFG = _both(INT8_CHANNEL, None, "max")
FP8_DEFAULT_CFG = _both(FP8_TENSOR, FP8_TENSOR, "max")
FP8_PER_CHANNEL_PER_TOKEN_CFG = _both(FP8_CHANNEL, FP8_TOKEN, "max")
FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG = _both(FP8_TILE, None, "max")
INT4_BLOCKWISE_WEIGHT_ONLY_CFG = _both(INT4_BLOCK, None, "max")
INT4_AWQ_CFG = _both(INT4_BLOCK, None, {"method": "awq_lite", "alpha_step": 0.1})
W4A8_AWQ_BETA_CFG = _both([INT4_BLOCK, FP8_TENSOR], FP8_TENSOR, "awq_lite")
MXFP8_DEFAULT_CFG = _both(MXFP8, MXFP8, None)
MXFP6_DEFAULT_CFG = _both(MXFP6, MXFP6, None)
MXFP4_DEFAULT_CFG = _both(MXFP4, MXFP4, None)
MXINT8_DEFAULT_CFG = _both(MXINT8, MXINT8, None)
W4A8_MXFP4_FP8_CFG = _both(MXFP4, FP8_TENSOR, None)
NVFP4_DEFAULT_CFG = _both(NVFP4, NVFP4, "max")
W4A16_NVFP4_CFG = _preset([_on("*weight_quantizer", NVFP4)], "max")
W4A8_NVFP4_FP8_CFG = _both(NVFP4_32_FP8, FP8_TENSOR, "max")
NVFP4_AWQ_LITE_CFG = _both(NVFP4, NVFP4, "awq_lite")
NVFP4_AWQ_CLIP_CFG = _both(NVFP4, NVFP4, {"method": "awq_clip"})
NVFP4_AWQ_FULL_CFG = _both(NVFP4, NVFP4, {"method": "awq_full", "alpha_step": 0.1})
NVFP4_SVDQUANT_DEFAULT_CFG = _both(NVFP4, NVFP4, {"method": "svdquant", "lowrank": 32})
NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG = _both(NVFP4_STATIC, NVFP4, {"method": "mse", "fp8_scale_sweep": True})
NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG = _both(NVFP4_STATIC, NVFP4, {"method": "local_hessian", "fp8_scale_sweep": True})
NVFP4_FOUR_OVER_SIX_CFG = _both(
    NVFP4_46,
    NVFP4,
    {"method": "mse", "fp8_scale_sweep": False, "start_multiplier": 1.0, "stop_multiplier": 1.5, "step_size": 0.5},
)
NVFP4_MLP_ONLY_CFG = _selected((*_MLP, "*.experts.*"), NVFP4, NVFP4, "max")
NVFP4_EXPERTS_ONLY_CFG = _selected(("*block_sparse_moe*", "*.experts.*"), NVFP4, NVFP4, "max")
NVFP4_OMLP_ONLY_CFG = _selected(("*o_proj*", *_MLP), NVFP4, NVFP4, "max")
NVFP4_MLP_WEIGHT_ONLY_CFG = _selected(("*mlp*", "*block_sparse_moe*"), NVFP4_32, None, "max")
MXFP4_MLP_WEIGHT_ONLY_CFG = _selected(("*mlp*", "*block_sparse_moe*"), MXFP4, None, None)
NVFP4_FP8_MHA_CONFIG: Preset = {
    "quant_cfg": [
        *_off("*"),
        *[_on(p, NVFP4) for p in ("*weight_quantizer", "*input_quantizer")],
        *_off("*output_quantizer"),
        *[_on(p, FP8_TENSOR) for p in ("*[qkv]_bmm_quantizer", "*softmax_quantizer", "*p_bmm_quantizer")],
        _on("transformer_blocks*bmm2_output_quantizer", FP8_TENSOR),
    ],
    "algorithm": "max",
}
MAMBA_MOE_FP8_AGGRESSIVE_CFG = _both(FP8_TENSOR, FP8_TENSOR, "max", mamba_moe_disabled)
MAMBA_MOE_FP8_CONSERVATIVE_CFG = _both(FP8_TENSOR, FP8_TENSOR, "max", [*mamba_moe_disabled, *_MIXER_PROJ])
MAMBA_MOE_NVFP4_AGGRESSIVE_CFG = _both(NVFP4, NVFP4, "max", mamba_moe_disabled)
MAMBA_MOE_NVFP4_CONSERVATIVE_CFG = _both(NVFP4, NVFP4, "max", [*mamba_moe_disabled, *_MIXER_PROJ])
FP8_KV_CFG = _kv(_on(_KV, FP8_TENSOR))
FP8_AFFINE_KV_CFG = _kv(_on(_KV, FP8_TENSOR), _on(_KV, {**FP8_TENSOR, **_AFFINE}))
NVFP4_KV_CFG = _kv(_on(_KV, NVFP4))
NVFP4_AFFINE_KV_CFG = _kv(_on(_KV, NVFP4), _on(_KV, {**NVFP4, **_AFFINE}))
NVFP4_KV_ROTATE_CFG: Preset = {
    "quant_cfg": [
        {**_on("*q_bmm_quantizer", {"rotate": True}), "enable": False},
        _on("*k_bmm_quantizer", {**NVFP4, "rotate": True}),
        _on("*v_bmm_quantizer", NVFP4),
    ],
    "algorithm": "max",
}

PRESETS: dict[str, Preset] = {
    name: value for name, value in dict(globals()).items() if name.isupper() and name.endswith(("_CFG", "_CONFIG"))
}
# Patterns that the presets carry for model families at large: where they match nothing there is nothing to say.
STANDARD_PATTERNS: frozenset[str] = frozenset(
    entry["quantizer_name"] for preset in PRESETS.values() for entry in preset["quant_cfg"]
)


def _int4(size: int) -> Preset:
    # Engines keep these scales in 16 bits: with bf16 scales the fake-quantized model is the exported one, and a code costs less.
    return _both({"format": f"i4[{size}]*bf16"}, None, "max")


SCHEMES: dict[str, tuple[Preset, str]] = {
    "int8": (
        _both(INT8_CHANNEL, {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}}, "max"),
        "INT8 weights per channel, INT8 activations per token, dynamic (W8A8)",
    ),
    "int8-static": (INT8_DEFAULT_CFG, "INT8 weights per channel, INT8 activations per tensor (W8A8)"),
    "int8-wo": (INT8_WEIGHT_ONLY_CFG, "INT8 weights per channel, activations untouched"),
    "fp8": (FP8_DEFAULT_CFG, "FP8 E4M3 weights and activations, one scale per tensor"),
    "fp8-pc-pt": (FP8_PER_CHANNEL_PER_TOKEN_CFG, "FP8 weights per channel, activations per token, dynamic"),
    "fp8-block": (FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG, "FP8 weights in tiles of 128 x 128, activations untouched"),
    "int4": (_int4(128), "INT4 weights in blocks of 128, activations untouched"),
    "int4-g64": (_int4(64), "INT4 weights in blocks of 64, activations untouched"),
    "int4-g32": (_int4(32), "INT4 weights in blocks of 32, activations untouched"),
    "nf4": (_both({"format": "nf4"}, None, "max"), "NF4 weights in blocks of 64, activations untouched"),
    "nvfp4": (NVFP4_DEFAULT_CFG, "NVFP4 weights and activations (blocks of 16, E4M3 block scales)"),
    "nvfp4-wo": (W4A16_NVFP4_CFG, "NVFP4 weights, activations untouched"),
    "nvfp4-mse": (NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG, "NVFP4, the weights' block scales chosen by squared error"),
    "mxfp4": (MXFP4_DEFAULT_CFG, "MXFP4 weights and activations (blocks of 32, power-of-two scales)"),
    "mxfp6": (MXFP6_DEFAULT_CFG, "MXFP6 E3M2 weights and activations"),
    "mxfp8": (MXFP8_DEFAULT_CFG, "MXFP8 E4M3 weights and activations"),
    "mxint8": (MXINT8_DEFAULT_CFG, "MXINT8 weights and activations"),
    "w4a8-nvfp4-fp8": (W4A8_NVFP4_FP8_CFG, "NVFP4 weights in blocks of 32, FP8 activations per tensor"),
    "w4a8-mxfp4-fp8": (W4A8_MXFP4_FP8_CFG, "MXFP4 weights, FP8 activations per tensor"),
}
KV_SCHEMES: dict[str, Preset] = {
    "fp8": FP8_KV_CFG,
    "fp8-affine": FP8_AFFINE_KV_CFG,
    "nvfp4": NVFP4_KV_CFG,
    "nvfp4-affine": NVFP4_AFFINE_KV_CFG,
    "nvfp4-rotate": NVFP4_KV_ROTATE_CFG,
}


def get_config(name: str) -> Preset:
    """Return a copy of the configuration of a scheme (`"nvfp4"`) or preset (`"NVFP4_DEFAULT_CFG"`).

    Raises UnknownNameError, with the nearest name.

    Example:
        >>> get_config("fp8")["algorithm"]
        'max'
    """
    if name in SCHEMES:
        return copy.deepcopy(SCHEMES[name][0])
    if name in PRESETS:
        return copy.deepcopy(PRESETS[name])
    hint = did_you_mean(str(name), [*SCHEMES, *PRESETS])
    raise UnknownNameError(f'There is no quantization scheme or preset "{name}".{hint} Schemes: {", ".join(SCHEMES)}.')


def update_quant_cfg_with_kv_cache_quant(quant_cfg: Preset | list[Entry], kv: list[Entry] | Preset | str) -> Any:
    """Return `quant_cfg` (a preset, or its list) with the entries of a KV-cache preset added at its end.

    `kv` is a list of entries, a preset such as `FP8_KV_CFG`, or a name of `KV_SCHEMES`. The arguments are not changed.
    """
    if isinstance(kv, str):
        if kv not in KV_SCHEMES:
            raise UnknownNameError(
                f'There is no KV-cache scheme "{kv}".{did_you_mean(kv, KV_SCHEMES)} Known: {", ".join(KV_SCHEMES)}.'
            )
        kv = KV_SCHEMES[kv]
    entries = copy.deepcopy(kv["quant_cfg"] if isinstance(kv, dict) else list(kv))
    if isinstance(quant_cfg, dict):
        whole = copy.deepcopy(quant_cfg)
        whole["quant_cfg"] = [*_listed(whole["quant_cfg"]), *entries]
        return whole
    return [*copy.deepcopy(quant_cfg), *entries]


def _listed(quant_cfg: Any) -> list[Entry]:
    """Bring a dict of patterns to the list dialect, so that entries can follow."""
    if isinstance(quant_cfg, list):
        return quant_cfg
    from modelopt.torch.quantization.config import QuantizeConfig

    return QuantizeConfig.parse({"quant_cfg": quant_cfg}).to_json()["quant_cfg"]
