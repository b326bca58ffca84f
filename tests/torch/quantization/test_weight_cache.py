"""Fake-quantized weights are computed once in evaluation, and never stale."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import modelopt.torch.quantization as mtq
from modelopt.core.errors import ConfigError
from modelopt.torch.quantization.nn import weight_cache

W8 = {"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "axis": 0}}, "algorithm": "max"}


class _Counter:
    """Counts calls of the fake_quantize op, whatever dispatch mode is active."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from modelopt.torch import kernels

        self.count = 0
        plain = kernels.fake_quantize

        def counted(*args, **kwargs):
            self.count += 1
            return plain(*args, **kwargs)

        monkeypatch.setattr(kernels, "fake_quantize", counted)

    def of(self, fn) -> int:
        before = self.count
        fn()
        return self.count - before


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> _Counter:
    return _Counter(monkeypatch)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    weight_cache.clear_weight_cache()
    yield
    weight_cache.set_weight_cache_budget(weight_cache.DEFAULT_BUDGET)
    weight_cache.clear_weight_cache()


@pytest.fixture
def layer() -> nn.Module:
    torch.manual_seed(0)
    return mtq.quantize(nn.Sequential(nn.Linear(96, 80)).eval(), W8)


X = torch.randn(3, 96)


def fresh_output(model: nn.Module, x: torch.Tensor = X) -> torch.Tensor:
    """What the forward gives when nothing is cached."""
    with torch.no_grad():
        linear = model[0]
        return nn.functional.linear(x, linear.weight_quantizer(linear.weight), linear.bias)


def run(model: nn.Module, x: torch.Tensor = X) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def test_a_second_forward_quantizes_nothing(layer: nn.Module, counter: _Counter) -> None:
    assert counter.of(lambda: run(layer)) == 1
    assert counter.of(lambda: [run(layer) for _ in range(3)]) == 0
    assert weight_cache.weight_cache_bytes() >= 96 * 80 * 4
    with torch.inference_mode():
        assert counter.of(lambda: layer(X)) == 0
    assert torch.equal(run(layer), fresh_output(layer))


CHANGES = {
    "in place": lambda m: m[0].weight.mul_(1.5),
    "one element": lambda m: m[0].weight[79, 95].add_(0.25),
    "through .data": lambda m: m[0].weight.data.mul_(0.5),
    "one element through .data": lambda m: m[0].weight.data[40, 17].copy_(torch.tensor(-0.07)),
    "last element through .data": lambda m: m[0].weight.data.view(-1)[-1:].neg_(),
    "rows swapped through .data": lambda m: m[0].weight.data.copy_(m[0].weight.data.flip(0)),
    "columns swapped through .data": lambda m: m[0].weight.data.copy_(m[0].weight.data.flip(1)),
    "another .data": lambda m: setattr(m[0].weight, "data", m[0].weight.data * 2),
    "another parameter": lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight * 2)),
    "amax": lambda m: setattr(m[0].weight_quantizer, "amax", m[0].weight_quantizer.amax * 2),
    "amax through .data": lambda m: m[0].weight_quantizer._amax.data.mul_(2),
    "format": lambda m: setattr(m[0].weight_quantizer, "format", "i4[1,...]*f32"),
    "disabled": lambda m: m[0].weight_quantizer.disable(),
    "dtype": lambda m: m.double(),
    "half": lambda m: m.to(torch.bfloat16),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_change_is_seen(change: str, mode, layer: nn.Module) -> None:
    before = run(layer)
    with torch.no_grad():
        CHANGES[change](layer)
    x = X.to(layer[0].weight.dtype)
    with mode():
        after = layer(x)
    assert torch.equal(after, fresh_output(layer, x))
    assert not torch.equal(after.float(), before)


def test_changes_under_inference_mode_are_seen() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(96, 80)).eval()
        mtq.quantize(model, W8)
        assert model[0].weight.is_inference()
        before = model(X)
        model[0].weight.mul_(2)
        after = model(X)
        assert not torch.equal(after, before)
        assert torch.equal(after, nn.functional.linear(X, model[0].weight_quantizer(model[0].weight), model[0].bias))


def test_an_optimizer_step_is_seen(layer: nn.Module, counter: _Counter) -> None:
    run(layer)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    assert counter.of(lambda: layer(X).sum().backward()) == 1  # gradients are needed: the op runs
    optimizer.step()
    assert torch.equal(run(layer), fresh_output(layer))


def test_copies_and_state_dicts_have_no_part_in_it(layer: nn.Module) -> None:
    run(layer)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin[0].weight.mul_(3)
    assert torch.equal(run(twin), fresh_output(twin)) and torch.equal(run(layer), fresh_output(layer))
    assert set(layer.state_dict()) == {"0.weight", "0.bias", "0.weight_quantizer._amax"}


def test_entries_die_with_their_model() -> None:
    model = mtq.quantize(nn.Sequential(nn.Linear(96, 80)).eval(), W8)
    run(model)
    assert weight_cache.weight_cache_bytes() > 0
    del model
    gc.collect()
    assert weight_cache.weight_cache_bytes() == 0


def test_the_budget_holds(counter: _Counter) -> None:
    model = mtq.quantize(nn.Sequential(nn.Linear(96, 96), nn.Linear(96, 96), nn.Linear(96, 96)).eval(), W8)
    one = 96 * 96 * 4
    mtq.set_weight_cache_budget(2 * one + 60_000)
    run(model)
    assert 2 * one <= weight_cache.weight_cache_bytes() <= 2 * one + 60_000
    assert counter.of(lambda: run(model)) == 1
    mtq.set_weight_cache_budget(0)
    assert weight_cache.weight_cache_bytes() == 0 and counter.of(lambda: run(model)) == 3
    with pytest.raises(ConfigError):
        mtq.set_weight_cache_budget(-1)


def test_tracing_and_dispatch_modes_go_around_it(layer: nn.Module, counter: _Counter) -> None:
    run(layer)

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    def under_mode() -> None:
        with Mode():
            run(layer)

    assert counter.of(under_mode) == 1
    assert counter.of(lambda: torch.jit.trace(layer, X, check_trace=False)) >= 1
    batched = torch.func.vmap(lambda x: torch.func.functional_call(layer, {"0.bias": torch.zeros(80)}, (x,)))
    assert counter.of(lambda: batched(X)) >= 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(7, 5),
        lambda: torch.randn(64, 2048).to(torch.bfloat16),
        lambda: torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last),
        lambda: torch.randn(40, 30).t(),
        lambda: torch.randn(1, 3).half(),
    ],
)
def test_digest_sees_every_bit(make) -> None:
    torch.manual_seed(1)
    t = make()
    base = weight_cache._digest(t)
    dense = weight_cache._bits(t)
    assert base is not None and dense.data_ptr() == t.data_ptr()
    for position in [0, dense.numel() - 1, *torch.randint(0, dense.numel(), (30,)).tolist()]:
        dense[position] ^= 1
        assert not torch.equal(weight_cache._digest(t), base)
        dense[position] ^= 1
    assert torch.equal(weight_cache._digest(t), base)
    for _ in range(30):
        i, j = torch.randint(0, dense.numel(), (2,)).tolist()
        if dense[i] != dense[j]:
            dense[[i, j]] = dense[[j, i]]
            assert not torch.equal(weight_cache._digest(t), base)
            dense[[i, j]] = dense[[j, i]]


def test_holes_and_overlaps_are_not_digested() -> None:
    assert weight_cache._digest(torch.randn(8, 8)[:, ::2]) is None
    assert weight_cache._digest(torch.randn(1, 8).expand(4, 8)) is None
