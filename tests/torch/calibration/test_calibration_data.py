"""What a forward loop may be; whose tokens a tensor holds; what a run remembers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelopt.core.errors import CalibrationError
from modelopt.torch.calibration import as_forward_loop, input_spec, run_forward, select_tokens, token_mask

MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


class Inner(nn.Module):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.seen = self.probe(x) if hasattr(self, "probe") else None
        return x


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, other: Tensor | None = None) -> Tensor:
        return self.inner(x, attention_mask=other)


@pytest.mark.parametrize("batch", [{"x": torch.ones(2, 3)}, (torch.ones(2, 3),), [torch.ones(2, 3)], torch.ones(2, 3)])
def test_batches_by_name_position_or_alone(batch: Any) -> None:
    seen: list[tuple[int, int | None, str]] = []
    assert run_forward(Outer(), [batch, batch], lambda *a: seen.append(a)) == 2
    assert seen == [(1, 2, "calibrating"), (2, 2, "calibrating")]


def test_callables_count_their_forwards() -> None:
    seen: list[tuple[int, int | None, str]] = []
    assert run_forward(Outer(), lambda m: [m(torch.ones(1)) for _ in range(3)], lambda *a: seen.append(a)) == 3
    assert seen[-1] == (3, None, "calibrating")


@pytest.mark.parametrize("loop", ["data", {"x": torch.ones(1)}, torch.ones(1), 3, None])
def test_what_is_no_loop(loop: Any) -> None:
    with pytest.raises(CalibrationError, match="forward_loop"):
        as_forward_loop(loop)


def test_shapes_find_their_mask() -> None:
    model = Outer()
    with token_mask(model) as tokens:
        found: dict[str, Any] = {}

        def probe(x: Tensor) -> None:
            found["btc"] = tokens.for_tensor(torch.zeros(2, 3, 4))
            found["flat"] = tokens.for_tensor(torch.zeros(6, 4))
            found["heads"] = tokens.for_tensor(torch.zeros(2, 5, 3, 4), heads_first=True)
            found["step"] = tokens.for_tensor(torch.zeros(2, 5, 1, 4), heads_first=True)
            found["other"] = tokens.for_tensor(torch.zeros(7, 4))
            with select_tokens(torch.tensor([5, 0, 3]), 6):
                found["routed"] = tokens.for_tensor(torch.zeros(3, 4))

        model.inner.probe = probe
        model(torch.zeros(2, 3, 4), MASK)
        assert tokens.for_tensor(torch.zeros(2, 3, 4)) is None  # outside of a forward nothing is masked
    real = MASK.bool()
    assert torch.equal(found["btc"][..., 0], real) and found["btc"].shape == (2, 3, 1)
    assert torch.equal(found["flat"][:, 0], real.flatten())
    assert torch.equal(found["heads"][:, 0, :, 0], real) and found["heads"].shape == (2, 1, 3, 1)
    assert torch.equal(found["step"].flatten(), real[:, -1])
    assert found["other"] is None
    assert found["routed"].flatten().tolist() == [False, True, True]


def test_the_innermost_mask_counts_and_hooks_leave() -> None:
    model, other = Outer(), torch.tensor([[0, 1, 1], [1, 1, 1]])
    with token_mask(model) as tokens:
        model.inner.probe = lambda x: tokens.for_tensor(torch.zeros(2, 3, 4))
        model(torch.zeros(1), MASK, other)
        assert torch.equal(model.inner.seen[..., 0], other.bool())
        model(torch.zeros(1), torch.ones(2, 3))
        assert model.inner.seen is None  # nothing is masked
        model.inner.probe = lambda x: 1 / 0
        with pytest.raises(ZeroDivisionError):
            model(torch.zeros(1), MASK)
        assert tokens.stack == []
    assert not model._forward_pre_hooks and not model.inner._forward_pre_hooks and not model._forward_hooks


def test_the_first_inputs_are_remembered() -> None:
    model = Outer()
    assert input_spec(model) is None
    run_forward(model, [{"x": torch.ones(2, 3), "attention_mask": MASK}, {"x": torch.ones(5, 3)}])
    spec = input_spec(model)
    assert spec == {
        "args": [],
        "kwargs": {"x": {"shape": [2, 3], "dtype": "float32"}, "attention_mask": {"shape": [2, 3], "dtype": "int64"}},
    }


def test_no_gradients_during_the_run() -> None:
    model = nn.Linear(2, 2)
    flags: list[bool] = []
    run_forward(model, lambda m: flags.append(m(torch.ones(1, 2)).requires_grad))
    assert flags == [False]
