from __future__ import annotations

import json

import pytest
import torch
import toy
from torch import nn

from modelopt.core.errors import CheckpointError, ConfigError, ModeError
from modelopt.torch.opt import (
    apply_mode,
    history,
    load_modelopt_state,
    modelopt_state,
    restore,
    restore_from_modelopt_state,
    save,
)

CHAINS = {
    "none": [],
    "one": [("scale", {"factor": 3.0})],
    "bf16": [("scale", {"dtype": "bfloat16"})],
    "float8": [("scale", {"dtype": "float8_e4m3fn"})],
    "chain": ["note", "scale", "note"],
    "packed": ["scale", "pack"],
}


def optimized(chain):
    return apply_mode(toy.Tied(), CHAINS[chain], registry=toy.REGISTRY)


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
@pytest.mark.parametrize("chain", CHAINS)
def test_round_trip_is_bit_equal(tmp_path, toy_modes, chain, name):
    model = optimized(chain)
    save(model, tmp_path / name)
    fresh = toy.Tied(seed=1)
    assert restore(fresh, tmp_path / name) is fresh
    assert toy.bits(fresh) == toy.bits(model)
    assert [type(m) for m in fresh.modules()] == [type(m) for m in model.modules()]
    assert history(fresh) == history(model)
    assert modelopt_state(fresh) == modelopt_state(model) == load_modelopt_state(tmp_path / name)
    if chain != "packed":
        assert torch.equal(fresh(toy.ids()), model(toy.ids()))
        assert fresh.head.weight is fresh.embed.weight
    # and once more, from what was restored
    save(fresh, tmp_path / f"second-{name}")
    assert toy.bits(restore(toy.Tied(seed=2), tmp_path / f"second-{name}")) == toy.bits(model)


def test_the_json_is_readable_and_the_tied_tensor_is_written_once(tmp_path, toy_modes):
    save(optimized("one"), tmp_path / "out")
    data = json.loads((tmp_path / "out/modelopt.json").read_text())
    assert data["steps"] == [
        {
            "mode": "scale",
            "config": {"factor": 3.0, "dtype": "float32"},
            "state": {"layers": ["block.0", "block.2", "head"]},
        }
    ]
    from safetensors import safe_open

    with safe_open(tmp_path / "out/model.safetensors", "pt") as f:
        assert "embed.weight" in f.keys() and "head.weight" not in f.keys()
        assert json.loads(f.metadata()["modelopt_aliases"])["head.weight"] == "embed.weight"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_ties_follow_the_file(tmp_path, toy_modes):
    untied = toy.Tied()
    untied.head.weight = nn.Parameter(torch.randn(11, 8))
    save(untied, tmp_path / "untied")
    save(toy.Tied(), tmp_path / "tied")
    model = restore(toy.Tied(seed=1), tmp_path / "untied")
    assert model.head.weight is not model.embed.weight and toy.bits(model) == toy.bits(untied)
    untied = toy.Tied(seed=1)
    untied.head.weight = nn.Parameter(torch.randn(11, 8))
    assert (model := restore(untied, tmp_path / "tied")).head.weight is model.embed.weight
    assert toy.bits(model) == toy.bits(toy.Tied())


def test_overlapping_views_and_strides(tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        model, base = nn.Module(), torch.randn(6, 4)
        model.register_buffer("whole", base)
        model.register_buffer("part", base[1:3])
        model.register_buffer("turned", base.t())
        model.register_buffer("empty", torch.zeros(0, 3))
        model.register_buffer("flag", torch.tensor(True))
        return model

    save(build(0), tmp_path / "out")
    assert toy.bits(restore(build(1), tmp_path / "out")) == toy.bits(build(0))


def test_parameters_keep_their_identity_and_dtype_follows_the_file(tmp_path, toy_modes):
    model = toy.Tied().bfloat16()
    save(model, tmp_path / "out")
    fresh = toy.Tied(seed=1)
    parameters = list(fresh.parameters())
    restore(fresh, tmp_path / "out")
    assert all(a is b for a, b in zip(parameters, fresh.parameters(), strict=True))
    assert toy.bits(fresh) == toy.bits(model) and all(p.requires_grad for p in fresh.parameters())
    with torch.device("meta"):
        empty = toy.Tied()
    assert toy.bits(restore(empty, tmp_path / "out")) == toy.bits(model)
    with torch.inference_mode():
        frozen = toy.Tied(seed=2)
    assert toy.bits(restore(frozen, tmp_path / "out")) == toy.bits(model)


@pytest.mark.parametrize("inner_first", [True, False])
def test_nested_histories_come_back_under_their_path(tmp_path, toy_modes, inner_first):
    def build(seed):
        return nn.ModuleDict({"a": toy.Tied(seed=seed), "b": toy.Tied(seed=seed + 1)})

    model = build(0)
    if inner_first:
        apply_mode(model["a"], [("scale", {"factor": 5.0})])
        apply_mode(model["b"].block, "scale")
        apply_mode(model, "note")
    else:
        apply_mode(model, "note")
        apply_mode(model["b"].block, "scale")
        apply_mode(model["a"], [("scale", {"factor": 5.0})])
    save(model, tmp_path / "out")
    fresh = restore(build(7), tmp_path / "out")
    assert toy.bits(fresh) == toy.bits(model)
    assert history(fresh) == history(model) and history(fresh["a"]) == history(model["a"])
    assert history(fresh["b"].block) == history(model["b"].block) and not history(fresh["b"])
    orders = {"root": history(fresh)[0].order, "a": history(fresh["a"])[0].order, "b": history(fresh["b"].block)[0].order}
    assert sorted(orders, key=orders.get) == (["a", "b", "root"] if inner_first else ["root", "b", "a"])
    assert modelopt_state(fresh) == modelopt_state(model) == load_modelopt_state(tmp_path / "out")


def test_a_wrapping_step_is_restored(tmp_path, toy_modes):
    model = apply_mode(toy.Tied(), ["scale", "wrap"])
    save(model, tmp_path / "out")
    fresh = restore(toy.Tied(seed=1), tmp_path / "out")
    assert isinstance(fresh, toy.Wrapper) and toy.bits(fresh) == toy.bits(model)


def test_compiled_and_parallel_models_are_saved_by_their_own_names(tmp_path, toy_modes):
    model = optimized("one")
    save(torch.compile(model, backend="eager"), tmp_path / "out")
    parallel = nn.DataParallel(toy.Tied(seed=1))
    assert restore(parallel, tmp_path / "out") is parallel
    assert toy.bits(parallel.module) == toy.bits(model)


def test_structure_alone(tmp_path, toy_modes):
    model = optimized("packed")
    save(model, tmp_path / "out")
    for kw in (
        {"modelopt_state": modelopt_state(model)},
        {"modelopt_state_path": tmp_path / "out"},
        {"modelopt_state_path": str(tmp_path / "out/modelopt.json")},
    ):
        fresh = restore_from_modelopt_state(toy.Tied(seed=1), **kw)
        assert history(fresh) == history(model)
        assert {n: (t.shape, t.dtype) for n, t in fresh.state_dict().items() if "_amax" not in n} == {
            n: (t.shape, t.dtype) for n, t in model.state_dict().items() if "_amax" not in n
        }
    with pytest.raises(ConfigError):
        restore_from_modelopt_state(toy.Tied())
    with pytest.raises(ModeError, match="already"):
        restore_from_modelopt_state(model, modelopt_state=modelopt_state(model))
    with pytest.raises(ModeError, match="already"):
        restore(model, tmp_path / "out")


def test_a_custom_registry_can_be_given(tmp_path):
    save(optimized("one"), tmp_path / "out")
    with pytest.raises(CheckpointError, match="There is no mode"):
        restore(toy.Tied(), tmp_path / "out")
    assert history(restore(toy.Tied(), tmp_path / "out", registry=toy.REGISTRY))


class Other(toy.Tied):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 12, bias=False)
        self.extra = nn.Linear(3, 3)


def test_another_architecture_leaves_the_model_as_it_was(tmp_path, toy_modes):
    save(optimized("one"), tmp_path / "out")
    model = Other()
    before, classes = toy.bits(model), [type(m) for m in model.modules()]
    with pytest.raises(
        CheckpointError, match="missing from the file: extra.*of another shape: head.weight .file .11, 8., model .12, 8."
    ):
        restore(model, tmp_path / "out")
    assert toy.bits(model) == before and [type(m) for m in model.modules()] == classes and not history(model)
    small = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match='the step "scale" does not fit'):
        restore(small, tmp_path / "out")
    assert type(small[0]) is nn.Linear and not history(small)
    save(toy.Tied(), tmp_path / "plain")
    with pytest.raises(CheckpointError, match="unknown to the model: .*embed.weight"):
        restore(small, tmp_path / "plain")


def test_existing_targets(tmp_path, toy_modes):
    model = optimized("one")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match="not empty"):
        save(model, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    save(model, tmp_path / "mine", overwrite=True)
    assert {p.name for p in (tmp_path / "mine").iterdir()} == {"thesis.txt", "modelopt.json", "model.safetensors"}
    save(model, tmp_path / "out")
    save(optimized("packed"), tmp_path / "out")  # our own directory is replaced
    assert len(load_modelopt_state(tmp_path / "out")["steps"]) == 2
    (tmp_path / "a.bin").write_text("x")
    with pytest.raises(CheckpointError, match="exists"):
        save(model, tmp_path / "a.bin")
    save(model, tmp_path / "b.safetensors")
    save(model, tmp_path / "b.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "b.safetensors", "mine", "out"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_an_interrupted_save_leaves_nothing(tmp_path, toy_modes, monkeypatch, error, name):
    from modelopt.torch.opt import files

    model = optimized("one")
    save(model, tmp_path / name)
    good = load_modelopt_state(tmp_path / name)
    save_file = files.save_file

    def fail(tensors, path, **kw):
        save_file(tensors, path, **kw)
        raise error

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt):
        save(optimized("chain"), tmp_path / name)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt):
        save(optimized("chain"), tmp_path / f"new-{name}")
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert load_modelopt_state(tmp_path / name) == good and history(restore(toy.Tied(), tmp_path / name))


def test_meta_tensors_and_extra_state_are_refused(tmp_path):
    with torch.device("meta"):
        model = toy.Tied()
    with pytest.raises(CheckpointError, match="meta device"):
        save(model, tmp_path / "out")

    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"x": 1}

    with pytest.raises(CheckpointError, match="extra state"):
        save(Extra(2, 2), tmp_path / "out")
    assert not list(tmp_path.iterdir())
