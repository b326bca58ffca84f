"""Every preset resolves to NVIDIA's published attributes, and each of those to the format that we say it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modelopt.core.errors import UnknownNameError
from modelopt.torch.quantization import presets
from modelopt.torch.quantization.config import QuantizeConfig

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "quantization_presets.json").read_text())

NVFP4, NVFP4_STATIC, NVFP4_32 = "e2m1[16]~*e4m3[...]*f32", "e2m1[16]*e4m3[...]*f32", "e2m1[32]~*e4m3[...]*f32"
NVFP4_46, FP8, FP8_PC, FP8_PT, FP8_2D = (
    "e2m1[16]*e4m3:46[...]*f32",
    "e4m3[...]*f32",
    "e4m3[1,...]*f32",
    "e4m3[-1]~*f32",
    "e4m3[128,128]*f32",
)
INT8, INT8_PC, INT4, MXFP4 = "i8[...]*f32", "i8[1,...]*f32", "i4[128]*f32", "e2m1[32]~*e8m0"
MXFP6, MXFP8, MXINT8 = "e3m2[32]~*e8m0", "e4m3[32]~*e8m0", "i8[32]~*e8m0"
# preset -> the distinct formats of its enabled entries, in order
FORMATS: dict[str, list[str]] = {
    "INT8_DEFAULT_CFG": [INT8_PC, INT8],
    "INT8_SMOOTHQUANT_CFG": [INT8_PC, INT8],
    "INT8_WEIGHT_ONLY_CFG": [INT8_PC],
    "FP8_DEFAULT_CFG": [FP8],
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": [FP8_PC, FP8_PT],
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": [FP8_2D],
    "FP8_KV_CFG": [FP8],
    "FP8_AFFINE_KV_CFG": [FP8],
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": [INT4],
    "INT4_AWQ_CFG": [INT4],
    "W4A8_AWQ_BETA_CFG": [INT4, FP8],
    "MXFP8_DEFAULT_CFG": [MXFP8],
    "MXFP6_DEFAULT_CFG": [MXFP6],
    "MXFP4_DEFAULT_CFG": [MXFP4],
    "MXINT8_DEFAULT_CFG": [MXINT8],
    "MXFP4_MLP_WEIGHT_ONLY_CFG": [MXFP4],
    "W4A8_MXFP4_FP8_CFG": [MXFP4, FP8],
    "W4A8_NVFP4_FP8_CFG": ["e2m1[32]~*e4m3:fp8[...]*f32", FP8],
    "NVFP4_MLP_WEIGHT_ONLY_CFG": [NVFP4_32],
    "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG": [NVFP4_STATIC, NVFP4],
    "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG": [NVFP4_STATIC, NVFP4],
    "NVFP4_FOUR_OVER_SIX_CFG": [NVFP4_46, NVFP4],
    "NVFP4_FP8_MHA_CONFIG": [NVFP4, FP8],
    "MAMBA_MOE_FP8_AGGRESSIVE_CFG": [FP8],
    "MAMBA_MOE_FP8_CONSERVATIVE_CFG": [FP8],
}


def _plain(value: Any) -> Any:
    """As JSON has it: string keys, lists, and 1 for True in four_over_six (the golden file's spelling); our own key aside."""
    text = json.loads(json.dumps(value))
    for cfg in text if isinstance(text, list) else [text]:
        cfg.get("block_sizes", {}).pop("scale_rule", None)
        if "four_over_six" in cfg.get("block_sizes", {}):
            cfg["block_sizes"]["four_over_six"] = int(cfg["block_sizes"]["four_over_six"])
    return text


def test_names_are_nvidias() -> None:
    assert set(presets.PRESETS) == set(GOLDEN["presets"])


@pytest.mark.parametrize("name", sorted(GOLDEN["presets"]))
def test_preset_equals_golden(name: str) -> None:
    preset, golden = presets.PRESETS[name], GOLDEN["presets"][name]
    wanted = [(e[0], e[1], e[2] if len(e) > 2 else None) for e in golden["entries"]]
    entries = [e for e in preset["quant_cfg"] if "cfg" in e]
    assert [(e["quantizer_name"], _plain(e["cfg"]), e.get("enable")) for e in entries] == wanted
    others = [e for e in preset["quant_cfg"] if "cfg" not in e and e not in presets.heads_disabled]
    assert len(others) == golden["disabled"]
    assert preset.get("algorithm") == golden["algorithm"] and ("algorithm" in preset) == golden["has_algorithm"]


@pytest.mark.parametrize("name", ["default_disabled", "mamba_moe_disabled"])
def test_disabled_lists(name: str) -> None:
    ours = [[e["quantizer_name"], *([e["parent_class"]] if "parent_class" in e else [])] for e in getattr(presets, name)]
    assert ours == GOLDEN[f"{name}_quantizer_cfg"]
    assert all(e["enable"] is False for e in getattr(presets, name))


@pytest.mark.parametrize("name", sorted(presets.PRESETS))
def test_formats(name: str) -> None:
    config = QuantizeConfig.parse(presets.PRESETS[name])
    on = [r for r in config.rules if r.switches_on and r.cfgs]
    found = list(dict.fromkeys(str(c.to_format()) for r in on for c in r.cfgs or ()))
    assert found == FORMATS.get(name, [NVFP4])


@pytest.mark.parametrize("name", sorted(presets.PRESETS) + sorted(presets.SCHEMES))
def test_json_round_trip(name: str) -> None:
    config = QuantizeConfig.parse(presets.get_config(name))
    again = QuantizeConfig.parse(json.loads(json.dumps(config.to_json())))
    assert again == config and again.rules == config.rules


def test_get_config_copies_and_suggests() -> None:
    mine = presets.get_config("nvfp4")
    mine["quant_cfg"].clear()
    assert presets.NVFP4_DEFAULT_CFG["quant_cfg"]
    with pytest.raises(UnknownNameError, match='mean "nvfp4"'):
        presets.get_config("nvpf4")


def test_kv_merge_changes_nothing_and_comes_last() -> None:
    before = json.dumps(presets.FP8_DEFAULT_CFG)
    merged = presets.update_quant_cfg_with_kv_cache_quant(presets.FP8_DEFAULT_CFG, presets.NVFP4_KV_CFG)
    assert json.dumps(presets.FP8_DEFAULT_CFG) == before
    assert merged["quant_cfg"][-1]["quantizer_name"] == "*[kv]_bmm_quantizer" and merged["algorithm"] == "max"
    only = presets.update_quant_cfg_with_kv_cache_quant({"quant_cfg": {"*weight_quantizer": {"num_bits": 8}}}, "fp8")
    assert len(only["quant_cfg"]) == 2
    QuantizeConfig.parse(only)
    with pytest.raises(UnknownNameError, match="fp8"):
        presets.update_quant_cfg_with_kv_cache_quant(merged, "fp9")
