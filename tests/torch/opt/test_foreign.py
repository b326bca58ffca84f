"""Archives in the layout of NVIDIA's `mto.save`, written here from its description."""

from __future__ import annotations

import pytest
import torch
import toy

from modelopt.core.config import Config
from modelopt.core.errors import CheckpointError
from modelopt.torch.opt import foreign, history, load_modelopt_state, restore
from modelopt.torch.opt.mode import ModeRegistry


def archive(path, entries, tensors=None):
    state = {"modelopt_state_dict": entries, "modelopt_version": "0.47.0"}
    torch.save({"modelopt_state": state, "model_state_dict": tensors or {}}, path)
    return path


QUANT_CFG = {"quant_cfg": [{"quantizer_name": "*", "cfg": {"num_bits": (4, 3), "block_sizes": {-1: 16}}}], "algorithm": "max"}
META = {"quantizer_state": {"fc.weight_quantizer": {"_amax": {"shape": torch.Size([2, 1]), "dtype": torch.float32}}}}


def test_entries_become_steps_and_calibration_is_merged():
    entries = [
        ("quantize", {"config": QUANT_CFG, "metadata": {"quantizer_state": {"old": {}}}}),
        ("mse_calibrate", {"config": {"method": "mse", "step_size": 0.1}, "metadata": META}),
    ]
    version, steps = foreign.foreign_steps({"modelopt_state_dict": entries, "modelopt_version": "0.47.0"}, "x")
    assert version == "0.47.0" and len(steps) == 1
    assert steps[0]["config"]["algorithm"] == {"method": "mse", "step_size": 0.1}
    assert steps[0]["config"]["quant_cfg"][0]["cfg"] == {"num_bits": [4, 3], "block_sizes": {"-1": 16}}
    assert steps[0]["metadata"] == {
        "quantizer_state": {"fc.weight_quantizer": {"_amax": {"shape": [2, 1], "dtype": "torch.float32"}}}
    }
    entries[1] = ("max_calibrate", {"config": {"method": "max"}, "metadata": {}})
    assert foreign.foreign_steps({"modelopt_state_dict": entries}, "x")[1][0]["config"]["algorithm"] == "max"
    entries[1] = ("_no_calibrate", {"config": {}, "metadata": {}})
    assert foreign.foreign_steps({"modelopt_state_dict": entries}, "x")[1][0]["config"]["algorithm"] is None


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        {"modelopt_state_dict": {}},
        {"modelopt_state_dict": [("quantize",)]},
        {"modelopt_state_dict": [(1, {})]},
        {"modelopt_state_dict": [("quantize", {"config": [1]})]},
        {"modelopt_state_dict": [("max_calibrate", {"config": {}})]},
        {"modelopt_state_dict": [("quantize", {"config": {"x": float("nan")}})]},
        {"modelopt_state_dict": [("quantize", {"config": {"x": object()}})]},
    ],
)
def test_what_is_no_such_state(state):
    with pytest.raises(CheckpointError):
        foreign.foreign_steps(state, "the file")


def test_an_archive_is_restored(tmp_path, toy_modes):
    class Foreign(toy.ScaleMode):
        name = "foreign"

        class Config(Config):
            factor: float = 1.0

        def import_state(self, config, metadata):
            return {"factor": config["scale_by"]}, {"layers": list(metadata["quantizer_state"])}

    ModeRegistry.register("foreign", Foreign)
    try:
        model = toy.Tied()
        tensors = {**model.state_dict(), "head._amax": torch.tensor(4.0)}
        entry = ("foreign", {"config": {"scale_by": 4}, "metadata": {"quantizer_state": {"head": {}}}})
        path = archive(tmp_path / "model.pth", [entry], tensors)
        assert load_modelopt_state(path)["steps"][0]["config"] == {"factor": 4}
        fresh = restore(toy.Tied(seed=1), path)
        assert torch.equal(fresh(toy.ids()), model(toy.ids()) * 4)
        assert [s.mode for s in history(fresh)] == ["foreign"] and isinstance(fresh.head, toy.Scaled)
        del tensors["offset"]
        with pytest.raises(CheckpointError, match="missing from the file: offset"):
            restore(toy.Tied(seed=1), archive(tmp_path / "short.pth", [entry], tensors))
        with pytest.raises(CheckpointError, match="no mode"):
            restore(toy.Tied(), archive(tmp_path / "unknown.pth", [("medusa", {})], tensors))
        torch.save({"modelopt_state": {"modelopt_state_dict": []}}, tmp_path / "alone.pth")
        with pytest.raises(CheckpointError, match="model_state_dict"):
            restore(toy.Tied(), tmp_path / "alone.pth")
    finally:
        ModeRegistry.unregister("foreign")
