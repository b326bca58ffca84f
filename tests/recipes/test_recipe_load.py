"""Recipes are strict, safe against strangers, and readable again after they were written."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelopt.core.errors import ConfigError, ModelOptError, UnknownNameError
from modelopt.recipes import builtin_recipes, load_recipe, parse_recipe, recipe_text
from modelopt.recipes.load import Recipe
from modelopt.recipes.steps import quantize_config, resolve_steps

STEPS = [{"mode": "quantize", "config": "nvfp4"}]


def recipe(**more: object) -> Recipe:
    return parse_recipe({"model": "somewhere", "steps": STEPS, **more})


def test_every_recipe_of_the_package_resolves_and_says_what_it_does() -> None:
    names = builtin_recipes()
    assert len(names) >= 4
    for name, description in names.items():
        assert description
        assert [mode for mode, _ in resolve_steps(load_recipe(name))] == ["quantize"]


def test_what_is_written_reads_back_without_aliases(tmp_path: Path) -> None:
    entry = {"num_bits": 8, "axis": 0}
    cfg = {"quant_cfg": [{"quantizer_name": "*weight_quantizer", "cfg": entry}, {"quantizer_name": "*q_proj*", "cfg": entry}]}
    made = parse_recipe({"model": "m", "steps": [{"mode": "quantize", "config": cfg}], "export": {"directory": "out"}})
    text = recipe_text(made)
    assert "&" not in text and "directory" not in text
    (tmp_path / "r.yaml").write_text(text)
    again = load_recipe(tmp_path / "r.yaml")
    assert again.steps == made.steps and again.calibration == made.calibration and again.export.directory is None


def test_the_short_form_is_the_preset_with_a_cache_and_exclusions() -> None:
    config = quantize_config({"preset": "fp8", "kv_cache": "fp8", "skip": ["*down_proj*"]})
    names = [e["quantizer_name"] for e in config["quant_cfg"]]
    assert names[-1] == "*down_proj*" and "*[kv]_bmm_quantizer" in names
    assert config["quant_cfg"][: len(quantize_config("fp8")["quant_cfg"])] == quantize_config("fp8")["quant_cfg"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"stepz": STEPS}, 'Did you mean "steps"'),
        ({"steps": STEPS, "calibration": {"num_sample": 3}}, 'Did you mean "num_samples"'),
        ({"steps": STEPS, "export": {"overwrite": True}}, "unknown key"),
        ({"steps": STEPS, "trust_remote_code": True}, "unknown key"),
        ({"steps": [{"mode": "quantize", "cfg": "nvfp4"}]}, 'Did you mean "config"'),
        ({"steps": []}, "steps"),
        ({"steps": STEPS * 1000}, "steps"),
        ({"steps": STEPS, "calibration": {"num_samples": 10**18}}, "num_samples"),
        ({"steps": STEPS, "calibration": {"length": 10**300}}, "length"),
        ({"steps": STEPS, "calibration": {"num_samples": True}}, "num_samples"),
        ({"steps": STEPS, "calibration": {"length": 2.5}}, "length"),
        ({"steps": STEPS, "evaluate": {"num_samples": -1}}, "num_samples"),
        (["steps"], "mapping"),
        (None, "mapping"),
    ],
)
def test_a_bad_recipe_is_refused_with_the_key(data: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_recipe(data)


@pytest.mark.parametrize("place", ["../out", "/etc/out", "a/../../b", "~/out", "a\\..\\..\\b", "C:\\out", "", " ", "a\0b"])
def test_a_recipe_cannot_write_outside_the_working_directory(place: str) -> None:
    with pytest.raises(ConfigError, match="--out"):
        recipe(export={"directory": place})


def test_a_recipe_may_write_below_the_working_directory() -> None:
    assert recipe(export={"directory": "results/nvfp4"}).export.directory == "results/nvfp4"


@pytest.mark.parametrize(
    "text",
    [
        "steps: !!python/object/apply:os.system ['echo hacked > hacked']",
        "steps: !!python/name:os.system",
        "a: &a [1, 2]\nsteps: [*a, *a]",
        "a: &a {b: 1}\n<<: *a",
        "steps: [" * 5000,
        "steps: [\n",
        "\x00",
        "- just\n- a list",
        "steps: [{mode: quantize, config: nvfp4}]\nmodel: {deep: " + "[" * 70 + "]" * 70 + "}",
    ],
    ids=["call", "name", "alias", "merge", "deep", "broken", "nul", "list", "nested"],
)
def test_hostile_yaml_is_refused_and_runs_nothing(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError):
        load_recipe("r.yaml")
    assert not (tmp_path / "hacked").exists()


def test_a_file_of_many_megabytes_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: " + "x" * (5 * 1024 * 1024))
    with pytest.raises(ConfigError, match="bytes"):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("step", "error", "says"),
    [
        ({"mode": "quantise", "config": "nvfp4"}, UnknownNameError, 'Did you mean "quantize"'),
        ({"mode": "quantize", "config": "nvpf4"}, UnknownNameError, 'Did you mean "nvfp4"'),
        ({"mode": "quantize", "config": {"preset": "fp8", "kv_cache": "fp9"}}, UnknownNameError, "fp8"),
        ({"mode": "quantize", "config": {"prest": "fp8"}}, ConfigError, 'Did you mean "preset"'),
        ({"mode": "calibrate", "config": "max"}, ConfigError, "mapping"),
        (
            {"mode": "quantize", "config": {"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "format": "nvfp4"}}}},
            ModelOptError,
            "nvfp4",
        ),
    ],
)
def test_steps_are_checked_before_any_work(step: dict[str, object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        resolve_steps(parse_recipe({"steps": [step]}))


def test_an_unknown_recipe_names_those_of_the_package() -> None:
    with pytest.raises(ConfigError, match='Did you mean "general/nvfp4"'):
        load_recipe("general/nvpf4")
