from __future__ import annotations

import pytest
import torch
import toy
from torch import nn

from modelopt.core.errors import ConfigError, ModeError, UnknownNameError
from modelopt.torch.opt import ModeloptStateManager, apply_mode, history, modelopt_state
from modelopt.torch.opt.mode import parse_steps, to_plain

R = toy.REGISTRY


@pytest.mark.parametrize(
    "mode",
    ["scale", ("scale", {"factor": 2.0}), [("scale", {})], [{"mode": "scale", "config": {}}], ["scale"], {"mode": "scale"}],
)
def test_every_spelling_of_a_step(mode):
    model = toy.Tied()
    assert apply_mode(model, mode, registry=R) is model
    assert [s.mode for s in history(model)] == ["scale"]
    assert history(model)[0].config == {"factor": 2.0, "dtype": "float32"}
    assert history(model)[0].state == {"layers": ["block.0", "block.2", "head"]}


def test_a_history_can_be_applied_again():
    model = apply_mode(toy.Tied(), [("note", {}), ("scale", {"factor": 3.0})], registry=R)
    steps = [{"mode": s.mode, "config": s.config} for s in history(model)]
    again = apply_mode(toy.Tied(), steps, registry=R)
    assert history(again) == history(model)


@pytest.mark.parametrize("bad", [3, [3], [("scale", 3)], {"mood": "scale"}, [{"mode": "scale", "x": 1}], [("a", {}, 1)]])
def test_bad_modes_are_refused(bad):
    with pytest.raises(ConfigError):
        parse_steps(bad)


def test_chain_is_checked_before_the_model_is_touched():
    model = toy.Tied()
    before = type(model.head)
    with pytest.raises(UnknownNameError, match='Did you mean "pack"'):
        apply_mode(model, ["scale", "packk"], registry=R)
    with pytest.raises(ConfigError, match='Did you mean "factor"'):
        apply_mode(model, ["note", ("scale", {"facto": 1})], registry=R)
    with pytest.raises(ModeError, match='"pack" needs one of'):
        apply_mode(model, ["note", "pack"], registry=R)
    with pytest.raises(ModeError, match="already"):
        apply_mode(model, ["scale", "scale"], registry=R)
    with pytest.raises(ModeError, match="nothing may follow"):
        apply_mode(model, ["scale", "pack", "note"], registry=R)
    assert type(model.head) is before and history(model) == ()


def test_a_failing_second_step_leaves_a_truthful_history():
    model = toy.Tied()
    with pytest.raises(RuntimeError, match="asked to fail"):
        apply_mode(model, ["note", "scale"], registry=R, mode_kwargs=[{}, {"fail": True}])
    assert [s.mode for s in history(model)] == ["note"]


def test_order_across_calls():
    model = apply_mode(toy.Tied(), ["scale", "pack"], registry=R)
    with pytest.raises(ModeError, match="nothing may follow"):
        apply_mode(model, "note", registry=R)
    model = apply_mode(toy.Tied(), ["note", "note"], registry=R)
    assert len(history(model)) == 2


def test_init_state():
    model = toy.Tied()
    with pytest.raises(ModeError, match="no history"):
        apply_mode(model, "note", registry=R, init_state=False)
    apply_mode(model, "note", registry=R, init_state=True)
    with pytest.raises(ModeError, match="has the steps note"):
        apply_mode(model, "note", registry=R, init_state=True)
    apply_mode(model, "note", registry=R, init_state=False)


def test_a_submodule_that_was_done_already_is_not_done_twice():
    model = toy.Tied()
    apply_mode(model.block, "scale", registry=R)
    with pytest.raises(ModeError, match='"block"'):
        apply_mode(model, "scale", registry=R)
    apply_mode(model.head, "scale", registry=R)
    assert set(modelopt_state(model)["nested"]) == {"block", "head"}
    assert history(model) == ()
    assert ModeloptStateManager.is_converted(model) and not ModeloptStateManager.is_converted(model, is_root=True)


def test_wrapping_moves_the_history():
    model = toy.Tied()
    wrapped = apply_mode(apply_mode(model, "scale", registry=R), "wrap", registry=R)
    assert isinstance(wrapped, toy.Wrapper) and history(model) == ()
    assert [s.mode for s in history(wrapped)] == ["scale", "wrap"]
    assert modelopt_state(wrapped)["nested"] == {}
    # the wrapping step rewrites: the names recorded before it stay
    assert modelopt_state(wrapped)["steps"][0]["state"] == {"layers": ["block.0", "block.2", "head"]}


def test_state_is_read_when_it_is_asked_for():
    model = apply_mode(toy.Tied(), "scale", registry=R)
    model.head = nn.Linear(8, 11)
    assert modelopt_state(model)["steps"][0]["state"] == {"layers": ["block.0", "block.2"]}


def test_wrapped_models():
    model = toy.Tied()
    parallel = nn.DataParallel(model)
    assert apply_mode(parallel, "scale", registry=R) is parallel
    assert [s.mode for s in history(parallel)] == ["scale"] == [s.mode for s in history(model)]


def test_plain_values():
    assert to_plain({1: (2, 3.0, None, True)}, "x") == {"1": [2, 3.0, None, True]}
    for bad in (float("nan"), torch.zeros(1), object()):
        with pytest.raises(ConfigError, match="x.k"):
            to_plain({"k": bad}, "x")
