"""The plan is what the job does: same formats, same bytes, and the same refusals before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from modelopt.core.errors import ExportError, ModeError
from modelopt.recipes import Plan, parse_recipe, plan_model, run_recipe
from modelopt.recipes import source as sources
from modelopt.recipes.load import Recipe
from tests.recipes.tiny_llama import write_tiny


def job(model: Path, config: object, layout: str = "auto", **more: object) -> Recipe:
    data = {"model": str(model), "steps": [{"mode": "quantize", "config": config}], "export": {"layout": layout}}
    return parse_recipe({**data, "calibration": {"num_samples": 2, "length": 32}, **more})


def file_bytes(directory: Path) -> int:
    return sum(f.stat().st_size for f in directory.glob("*.safetensors"))


CASES = [
    ("nvfp4", "hf"),
    ("fp8", "hf"),
    ("int8-wo", "hf"),
    ("int4-g32", "hf"),
    ("int4-g32", "compressed-tensors"),
    ("int8", "auto"),
    ("mxfp4", "compressed-tensors"),
    ("mxfp8", "hf"),
    ({"preset": "nvfp4", "kv_cache": "fp8", "skip": ["*layers.1.mlp*"]}, "hf"),
]


@pytest.mark.parametrize(("config", "layout"), CASES, ids=[f"{c if isinstance(c, str) else 'kv'}-{x}" for c, x in CASES])
def test_the_plan_is_what_quantize_writes(config: object, layout: str, tiny: Path, tmp_path: Path) -> None:
    recipe = job(tiny, config, layout)
    plan = plan_model(recipe)
    result = run_recipe(recipe, tmp_path / "out", device="cpu")
    assert result.plan == plan
    assert file_bytes(result.directory) == pytest.approx(plan.num_bytes, rel=0.01)
    told = json.loads((result.directory / "modelopt.json").read_text())
    planned = {r.name.removesuffix(".weight"): (r.format, r.input_format or None) for r in plan.quantized}
    assert planned == {name: (v["weight"], v["input"]) for name, v in told["export"]["layers"].items()}


def test_the_directory_tells_its_own_story(tiny: Path, tmp_path: Path) -> None:
    recipe = job(tiny, {"preset": "int8-wo", "skip": ["*down_proj*"]})
    out = run_recipe(recipe, tmp_path / "out", device="cpu").directory
    steps = json.loads((out / "modelopt.json").read_text())["steps"]
    again = parse_recipe(
        {"steps": [{"mode": s["mode"], "config": s["config"]} for s in steps]}
    )  # history has the shape of a recipe
    assert plan_bits(tiny, again) == plan_bits(tiny, recipe)
    assert "skip:" in (out / "recipe.yaml").read_text()
    assert json.loads((out / "plan.json").read_text())["coverage"] == 1.0


def plan_bits(tiny: Path, recipe: Recipe) -> tuple[float, int]:
    plan = plan_model(recipe.model_copy(update={"model": str(tiny)}))
    return plan.bits_per_weight, plan.num_bytes


def test_sharded_weights_are_planned_like_single_ones(tiny: Path, tmp_path: Path) -> None:
    import transformers

    sharded = tmp_path / "sharded"
    transformers.AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(sharded, max_shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    one, many = plan_model(job(tiny, "mxfp4")), plan_model(job(sharded, "mxfp4"))
    assert (one.rows, one.num_bytes, one.source_bytes) == (many.rows, many.num_bytes, many.source_bytes)


def test_no_weight_is_read(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelopt.torch.export.readers.files import Tensors

    def refuse(*args: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Tensors, "__getitem__", refuse)
    monkeypatch.setattr(sources, "load_model", refuse)
    assert plan_model(job(tiny, "nvfp4")).coverage == 1.0


def test_what_rules_exclude_is_listed_by_whose_rule_it_is(tiny: Path) -> None:
    plan = plan_model(job(tiny, {"preset": "int8-wo", "skip": ["*layers.0.mlp.up_proj*"]}))
    assert [name for name, _, _ in plan.excluded_by_default] == ["lm_head.weight"]
    assert [(name, why) for name, _, why in plan.excluded_by_user] == [
        ("model.layers.0.mlp.up_proj.weight", 'rule "*layers.0.mlp.up_proj*"')
    ]
    assert plan.coverage == 1.0 and plan.left == ()
    row = next(r for r in plan.rows if r.name == "model.layers.0.mlp.up_proj.weight")
    assert row.format == "" and "up_proj" in row.why and row.before == row.after


def test_what_no_rule_excludes_and_none_selects_lowers_the_coverage(tiny: Path) -> None:
    only_down = {"quant_cfg": [{"quantizer_name": "*down_proj.weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}}]}
    plan = plan_model(job(tiny, only_down))
    assert plan.coverage < 0.5 and len(plan.quantized) == 2
    assert "model.layers.0.mlp.up_proj.weight" in {name for name, _, _ in plan.left}


def test_blocks_that_do_not_fit_are_refused_by_name_before_weights_are_loaded(tmp_path: Path, monkeypatch) -> None:
    from modelopt.recipes import run

    odd = write_tiny(tmp_path / "odd", hidden_size=96)
    plan = plan_model(job(odd, "int4-g64"))  # only down_proj, with 128 inputs, has whole blocks
    assert {name.rpartition(".")[2] for name, _ in plan.refused} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
    }
    assert all("block" in reason for _, reason in plan.refused)
    monkeypatch.setattr(run, "load_model", lambda *a: pytest.fail("weights were loaded"))
    with pytest.raises(ExportError, match="q_proj.*--skip"):
        run_recipe(job(odd, "int4-g64"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_format_without_a_layout_is_kept_in_our_own_form(tiny: Path, tmp_path: Path) -> None:
    from modelopt.recipes.source import load_any

    assert plan_model(job(tiny, "mxfp6")).refused
    out = run_recipe(job(tiny, "mxfp6", "modelopt"), tmp_path / "out", device="cpu").directory
    model = load_any(out)
    assert any("e3m2" in str(q.format) for q in model.modules() if hasattr(q, "is_enabled") and q.is_enabled)


def test_a_quantized_directory_is_not_quantized_again(tiny: Path, tmp_path: Path) -> None:
    out = run_recipe(job(tiny, "int8-wo"), tmp_path / "out", device="cpu").directory
    with pytest.raises(ModeError, match="already"):
        plan_model(job(out, "fp8"))


def test_a_mixture_of_experts_is_planned_expert_by_expert(tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=128, num_local_experts=4)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    recipe = job(tmp_path / "moe", "int8-wo")
    plan: Plan = plan_model(recipe)
    experts = [r for r in plan.quantized if "experts" in r.name]
    assert len(experts) == 4 * 3 and plan.coverage == 1.0
    result = run_recipe(recipe, tmp_path / "out", device="cpu")
    assert file_bytes(result.directory) == pytest.approx(plan.num_bytes, rel=0.01)


def test_another_dtype_of_the_file_is_planned_as_it_is_stored(tmp_path: Path) -> None:
    wide = write_tiny(tmp_path / "wide", dtype=torch.float32)
    plan = plan_model(job(wide, "int8-wo"))
    out = run_recipe(job(wide, "int8-wo"), tmp_path / "out", device="cpu").directory
    assert file_bytes(out) == pytest.approx(plan.num_bytes, rel=0.01)
