"""Each rule on a model of a few lines: half of every family goes, the rest computes what the masked dense model computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from modelopt.torch.trace.axes import infer_axes, register_module_rule, register_rule
from modelopt.torch.trace.axes.rules.registry import MODULE_RULES, RULES
from tests.torch.trace.axes.oracle import Body, prune_half
from tests.torch.trace.axes.rule_cases import CASES, L, attend, moe, r, seq


@pytest.mark.parametrize("name", CASES)
def test_rule(name: str) -> None:
    torch.manual_seed(0)
    build, shape, sizes = CASES[name]
    for seed in (0, 1):
        axes, report = prune_half(build(), (r(*shape),), seed=seed)
        assert report.exact, str(report)
        assert not axes.unknown_ops
        assert sorted(f.size for f in axes.families) == sizes or not sizes, axes.families


FROZEN: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], str]] = {
    "sum": (lambda m, x: m.b(m.a(x)) * torch.sigmoid(m.a(x)).sum(-1, keepdim=True), "sum over this dimension"),
    "max": (lambda m, x: m.b(m.a(x)) * m.a(x).amax(-1, keepdim=True), "amax over this dimension"),
    "softmax": (lambda m, x: m.b(m.a(x).softmax(-1)), "softmax over this dimension"),
    "cumsum": (lambda m, x: m.b(m.a(x).cumsum(-1)), "running sum"),
    "sort": (lambda m, x: m.b(m.a(x).sort(-1)[0]), "ordered by value"),
    "roll": (lambda m, x: m.b(m.a(x).roll(1, -1)), "rolled"),
    "tril": (lambda m, x: m.b(m.a(x).tril()), "position"),
    "gather": (lambda m, x: m.b(m.a(x)[:, [3, 1, 2, 0, 4, 5, 6, 7]]), "chosen by data"),
    "fourier": (lambda m, x: m.b(torch.fft.rfft(m.a(x), n=14).real), "Fourier"),
    "positions": (lambda m, x: m.b(m.a(x) + torch.arange(8)), "never pruned"),
    "window": (lambda m, x: m.b(m.a(x).unfold(-1, 8, 1)[:, 0]), "windows"),
    "mean": (lambda m, x: m.b(m.a(x)) * float(m.a(x).mean()), "averaged over every dimension"),
    "unbind": (lambda m, x: m.b(torch.stack(list(m.a(x).unbind(-1)), -1)), "unbound"),
    "strided": (lambda m, x: m.b(m.a(x).as_strided((2, 8), (1, 1))), "position in memory"),
    "returned": (lambda m, x: m.a(x), "returns it"),
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_with_a_reason(name: str) -> None:
    function, reason = FROZEN[name]
    axes = infer_axes(Body(function, a=L(6, 8), b=L(8, 3)).double(), (r(2, 6),))
    frozen = {(f.parameter, f.dim): f for f in axes.frozen}
    found = frozen["a.bias", 0]
    assert reason in found.reason and __file__ in found.where, found


def test_unknown_op_freezes_and_is_reported_until_a_rule_is_registered() -> None:
    library = torch.library.Library("axes_test", "DEF")
    library.define("mystery(Tensor x) -> Tensor")
    library.impl("mystery", lambda x: x * 2, "CompositeExplicitAutograd")
    model = Body(lambda m, x: m.b(torch.ops.axes_test.mystery(m.a(x))), a=L(6, 8), b=L(8, 3)).double()
    axes = infer_axes(model, (r(2, 6),))
    assert axes.unknown_ops == {"axes_test::mystery": 1} and not axes.families
    register_rule("axes_test::mystery")(lambda call: call.axes(call.args[0]))
    try:
        axes, report = prune_half(model, (r(2, 6),))
        assert report.exact and [f.size for f in axes.families] == [8]
    finally:
        RULES.unregister("axes_test::mystery")


def test_a_module_rule_makes_a_leaf() -> None:
    class Opaque(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * float(x.sum() * 0 + 2)

    model = seq(L(6, 8), Opaque(), L(8, 3)).double()
    assert not infer_axes(model, (r(2, 6),)).families
    register_module_rule(Opaque)(lambda recorder, module, args, kwargs, output: recorder.set(output, recorder.axes(args[0])))
    try:
        assert [f.size for f in infer_axes(model, (r(2, 6),)).families] == [8]
    finally:
        MODULE_RULES.unregister(Opaque)


def test_lifted_width_of_queries_and_keys() -> None:
    model = Body(lambda m, x: attend(m, x, False), q=L(6, 16), k=L(6, 16), v=L(6, 16), o=L(16, 3), h=4, kv=4)
    axes, report = prune_half(model, (r(2, 5, 6),), lift=frozenset({"qk"}))
    assert sorted(f.size for f in axes.families) == [4, 4, 4] and report.exact, str(report)


def test_lifted_experts_are_one_family_with_a_floor() -> None:
    model = nn.Sequential(Body(moe, gate=L(6, 4), up=r(4, 8, 6), down=r(4, 6, 8), head=L(6, 3), e=4, k=2)).double()
    axes = infer_axes(model, (r(5, 6),), lift=frozenset({"experts"}))
    experts = [f for f in axes.families if f.kind == "experts"]
    assert [(f.size, f.least) for f in experts] == [(4, 2)]
    assert {(s.parameter, s.dim) for s in experts[0].slots} == {
        ("0.gate.weight", 0),
        ("0.gate.bias", 0),
        ("0.up", 0),
        ("0.down", 0),
    }


def test_groups_are_reported() -> None:
    axes = infer_axes(CASES["grouped"][0]().double(), (r(2, 3, 6, 6),))
    groups, axis = axes.groups["2.weight"]
    assert groups == 4 and len(axis) == 4
