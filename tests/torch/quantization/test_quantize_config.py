"""Three dialects in, one list of rules out; contradictions and misspellings are errors that say so."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelopt.core.errors import ConfigError
from modelopt.core.logging import ModelOptWarning
from modelopt.torch.quantization.config import QuantizeConfig, QuantizerAttributeConfig, resolve_rules
from modelopt.torch.quantization.rules import warn_unmatched

LINEAR = ("nn.Linear",)


def fmt(**keys: Any) -> str:
    return str(QuantizerAttributeConfig.parse(keys).to_format())


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({}, "i8[...]*f32"),
        ({"num_bits": 8}, "i8[...]*f32"),
        ({"num_bits": 4}, "i4[...]*f32"),
        ({"num_bits": 8, "unsigned": True}, "u8[...]*f32"),
        ({"num_bits": 8, "narrow_range": True, "axis": 0}, "i8n[1,...]*f32"),
        ({"num_bits": 8, "axis": 1}, "i8[-1,1,...]*f32"),
        ({"num_bits": 8, "axis": [0, 1]}, "i8[1,1,...]*f32"),
        ({"num_bits": 8, "axis": -1}, "i8[...,1]*f32"),
        ({"num_bits": 8, "type": "dynamic"}, "i8[...]~*f32"),
        ({"num_bits": "e4m3"}, "e4m3[...]*f32"),
        ({"num_bits": [5, 2]}, "e5m2[...]*f32"),
        ({"num_bits": "e2m1", "block_sizes": {"-1": 32, "type": "dynamic", "scale_bits": "e8m0"}}, "e2m1[32]~*e8m0"),
        ({"num_bits": "e2m1", "block_sizes": {-1: 16, "type": "static", "scale_bits": "e4m3"}}, "e2m1[16]*e4m3[...]*f32"),
        ({"num_bits": 4, "block_sizes": {-2: 64}}, "i4[64,1]*f32"),
        ({"num_bits": 8, "format": "fp8"}, "e4m3[...]*f32"),
        ({"num_bits": 8, "format": "e5m2"}, "e5m2[...]*f32"),
        ({"num_bits": 4, "format": "nvfp4"}, "e2m1[16]~*e4m3[...]*f32"),
        ({"format": "nvfp4"}, "e2m1[16]~*e4m3[...]*f32"),
        ({"num_bits": (2, 1), "format": "mxfp4"}, "e2m1[32]~*e8m0"),
        ({"format": "fp8", "axis": 0}, "e4m3[1,...]*f32"),
        ({"format": "fp8", "type": "dynamic", "block_sizes": {-1: None}}, "e4m3[-1]~*f32"),
        ({"format": "u4[64]*f16+u4"}, "u4[64]*f16+u4"),
        ({"format": "nvfp4", "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}, "e2m1[16]~*e4m3[...]*f32"),
    ],
)
def test_attributes_to_format(keys: dict[str, Any], text: str) -> None:
    assert fmt(**keys) == text


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_bits": 8, "format": "nvfp4"}, "contradicts"),
        ({"num_bits": 4, "format": "fp8"}, "contradicts"),
        ({"num_bits": (5, 2), "format": "fp8"}, "contradicts"),
        ({"format": "nvfp4", "axis": 0}, "contradicts"),
        ({"format": "nvfp4", "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (4, 3)}}, "contradicts"),
        ({"format": "fp8", "unsigned": True}, "contradicts"),
        ({"format": "nvpf4"}, 'mean "nvfp4"'),
        ({"num_bitz": 8}, 'mean "num_bits"'),
        ({"num_bits": "e9m9"}, "e9m9"),
        ({"num_bits": (9, 9)}, "no .9, 9. float"),
        ({"num_bits": 64}, "2 to 8"),
        ({"num_bits": True}, "bool"),
        ({"axis": 0, "block_sizes": {-1: 16}}, "exclude"),
        ({"block_sizes": {-1: 0}}, "positive"),
        ({"block_sizes": {-1: 16, "tpye": "static"}}, 'mean "type"'),
        ({"block_sizes": {"type": "static"}}, "no dimension"),
        ({"block_sizes": {1: 16}}, "front"),
        ({"block_sizes": {-1: 16, "scale_bits": (5, 2)}}, "scale_bits"),
        ({"type": "dynamik"}, "static"),
        ({"constant_amax": -1.0}, "positive"),
    ],
)
def test_bad_attributes_say_why(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizerAttributeConfig.parse(keys)


def test_keys_that_nothing_serves_are_refused_when_used() -> None:
    parse = QuantizerAttributeConfig.parse
    for keys in ({"backend": "mine"}, {"fake_quant": False}, {"learn_amax": True}, {"rotate": {"mode": "spin"}}):
        with pytest.raises(ConfigError, match=next(iter(keys))):
            parse(keys).check_served()
    for bias in ({-1: None, "type": "dynamic"}, {-1: None, "method": "max_min"}, {"type": "static"}, {0: None}):
        with pytest.raises(ConfigError, match="bias"):
            parse({"bias": bias}).check_served()
    parse({"backend": "mine", "bias": {-2: None, "-4": None, "type": "static"}, "rotate": True}).check_served(("mine",))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "mapping"),
        ({}, "quant_cfg"),
        ({"quant_config": []}, 'mean "quant_cfg"'),
        ({"quant_cfg": 3}, "list of entries"),
        ({"quant_cfg": [{"quantizer_nam": "*"}]}, 'mean "quantizer_name"'),
        ({"quant_cfg": [{"quantizer_name": "*", "num_bits": 8}]}, 'under "cfg"'),
        ({"quant_cfg": [{"quantizer_name": "*"}]}, "says nothing"),
        ({"quant_cfg": [{"quantizer_name": "*", "cfg": []}]}, "empty"),
        ({"quant_cfg": [{"quantizer_name": "*", "cfg": {"enable": True}, "enable": False}]}, "Keep one"),
        ({"quant_cfg": {"*weight_quantizer": {"num_bitz": 8}}}, "weight_quantizer.*num_bits"),
        ({"quant_cfg": {"*weight_quantizer": 8}}, "weight_quantizer"),
        ({"quant_cfg": {}, "algorithm": {"alpha": 1}}, "method"),
        ({"quant_cfg": {}, "algorithm": [3]}, "algorithm"),
    ],
)
def test_bad_configs_say_why(data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizeConfig.parse(data)


def resolve(quant_cfg: Any, name: str, classes: tuple[str, ...] = LINEAR) -> tuple[str | None, bool | None]:
    config = QuantizeConfig.parse({"quant_cfg": quant_cfg})
    cfgs, enable = resolve_rules(config.rules, [(name, name.rsplit(".", 1)[-1], classes)])[name]
    return (None if cfgs is None else " + ".join(str(c.to_format()) for c in cfgs)), enable


W8 = {"num_bits": 8, "axis": 0}


def test_dialects_agree() -> None:
    as_list = [
        {"quantizer_name": "*weight_quantizer", "cfg": W8},
        {"quantizer_name": "*", "parent_class": "nn.Conv2d", "enable": False},
    ]
    as_dict = {"*weight_quantizer": {**W8, "enable": True}, "nn.Conv2d": {"*": {"enable": False}}}
    for quant_cfg in (as_list, as_dict):
        assert resolve(quant_cfg, "a.weight_quantizer") == ("i8[1,...]*f32", True)
        assert resolve(quant_cfg, "a.weight_quantizer", ("nn.Conv2d", "nn.Module"))[1] is False
        assert resolve(quant_cfg, "a.input_quantizer") == (None, None)


def test_default_is_weakest_wherever_it_stands() -> None:
    for quant_cfg in (
        {"*weight_quantizer": W8, "default": {"num_bits": 8, "format": "fp8"}},
        {"default": {"num_bits": 8, "format": "fp8"}, "*weight_quantizer": W8},
    ):
        assert resolve(quant_cfg, "a.weight_quantizer") == ("i8[1,...]*f32", True)
        assert resolve(quant_cfg, "a.input_quantizer") == ("e4m3[...]*f32", True)


def test_toggle_keeps_attributes_and_attributes_enable() -> None:
    off_on = [{"quantizer_name": "*weight_quantizer", "cfg": W8}, {"quantizer_name": "*", "enable": False}]
    assert resolve(off_on, "a.weight_quantizer") == ("i8[1,...]*f32", False)
    assert resolve([*off_on, {"quantizer_name": "a.*", "enable": True}], "a.weight_quantizer") == ("i8[1,...]*f32", True)
    assert resolve([*off_on, {"quantizer_name": "*", "cfg": {"num_bits": 4}}], "a.weight_quantizer") == ("i4[...]*f32", True)
    assert resolve([{"quantizer_name": "*", "cfg": W8, "enable": False}], "a.weight_quantizer") == ("i8[1,...]*f32", False)


@pytest.mark.parametrize("kind", ["output_quantizer", "k_bmm_quantizer", "softmax_quantizer", "bmm2_output_quantizer"])
def test_only_patterns_that_name_the_kind_switch_it_on(kind: str) -> None:
    name = f"lm_head.{kind}"
    for pattern in ("*lm_head*", "default", "*", "*_quantizer", "*input_quantizer"):
        assert resolve({pattern: W8}, name) == (None, None)
        assert resolve({pattern: {"enable": True}}, name) == (None, None)
    assert resolve({f"*{kind}": W8}, name) == ("i8[1,...]*f32", True)
    assert resolve({f"*{kind}": W8, "*lm_head*": {"enable": False}}, name) == ("i8[1,...]*f32", False)


def test_opt_in_modules_answer_to_their_class_or_their_own_name() -> None:
    name, classes = "model.mlp.norm.input_quantizer", ("torch.nn.modules.normalization.LayerNorm", "nn.LayerNorm")
    for pattern in ("*input_quantizer", "default", "*mlp*", "*"):
        assert resolve({pattern: W8}, name, classes) == (None, None)
    assert resolve({"*norm*": W8}, name, classes)[1] is True
    assert resolve({"*mlp.norm.input_quantizer": W8}, name, classes)[1] is True
    assert resolve({"nn.LayerNorm": {"*input_quantizer": W8}}, name, classes)[1] is True
    assert resolve({"nn.BatchNorm2d": {"*input_quantizer": W8}}, name, classes) == (None, None)
    assert resolve({"*mlp*": W8}, "model.mlp.up.input_quantizer")[1] is True
    for cls in ("nn.Embedding", "LlamaRMSNorm", "nn.BatchNorm2d", "nn.MaxPool2d", "QuantEmbedding", "nn.LeakyReLU"):
        assert resolve({"default": W8}, "a.input_quantizer", (cls,)) == (None, None), cls


def test_sequential() -> None:
    steps = [{"num_bits": 4, "block_sizes": {-1: 128}}, {"num_bits": (4, 3)}]
    assert resolve({"*weight_quantizer": steps}, "a.weight_quantizer") == ("i4[128]*f32 + e4m3[...]*f32", True)


def test_a_pattern_that_matches_nothing_warns_with_the_nearest_name() -> None:
    config = QuantizeConfig.parse(
        {"quant_cfg": {"*lm_haed*": {"enable": False}, "*vision_tower*": {"enable": False}, "default": W8}}
    )
    names = ["model.lm_head.weight_quantizer", "model.up.weight_quantizer"]
    with pytest.warns(ModelOptWarning, match="lm_haed.*lm_head") as seen:
        assert warn_unmatched(config.rules, names, ignore=["*vision_tower*"]) == ["*lm_haed*"]
    assert len(seen) == 1


bits = st.one_of(st.integers(2, 8), st.sampled_from([(4, 3), (5, 2), (2, 1), (3, 2)]))
blocks = st.fixed_dictionaries({-1: st.sampled_from([16, 32, None])}, optional={"type": st.sampled_from(["static", "dynamic"])})


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["*weight_quantizer", "*", "default", "a.*"]), bits, st.none() | blocks, st.none() | st.booleans()
        )
    )
)
def test_json_round_trip(items: list[tuple[Any, ...]]) -> None:
    entries = [
        {"quantizer_name": p, "cfg": {"num_bits": b, **({"block_sizes": s} if s else {})}, **({} if e is None else {"enable": e})}
        for p, b, s, e in items
    ]
    config = QuantizeConfig.parse({"quant_cfg": entries})
    again = QuantizeConfig.parse(config.to_json())
    assert again == config and again.rules == config.rules and again.to_json() == config.to_json()
