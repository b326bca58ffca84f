"""Integers that remember where they came from: arithmetic, attributes that return, sizes that become equations."""

from __future__ import annotations

import copy
import math
import pickle
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from modelopt.torch.trace.axes import infer_axes
from modelopt.torch.trace.axes.expr import Attr, Recording, Size, Tainted, evaluate, expr_of, leaves, plain, show
from modelopt.torch.trace.axes.places import read_numbers
from modelopt.torch.trace.axes.provenance import Provenance

A, B = Attr("m", "a"), Attr("m", "b", 0)


@pytest.fixture
def recording():
    with Recording(pins=True) as active:
        yield active


def test_arithmetic_keeps_the_number_and_the_expression(recording):
    a, b = Tainted(12, A, recording), Tainted(5, B, recording)
    cases = [a + b, a - 2, 3 - a, a * b, 2 * a, a // b, 100 // a, a % b, a**2, 2**b, -a, sum([a, b]), math.prod([a, b])]
    for value in cases:
        assert type(value) is Tainted
        assert evaluate(value.expr, {A: 12, B: 5}) == value
    assert expr_of(a // 2) == ("//", A, 2)
    assert math.floor(a) is a and math.ceil(a) is a


def test_it_is_a_plain_number_everywhere_else(recording):
    a = Tainted(12, A, recording)
    assert f"{a} {a:>4} {a!r}" == "12   12 12"
    assert {12: "x"}[a] == "x" and hash(a) == hash(12)
    assert [0] * a == [0] * 12 and list(range(a)) == list(range(12))
    assert type(int(a)) is int and isinstance(a, int)
    assert type(a * 0.5) is float and a / 5 == 2.4 and a**-0.5 == 12**-0.5
    assert torch.zeros(a).shape == (12,)
    assert type(pickle.loads(pickle.dumps(a))) is int
    assert copy.deepcopy([a])[0] is a  # a config that is copied while it is followed is still followed


def test_after_the_run_it_is_an_int():
    with Recording() as recording:
        a = Tainted(12, A, recording)
    assert type(copy.deepcopy(a)) is int and type(a + 1) is int and expr_of(a) == 12
    with Recording():
        assert type(a + 1) is int  # not even in another run
    assert plain({"x": (a, [a])}) == {"x": (12, [12])} and type(plain((a,))[0]) is int


def test_comparisons_that_held_are_equations_but_look_ups_are_not(recording):
    a, b = Tainted(12, A, recording), Tainted(12, B, recording)
    assert a == 12
    assert a == b
    assert not (a != b)
    assert not (a == 13)
    assert {12: 0}[a] == 0
    found = [(e.left, e.relation, e.right) for e in recording.equations]
    assert found == [(A, "==", 12), (A, "==", B)]


def test_what_becomes_a_number_must_stay(recording):
    a = Tainted(16, A, recording)
    for use in (lambda: a**-0.5, lambda: math.sqrt(a), lambda: a / 2):
        recording.equations.clear()
        use()
        (equation,) = recording.equations
        assert (equation.left, equation.relation, equation.right) == (A, "==", 16)
        assert "test_provenance.py" in str(equation.where)


@dataclass
class Inner:
    widths: tuple[int, ...] = (4, 8)
    table: dict[str, int] = field(default_factory=lambda: {"k": 3, "on": True})


class Config:
    def __init__(self):
        self.hidden, self.rate, self.name, self.flag = 8, 0.5, "c", True
        self.inner, self.depths = Inner(), [[2, 2], [6]]
        self.pair = namedtuple("Pair", "x y")(3, 4)


class Child(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self._private, self.shape = config, 5, torch.Size((2, 3))
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        self.seen = x.shape
        self.calls = self.config.hidden * 2
        self.config.hidden = self.config.hidden + 1
        return self.linear(x)


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = Config()
        self.one, self.two = Child(self.config), Child(self.config)
        self.extra = OrderedDict(a=7)

    def forward(self, x):
        return self.two(self.one(x))


class FakeRecorder:
    last_groups = None

    def axes(self, tensor):
        return [None] * tensor.dim()


def test_every_int_of_modules_and_configs_is_followed_and_put_back():
    model = Parent()
    before = read_numbers(model)
    with Provenance(model, FakeRecorder()) as provenance:
        assert type(model.config.hidden) is Tainted and model.one.config is model.config
        assert type(model.config.inner.widths[1]) is Tainted and type(model.config.inner.table["k"]) is Tainted
        assert type(model.config.depths[1][0]) is Tainted and type(model.config.pair.y) is Tainted
        assert type(model.one._private) is Tainted and type(model.extra["a"]) is Tainted
        assert type(model.config.flag) is bool and type(model.config.inner.table["on"]) is bool
        assert model.config.pair.x == 3
        model(torch.zeros(2, 8))
    names = {str(a) for a in provenance.values}
    assert {"config.hidden", "config.inner.widths[0]", "config.inner.table['k']", "config.depths[1][0]", "one._private"} <= names
    after = read_numbers(model)
    assert {a: after[a] for a in before} == before
    assert not any(type(v) is Tainted for v in after.values())
    assert type(model.one.seen[0]) is int and type(model.one.calls) is int


def test_attributes_return_after_an_error_too():
    model = Parent()
    with pytest.raises(RuntimeError):
        infer_axes(model, (torch.zeros(2, 9),))
    assert type(model.config.hidden) is int and model.config.hidden == 8 and not Recording.active


class Sizes(nn.Module):
    """One linear layer whose features are read and written in one way."""

    def __init__(self, use):
        super().__init__()
        self.inner, self.heads, self.width = nn.Linear(6, 12), 3, 4
        self.outer, self.use = nn.Linear(12, 6), use
        self.parts = [4, 8]

    def forward(self, x):
        return self.outer(self.use(self, self.inner(x)))


def asked(use) -> set[str]:
    """What the code asked of labelled sizes, as text."""
    axes = infer_axes(Sizes(use), (torch.zeros(2, 6),))
    return {f"{e.what}: {show(e.left)} {e.relation}" for e in axes.equations if any(isinstance(v, Size) for v in leaves(e.right))}


@pytest.mark.parametrize(
    "use, wanted",
    [
        (lambda m, x: x.view(2, m.heads, m.width).flatten(1), {"size argument: heads ==", "size argument: width =="}),
        (lambda m, x: x.reshape((2, m.heads, -1)).reshape(2, -1), {"size argument: heads =="}),
        (lambda m, x: x.unflatten(1, (m.heads, m.width)).flatten(1), {"unflatten: heads ==", "unflatten: width =="}),
        (lambda m, x: torch.cat(x.split(m.parts, dim=1), 1), {"split: parts[0] =="}),
        (lambda m, x: torch.cat([x[:, : m.width], x[:, m.width :]], 1), {"slice: width =="}),
        (lambda m, x: torch.cat([x[:, :4], x[:, -8:]], 1), {"slice: 4 ==", "slice: 0 - -8 =="}),
        (lambda m, x: torch.cat([x.narrow(1, 0, m.width), x[..., 4:]], 1), {"slice: width =="}),
        (lambda m, x: x + x.new_zeros(m.heads * m.width), {"size argument: heads * width =="}),
        (lambda m, x: x + torch.ones(m.heads * m.width), {"size of a new tensor: heads * width =="}),
        (lambda m, x: nn.functional.layer_norm(x, (m.heads * m.width,)), {"normalized_shape: heads * width =="}),
        (lambda m, x: x.view(2, 12), {"size argument: 12 =="}),
        (lambda m, x: x.expand(2, m.heads * m.width), {"size argument: heads * width =="}),
    ],
)
def test_a_size_that_code_passes_is_an_equation(use, wanted):
    assert wanted <= asked(use)


def test_sizes_that_code_reads_are_expressions():
    seen = {}

    def use(m, x):
        seen["values"] = [expr_of(v) for v in (x.shape[1], x.size(-1), x.size()[1], x.numel(), x.shape[0], x.shape[1] // 2)]
        return x

    asked(use)
    one, two, three, numel, batch, half = seen["values"]
    assert isinstance(one, Size) and one == two == three and batch == 2
    assert numel == ("*", 2, one) and half == ("//", one, 2)


class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.one, self.two = nn.Linear(6, 12), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        left, right = self.inner(x).chunk(2, dim=1)
        return self.one(left) + self.two(right)


def test_chunks_must_stay_equal():
    axes = infer_axes(Halves(), (torch.zeros(2, 6),))
    (equation,) = [e for e in axes.equations if e.what == "chunk into equal parts"]
    assert isinstance(equation.left, Size) and isinstance(equation.right, Size)
    assert len(axes.families) == 2
    assert [set(t.families) for t in axes.tied] == [{f.name for f in axes.families}]
    one, two = (f.atoms for f in axes.families)
    drop, reasons = axes.relax({*one[:3], *two[:2]})
    assert len(drop) == 4 and "chunk(2, dim=1)" in reasons[0]


def test_an_equation_names_the_line_of_the_model():
    axes = infer_axes(Sizes(lambda m, x: x.view(2, m.heads, 4).flatten(1)), (torch.zeros(2, 6),))
    lines = [str(e) for e in axes.equations]
    assert any("test_provenance.py" in line and "x.view(2, m.heads, 4)" in line and "heads == size 3" in line for line in lines)


def test_a_plain_namespace_is_a_config_and_tools_are_not():
    model = nn.Linear(4, 4)
    model.ns, model.lock, model.fn = SimpleNamespace(width=4), torch.Generator(), len
    with Provenance(model, FakeRecorder()) as provenance:
        pass
    assert Attr("ns", "width") in provenance.values
    assert {a.owner for a in provenance.values} == {"", "ns"}
