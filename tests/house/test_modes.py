"""Law 4, modes: every ordered pair of registered modes does what docs/composability.md says."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from modelopt.core.errors import ModelOptError
from modelopt.torch import opt as mto
from modelopt.torch.opt.mode import ModeRegistry, apply_mode
from tests.house.test_floors import ROOT

CONFIG = {"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "axis": 0}, "*input_quantizer": {"num_bits": 8}}, "algorithm": "max"}
BATCHES = [torch.randn(4, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def table() -> dict[tuple[str, str], str]:
    rows = [line for line in (ROOT / "docs" / "composability.md").read_text().splitlines() if line.startswith("| ")]
    head = [c.strip() for c in rows[0].strip("|").split("|")][1:]
    cells = [[c.strip() for c in r.strip("|").split("|")] for r in rows[1:]]
    return {(r[0], column): r[i + 1] for r in cells for i, column in enumerate(head)}


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval()


PRUNING = {"structured": {"ratio": 0.25}, "fastnas": {"constraints": {"params": "80%"}}}


def step(model: nn.Module, name: str) -> nn.Module:
    data: dict = {} if name == "compress" else {"forward_loop": BATCHES}
    if name in PRUNING:
        data = {"dummy_input": BATCHES[0], "score_func": lambda m: -float(m(BATCHES[0]).detach().square().mean())}
    return apply_mode(model, [(name, CONFIG if name == "quantize" else PRUNING.get(name, {}))], mode_kwargs=data)


def test_the_table_names_every_registered_mode():
    assert {a for a, _ in table()} == {b for _, b in table()} == set(ModeRegistry.names())


@pytest.mark.parametrize(("first", "second"), itertools.product(ModeRegistry.names(), repeat=2))
def test_pair(first, second, tmp_path):
    model = build()
    for name in [first] if first == "quantize" or first in PRUNING else ["quantize", first]:
        step(model, name)
    x = torch.randn(3, 64)
    before, steps = model(x), len(mto.history(model))
    if table()[first, second] == "refused":
        with pytest.raises(ModelOptError, match="[.]"):
            step(model, second)
        assert torch.equal(model(x), before) and len(mto.history(model)) == steps
        return
    step(model, second)
    assert [s.mode for s in mto.history(model)][-1] == second
    mto.save(model, tmp_path / "saved")
    again = mto.restore(build(), tmp_path / "saved")
    assert torch.equal(again(x), model(x))
    assert mto.history(again) == mto.history(model)
