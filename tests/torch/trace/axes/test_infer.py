"""infer_axes as a whole: compositions of ops, determinism, what it leaves behind, tied weights, meta tensors."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modelopt.core.errors import UnknownNameError
from modelopt.torch.trace.axes import Recorder, infer_axes
from tests.torch.trace.axes.oracle import Body, prune_half
from tests.torch.trace.axes.rule_cases import r

WIDTH = 12


class Composition(nn.Module):
    """A random program over a stack of tensors [2, 3, width]: what hypothesis draws is what the forward pass does."""

    def __init__(self, program: list[tuple[str, int, int]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.program = program
        self.start = nn.ModuleList(nn.Linear(5, WIDTH) for _ in range(2))
        self.layers = nn.ModuleDict()
        self.two, self.three = 2, 3
        self.taken: dict[int, bool] = {}  # branches are decided once, at full size
        with torch.no_grad():
            widths = [t.shape[-1] for t in self.run(torch.zeros(2, 3, 5))]
        self.head = nn.Linear(sum(widths), 4)

    def linear(self, step: int, x: torch.Tensor, width: int) -> torch.Tensor:
        if str(step) not in self.layers:
            self.layers[str(step)] = nn.Linear(x.shape[-1], width, bias=bool(step % 2))
        return self.layers[str(step)](x)

    def run(self, x: torch.Tensor) -> list[torch.Tensor]:
        stack = [layer(x) for layer in self.start]
        for step, (op, i, j) in enumerate(self.program):
            a, b = stack[i % len(stack)], stack[j % len(stack)]
            stack[i % len(stack)] = self.apply_op(step, op, a, b)
        return stack

    def when(self, step: int, condition: bool) -> bool:
        return self.taken.setdefault(step, bool(condition))

    def apply_op(self, step: int, op: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if op in ("add", "mul"):
            if self.when(step, a.shape != b.shape):
                b = self.linear(step, b, a.shape[-1])
            return a + b if op == "add" else a * torch.tanh(b)
        if op == "linear":
            return self.linear(step, torch.relu(a), WIDTH)
        if op == "cat":
            return torch.cat([a, b], -1) if self.when(step, a.shape[-1] + b.shape[-1] <= 4 * WIDTH) else a
        if op == "chunk":
            one, two = a.chunk(2, -1) if self.when(step, a.shape[-1] % 2 == 0) else (a, a)
            return one.sigmoid() * two
        if op == "split":
            return torch.cat(a.split([a.shape[-1] // 3, a.shape[-1] - a.shape[-1] // 3], -1)[::-1], -1)
        if op == "heads":
            if self.when(step, a.shape[-1] % 2 != 0):
                return a
            grid = a.unflatten(-1, (self.two, a.shape[-1] // self.two))
            return (grid.transpose(-1, -2) * 2).transpose(-1, -2).flatten(-2)
        if op == "shuffle":
            if self.when(step, a.shape[-1] % 3 != 0):
                return a
            return a.unflatten(-1, (self.three, -1)).transpose(-1, -2).flatten(-2)
        if op == "norm":
            return a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + 1)
        if op == "flip":
            return a.flip(-1)
        return a + b.mean(1, keepdim=True) if self.when(step, a.shape == b.shape) else a

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat(self.run(x), -1))


OPS = ["add", "mul", "linear", "cat", "chunk", "split", "heads", "shuffle", "norm", "flip", "mean"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(OPS), st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=7))
def test_compositions(program: list[tuple[str, int, int]]) -> None:
    axes, report = prune_half(Composition(program), (r(2, 3, 5),))
    # A split through a tiled family leaves parts that may be removed but not permuted: the removal is what is proven here.
    assert report.error <= 1e-7, f"{program}: {report}"
    assert not axes.unknown_ops


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    model[2].eval()
    before = copy.deepcopy(model.state_dict())
    attributes = [dict(vars(m)) for m in model.modules()]
    state = torch.get_rng_state()
    axes = infer_axes(model, (torch.zeros(3, 4),))
    assert torch.equal(state, torch.get_rng_state())
    assert [m.training for m in model] == [True, True, False, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(vars(m).keys() == a.keys() for m, a in zip(model.modules(), attributes, strict=True))
    assert not any(p.__dict__ for p in model.parameters()), "marks are removed"
    assert not model[0]._forward_hooks and [f.size for f in axes.families] == [8]


def test_an_error_of_the_model_passes_and_leaves_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(9, 2))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        infer_axes(model, (torch.zeros(3, 4),))
    assert not any(p.__dict__ for p in model.parameters())
    assert type(model[0].out_features) is int


def test_tied_parameters_share_their_axes() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.out = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
            self.out.weight = self.emb.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.relu(self.emb(x)))

    axes, report = prune_half(Tied(), (torch.tensor([[1, 2, 3]]),))
    assert axes.parameters["out.weight"] is axes.parameters["emb.weight"]
    assert not axes.families, "one slot only: the weight that nothing else depends on"
    assert report.exact


def test_family_names_and_lookup() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GLU(), nn.Linear(4, 2))
    axes = infer_axes(model, (torch.zeros(3, 4),))
    assert axes.family("0.bias.0").size == 4
    with pytest.raises(UnknownNameError, match='Did you mean "0.bias.0"'):
        axes.family("0.bias")
    (slot, *_) = [s for s in axes.family("0.bias.0").slots if s.parameter == "0.weight"]
    assert [p.tolist() for p in slot.positions] == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_kept_positions() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    axes = infer_axes(model, (torch.zeros(3, 4),))
    kept = axes.kept(axes.family("0.bias.0").atoms[::2])
    assert kept["0.weight"][0].tolist() == [1, 3, 5, 7] and kept["0.weight"][1] is None
    assert kept["2.weight"][1].tolist() == [1, 3, 5, 7]


def test_any_order_of_registration_gives_the_same_families() -> None:
    def build(order: list[str]) -> nn.Module:
        parts = {"a": nn.Linear(6, 8), "b": nn.Linear(6, 8), "c": nn.Linear(8, 3)}
        model = Body(lambda m, x: m.c(m.a(x) * m.b(x)), **{k: parts[k] for k in order})
        return model

    one, two = (infer_axes(build(order), (r(2, 6).float(),)) for order in (["a", "b", "c"], ["c", "b", "a"]))
    assert [(f.name, f.atoms) for f in one.families] == [(f.name, f.atoms) for f in two.families]
    assert one.frozen == two.frozen


SCRIPT = """
import torch
from tests.torch.trace.axes.rule_cases import CASES, r
from modelopt.torch.trace.axes import infer_axes
for name in ("attention_grouped", "grouped", "lstm", "encoder_layer", "experts_kept"):
    build, shape, _ = CASES[name]
    axes = infer_axes(build().double(), (r(*shape),))
    print(name, [(f.name, f.kind, f.atoms) for f in axes.families], [(f.parameter, f.dim, f.reason) for f in axes.frozen])
"""


def test_any_hash_seed_gives_the_same_result(capsys: pytest.CaptureFixture[str]) -> None:
    """Another process, with another hash seed, prints what this one does."""
    exec(compile(SCRIPT, "script", "exec"), {})
    here = capsys.readouterr().out
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "4242" else "4242"
    env = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True)
    assert here and done.stdout == here


def test_recorder_answers_for_any_live_tensor_and_counts_calls() -> None:
    seen: dict[str, Any] = {}

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        seen["hidden"] = m.a(x)
        return m.b(seen["hidden"])

    model = Body(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    recorder = Recorder(model, record_ops=True)
    x = torch.zeros(3, 4)
    with torch.no_grad(), recorder:
        model(x)
    batch, width = recorder.axes(seen["hidden"])
    assert batch is None and len(width) == 8
    assert [c.name for c in recorder.calls] == ["a", "b", ""]
    assert recorder.calls[0].outputs[0].id == recorder.calls[1].inputs[0].id
    assert [o.op for o in recorder.ops or ()] == ["aten::t", "aten::addmm"] * 2
    recorder.close()


def test_without_weights() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 8))
    axes = infer_axes(model, (torch.zeros(2, 64, device="meta"),))
    assert [(f.name, f.kind, f.size) for f in axes.families] == [("0.bias.0", "ffn", 4096)]


class Mixture(nn.Module):
    """Experts in a ModuleList, of which only those run that a token chose."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.embed, self.gate, self.head = nn.Linear(5, 8), nn.Linear(8, 4), nn.Linear(8, 3)
        parts = [{"up": nn.Linear(8, 6), "down": nn.Linear(6, 8)} for _ in range(4)]
        self.experts = nn.ModuleList(nn.Sequential(p["up"], nn.ReLU(), p["down"]) if whole else nn.ModuleDict(p) for p in parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        best = int(self.gate(x).mean(0).argmax())
        expert = self.experts[best]
        y = expert["down"](expert["up"](x).relu()) if isinstance(expert, nn.ModuleDict) else expert(x)
        return self.head(x + y)


@pytest.mark.parametrize("whole", [True, False])
def test_idle_experts_follow_the_one_that_ran(whole: bool) -> None:
    torch.manual_seed(0)
    model = Mixture(whole).double()
    axes = infer_axes(model, (r(2, 5),))
    hidden = axes.family("embed.bias.0")
    slots = {(s.parameter, s.dim) for s in hidden.slots}
    first, last = ("0", "2") if whole else ("up", "down")
    assert {(f"experts.{e}.{first}.weight", 1) for e in range(4)} | {(f"experts.{e}.{last}.weight", 0) for e in range(4)} <= slots
    widths = [f for f in axes.families if f.size == 6]
    assert len(widths) == (4 if whole else 1), "run as a whole, each expert has a width of its own"
    assert sum(c.name.startswith("experts") for c in axes.calls) == (4 if whole else 2), "probes are not calls"


def test_stacked_experts_that_no_token_reached_keep_what_they_read() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.head(m.moe(m.embed(x)))

    def skip(m: Any, x: torch.Tensor) -> torch.Tensor:
        return x @ m.stack[0] if m.chosen else x

    moe = Body(skip, stack=r(4, 8, 8), chosen=False)
    axes = infer_axes(Body(forward, embed=nn.Linear(5, 8), moe=moe, head=nn.Linear(8, 3)).double(), (r(2, 5),))
    assert not axes.families
    assert any("not reached" in f.reason for f in axes.frozen)


def test_tensors_inside_vmap_carry_no_labels_and_break_nothing() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        mask = torch.vmap(lambda i: torch.arange(3) <= i)(torch.arange(3))
        return m.b((mask.to(x.dtype) @ m.a(x)).relu())

    axes, report = prune_half(Body(forward, a=nn.Linear(5, 8), b=nn.Linear(8, 3)), (r(2, 3, 5),))
    assert [f.size for f in axes.families] == [8] and report.exact
