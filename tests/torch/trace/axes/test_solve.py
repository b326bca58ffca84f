"""Equations to attribute values, and what is given back where there are none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modelopt.torch.trace.axes import infer_axes
from modelopt.torch.trace.axes.expr import Attr, Equation
from modelopt.torch.trace.axes.solve import solutions, solve_equations
from tests.torch.trace.axes.halving import half, pruned_by_half

A, B, C = (Attr("m", n) for n in "abc")


def values_of(originals, *equations):
    values, known = solve_equations([Equation(left, "==", right) for left, right in equations], {}, originals)
    return {k.name: v for k, v in values.items()}, {k.name for k in known}


@pytest.mark.parametrize(
    "originals, equations, wanted",
    [
        ({A: 8}, [(A, 4)], {"a": 4}),
        ({A: 8, B: 16}, [(("*", A, B), 64), (A, 4)], {"a": 4, "b": 16}),
        ({A: 8, B: 16}, [(("*", A, B), 64)], {"a": 4, "b": 16}),  # either would do: the first in the code
        ({A: 8, B: 4}, [(("//", A, B), 2), (A, 4)], {"a": 4, "b": 2}),
        ({A: 64, B: 4}, [(("//", A, B), 16), (A, 32)], {"a": 32, "b": 2}),
        ({A: 96, B: 3}, [(("+", ("*", 2, A), B), 99), (B, 3)], {"a": 48, "b": 3}),
        ({A: 8, B: 8, C: 2}, [(A, B), (("*", B, C), 8), (C, 2)], {"a": 4, "b": 4, "c": 2}),
        ({A: 8, B: 2}, [(("%", A, B), 0), (A, 6)], {"a": 6, "b": 2}),
        ({A: 12}, [(("-", 20, A), 14)], {"a": 6}),
    ],
)
def test_values_follow_from_equations(originals, equations, wanted):
    assert values_of(originals, *equations)[0] == wanted


def test_what_no_equation_mentions_keeps_its_value():
    values, known = values_of({A: 8, B: 5}, (A, 4))
    assert values["b"] == 5 and known == {"a"}


def test_solutions_invert_what_they_can():
    assert solutions(Equation(("*", 3, A), "==", 12), A, {A: 9}) == [4]
    assert solutions(Equation(("*", 3, A), "==", 13), A, {A: 9}) == []
    assert solutions(Equation(("//", A, 4), "==", 2), A, {A: 64}) == [8, 9, 10, 11]
    assert solutions(Equation(("//", 64, A), "==", 16), A, {A: 8}) == [4]
    assert solutions(Equation(("*", A, A), "==", 16), A, {A: 8}) == [4]


class WindowAttention(nn.Module):
    """The heads' width is read off the input and divided by an attribute, as Swin does it; q and k keep their width."""

    def __init__(self, width, heads):
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.embed, self.out = nn.Linear(5, width), nn.Linear(width, 2)

    def forward(self, x):
        x = self.embed(x)
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        a = (q @ k.transpose(-2, -1)).softmax(-1)
        return self.out(self.proj((a @ v).transpose(1, 2).reshape(B, N, C)) + x)


@pytest.mark.parametrize("width, heads, ratio", [(32, 4, 0.5), (96, 3, 0.5), (48, 6, 0.4)])
def test_a_width_divided_by_a_number_of_heads(width, heads, ratio):
    model = WindowAttention(width, heads)
    pruned, changes, axes, drop, reasons = pruned_by_half(model, (torch.randn(2, 4, 5),), ratio=ratio)
    assert pruned.proj.weight.shape[0] == width // heads * pruned.num_heads  # both shrank in step
    assert pruned.num_heads == changes.attributes["num_heads"][1] < heads
    if reasons:
        assert "test_solve.py" in reasons[0] and "kept" in reasons[0]


def test_relax_is_deterministic_and_gives_back_what_is_wanted_first():
    axes = infer_axes(WindowAttention(96, 3), (torch.randn(2, 4, 5),))
    drop = half(axes)
    first = axes.relax(drop)
    assert first == axes.relax(drop) and first[0] < drop
    returned = max(axes.families, key=lambda f: f.size)
    wanted = [a for a in sorted(drop) if a in set(returned.atoms)][-1]
    again, _ = axes.relax(drop, {wanted: 1.0})
    assert wanted not in again


def test_nothing_becomes_empty():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    axes = infer_axes(model, (torch.zeros(1, 4),))
    drop, reasons = axes.relax(axes.families[0].atoms)
    assert len(drop) == 5 and "would be empty" in reasons[0]


def test_a_literal_in_the_code_pins_the_size():
    class Literal(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 2)

        def forward(self, x):
            return self.b(self.a(x).view(-1, 3, 4).flatten(1))

    axes = infer_axes(Literal(), (torch.zeros(2, 4),))
    assert not axes.families
    assert any("view(-1, 3, 4)" in f.where and "leaves no choice" in f.reason for f in axes.frozen)


def test_a_size_tied_to_a_soft_one_is_as_soft():
    model = OneWidth()
    names = {f.parameter: f for f in infer_axes(model, (torch.randn(2, 5, 8),)).frozen if f.dim == 0}
    assert names["v.weight"].soft == names["q.weight"].soft == "qk"
    assert "head_dim" in names["v.weight"].reason
    lifted = infer_axes(model, (torch.randn(2, 5, 8),), lift=frozenset({"qk"}))
    assert {"q.weight", "v.weight"} <= {s.parameter for f in lifted.families for s in f.slots}
    assert not {"q.weight", "v.weight"} & {f.parameter for f in lifted.frozen if f.dim == 0}


class OneWidth(nn.Module):
    """One head; its width is one attribute for q, k and v."""

    def __init__(self):
        super().__init__()
        self.head_dim = 6
        self.q, self.k, self.v, self.o = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        q, k, v = (layer(x).view(2, -1, self.head_dim) for layer in (self.q, self.k, self.v))
        return self.o((q @ k.transpose(-1, -2)).softmax(-1) @ v)


def test_an_attribute_used_as_a_number_pins_the_size():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.width = 12
            self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 2)

        def forward(self, x):
            x = self.a(x)
            return self.b(x.view(-1, self.width) * self.width**-0.5)

    axes = infer_axes(Scaled(), (torch.zeros(2, 4),))
    assert not axes.families
    assert any("used as a number" in f.reason for f in axes.frozen)


def test_one_attribute_that_two_layers_read_ties_their_families():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.width = 8
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.c(self.b(self.a(x).view(-1, self.width).relu()).view(-1, self.width))

    axes = infer_axes(Shared(), (torch.zeros(2, 4),))
    one, two = axes.families
    assert [set(t.families) for t in axes.tied] == [{one.name, two.name}]
    drop, reasons = axes.relax({*one.atoms[:4], *two.atoms[:2]})
    assert sum(a in drop for a in one.atoms) == sum(a in drop for a in two.atoms) == 2 and len(reasons) == 1
    assert axes.solve(drop).values[Attr("", "width")] == 6


def test_a_slice_with_a_step_must_pick_what_it_picked():
    class Strided(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 12), nn.Linear(6, 2)

        def forward(self, x):
            x = self.a(x)
            return self.b(x[..., ::2] * 2 + x[..., 1::2].tanh())

    model = Strided()
    axes = infer_axes(model, (torch.zeros(2, 4),))
    drop, _ = axes.relax(half(axes))
    assert not axes.solve(drop).unsatisfied
    pruned_by_half(model, (torch.randn(3, 4),))
