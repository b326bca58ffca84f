"""The verb: what it removes and returns, that the result is saved and restored, and what it refuses before changing anything."""

from __future__ import annotations

import copy
import json
import os

import pytest
import torch
from torch import nn

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
from modelopt.core.errors import ConfigError, ModeError, ModelOptError, TraceError
from modelopt.core.logging import ModelOptWarning
from modelopt.torch.prune import prune
from modelopt.torch.prune import pruning as module_under_test
from modelopt.torch.trace.axes import Axes


class Residual(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(width, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(torch.relu(self.norm(self.conv1(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width = 16
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(*(Residual(16, 24) for _ in range(4)))
        self.head = nn.Linear(16 * 4, 5)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        x = nn.functional.adaptive_avg_pool2d(x, 2)
        return self.head(x.reshape(len(x), self.width * 4))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


def llama(**changes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**{**sizes, "num_key_value_heads": 2, **changes})
    return transformers.LlamaForCausalLM(config).eval()


IDS = {"input_ids": torch.arange(12)[None], "use_cache": False}


def test_half_of_everything_repairs_the_code_and_says_what_was_done(net):
    pruned, result = prune(net, "structured", {"ratio": 0.5}, X)
    assert pruned is net and net(X).shape == (2, 5)
    assert net.width == 8 and net.stem.out_channels == 8 and net.blocks[0].conv1.weight.shape == (12, 8, 3, 3)
    assert result["verified"]["exact"] and result["verified"]["error"] < 1e-9
    assert {(f["before"], f["after"]) for f in result["families"]} == {(16, 8), (24, 12)}
    assert result["costs"]["params"]["after"] == sum(p.numel() for p in net.parameters())
    json.dumps(result)


@pytest.mark.parametrize("name", ["params", "flops", "memory"])
@pytest.mark.parametrize("ranking", ["local", "global"])
def test_a_constraint_is_met(net, name, ranking):
    _, result = prune(net, [("structured", {"ranking": ranking})], {name: "60%"}, X)
    before, after = result["costs"][name].values()
    assert 0.4 * before < after <= 0.6 * before


def test_multiples(net):
    _, result = prune(net, [("structured", {"multiple_of": 8})], {"ratio": 0.4}, X)
    assert {(f["before"], f["after"]) for f in result["families"]} == {(24, 16)}
    assert net.blocks[1].conv1.out_channels == 16 and net.stem.out_channels == 16


def test_saved_and_restored_bit_for_bit(net, tmp_path):
    prune(net, [("structured", {"ranking": "global"})], {"params": "50%"}, X)
    mto.save(net, tmp_path / "out")
    again = mto.restore(Net().eval(), tmp_path / "out")
    assert torch.equal(again(X), net(X)) and mto.history(again) == mto.history(net)
    assert again.width == net.width


def test_twice_and_then_quantized(net, tmp_path):
    prune(net, "structured", {"ratio": 0.25}, X)
    prune(net, "structured", {"ratio": 0.25}, X)
    mtq.quantize(net, mtq.INT8_DEFAULT_CFG, [X])
    mto.save(net, tmp_path / "out")
    again = mto.restore(Net().eval(), tmp_path / "out")
    assert torch.equal(again(X), net(X)) and [s.mode for s in mto.history(again)] == ["structured", "structured", "quantize"]


def test_layers_are_removed_by_influence(net):
    for index in (1, 2):
        net.blocks[index].conv2.weight.data.mul_(1e-3)
        net.blocks[index].conv2.bias.data.mul_(1e-3)
    kept = [net.blocks[0], net.blocks[3]]
    _, result = prune(net, [("structured", {"ratio": {"layers": 0.5}})], {}, X)
    assert list(net.blocks) == kept and result["layers"] == {"blocks": [0, 3]} and result["verified"]["exact"]


def test_a_language_model_in_depth_and_width(tmp_path):
    model = llama()
    _, result = prune(model, [("structured", {"ratio": {"layers": 0.5, "default": 0.5}})], {}, IDS)
    assert len(model.model.layers) == 2 == model.config.num_hidden_layers
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    assert result["costs"]["params"]["after"] == sum(p.numel() for p in model.parameters())
    text = model.generate(IDS["input_ids"], max_new_tokens=4, do_sample=False)
    assert text.shape == (1, 16)
    mto.save(model, tmp_path / "out")
    again = mto.restore(llama(), tmp_path / "out")
    assert torch.equal(again(**IDS).logits, model(**IDS).logits)


@pytest.mark.parametrize("importance", ["l1", "l2", "fpgm", "random", "activation", "taylor"])
def test_every_criterion_prunes_exactly(importance):
    model = llama()
    batch = {**IDS, "labels": IDS["input_ids"]}
    data = {"forward_loop": [IDS], "data_loader": [batch]}
    _, result = prune(model, [("structured", {"importance": importance})], {"ratio": 0.5}, IDS, config=data)
    assert result["verified"]["exact"]


def test_fastnas_prunes_where_it_hurts_least_and_goes_on_from_its_checkpoint(net, tmp_path):
    calls = []

    def score(model):
        calls.append(1)
        return -float((model(X) - dense).abs().mean())

    dense = net(X).detach()
    for index in (1, 2):
        net.blocks[index].conv2.weight.data.mul_(1e-4)
    twin = copy.deepcopy(net)
    data = {"score_func": score, "checkpoint": str(tmp_path / "scores.json")}
    _, result = prune(net, [("fastnas", {"exclude": ["stem*"]})], {"params": "70%"}, X, config=data)
    sizes = {f["name"].split(".")[1]: f["after"] for f in result["families"]}
    assert sizes and set(sizes) <= {"1", "2"}
    first = len(calls)
    prune(twin, [("fastnas", {"exclude": ["stem*"]})], {"params": "70%"}, X, config=data)
    assert len(calls) == first and torch.equal(twin(X), net(X))


def unchanged(model, x, error, match, *args, **kwargs):
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(error, match=match):
        prune(model, *args, **kwargs)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()) and not mto.history(model)


def test_refused_before_anything_is_changed(net, monkeypatch):
    unchanged(net, X, ConfigError, "how much", "structured", {}, X)
    unchanged(net, X, ConfigError, "between 0 and 1", "structured", {"ratio": 1.5}, X)
    unchanged(net, X, ConfigError, "least", "structured", {"params": "1%"}, X)
    unchanged(net, X, ConfigError, "No family", [("structured", {"ratio": {"heads": 0.5}})], {}, X)
    unchanged(net, X, TraceError, "own error", "structured", {"ratio": 0.5}, torch.randn(2, 4, 8, 8))
    unchanged(net, X, ModelOptError, "Did you mean", "structurd", {"ratio": 0.5}, X)
    unchanged(net, X, ConfigError, "score_func", "fastnas", {"params": "60%"}, X)

    class Verdict:
        exact, error, message = False, 1.0, "off by one."

    monkeypatch.setattr(module_under_test, "verify_pruning", lambda *a, **k: Verdict)
    unchanged(net, X, module_under_test.PruningError, "off by one", "structured", {"ratio": 0.5}, X)


def test_refused_rather_than_half_done(net):
    unchanged(net, X, ConfigError, "removes no block", [("structured", {"ratio": {"layers": 0.01}})], {}, X)
    unchanged(net, X, ConfigError, "cannot be met", [("structured", {"ratio": {"layers": 0.5}})], {"params": "10%"}, X)
    unchanged(net, X, ConfigError, 'Did you mean "qk"', [("structured", {"lift": ("kq",)})], {"ratio": 0.5}, X)
    unchanged(net, X, ConfigError, "write a mapping", "structured", "50%", X)
    unchanged(net, X, ConfigError, "memory is True", "structured", {"memory": True}, X)
    data = {"score_func": lambda m: float("nan")}
    unchanged(net, X, ConfigError, "finite", "fastnas", {"params": "60%"}, X, config=data)
    net.head.lock = (i for i in ())
    unchanged(net, X, module_under_test.PruningError, "verify=False", "structured", {"ratio": 0.5}, X)
    del net.head.lock


def test_a_percentage_is_one_of_the_whole_model_also_with_fewer_layers(net):
    total = sum(p.numel() for p in net.parameters())
    rules = {"ratio": {"layers": 0.5, "default": 0.9}}
    prune(net, [("structured", rules)], {"params": "45%"}, X)
    assert len(net.blocks) == 2 and 0.35 * total < sum(p.numel() for p in net.parameters()) <= 0.45 * total


def test_excluded_blocks_and_the_largest_share(net):
    dense = copy.deepcopy(net)
    prune(net, [("structured", {"ratio": {"layers": 0.5}, "exclude": ("blocks.0.*", "blocks.1")})], {}, X)
    assert len(net.blocks) == 3 and torch.equal(net.blocks[1].conv1.weight, dense.blocks[1].conv1.weight)
    dense.blocks[2].conv1.weight.data.mul_(1e-6)
    dense.blocks[2].conv2.weight.data.mul_(1e-6)
    _, result = prune(dense, [("structured", {"ranking": "global", "max_ratio": 0.5})], {"ratio": 0.5}, X)
    assert all(2 * f["after"] >= f["before"] for f in result["families"])


@pytest.mark.parametrize("x", [torch.zeros(0, 3, 8, 8), torch.full((2, 3, 8, 8), float("nan"))])
def test_inputs_that_prove_nothing_are_refused(net, x):
    with pytest.raises(module_under_test.PruningError, match="Nothing is proven"):
        prune(net, "structured", {"ratio": 0.5}, x)


def test_zeros_as_dummy_input_still_prove_something(net, monkeypatch):
    apply = Axes.apply

    def wrong(axes, model, drop):
        result = apply(axes, model, drop)
        if model is not net:
            model.stem.weight.data = model.stem.weight.data.flip(0)
        return result

    net.stem.bias.data.zero_()
    monkeypatch.setattr(Axes, "apply", wrong)
    with pytest.raises(module_under_test.PruningError):
        prune(net, "structured", {"ratio": 0.5}, torch.zeros_like(X))


def hostile(state, change):
    state = copy.deepcopy(state)
    change(state["steps"][0]["state"]["structure"])
    return state


OS = ["forward.__func__.__globals__.os", "W_OK", [], 1]


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["axes"]["attributes"].append(OS),
        lambda s: s["axes"]["attributes"].append(["", "__dict__", [], 1]),
        lambda s: s["axes"]["attributes"].append(["stem", "out_channels", [], 10**15]),
        lambda s: s["axes"]["attributes"].append(["stem", "out_channels", [], 0]),
        lambda s: s["axes"]["attributes"].append(["stem", "kernel_size", [7], 3]),
        lambda s: s["axes"]["attributes"].append(None),
        lambda s: s["axes"]["shapes"].update({"stem.weight": [8.9, 3, 3, 3]}),
        lambda s: s["axes"]["shapes"].update({"stem.weight": [10**9, 3, 3, 3]}),
        lambda s: s["axes"]["shapes"].update({"stem.weight": "8333"}),
        lambda s: s.pop("axes"),
        lambda s: s.update(axes=None),
        lambda s: s.update(layers={"blocks": "all"}),
        lambda s: s.update(layers={"blocks": [0, 99]}),
        lambda s: s.update(layers={"__class__": [0]}),
    ],
)
def test_a_hostile_description_changes_nothing(net, change):
    prune(net, "structured", {"ratio": 0.5}, X)
    dense = Net().eval()
    before, width = {n: t.clone() for n, t in dense.state_dict().items()}, dense.width
    with pytest.raises(ModelOptError):
        mto.restore_from_modelopt_state(dense, hostile(mto.modelopt_state(net), change))
    assert os.W_OK == 2 and dense.width == width and len(dense.blocks) == 4
    assert all(torch.equal(t, before[n]) for n, t in dense.state_dict().items())


def test_heads_that_only_run_in_training_are_named(net):
    net.aux = nn.Linear(16, 5)
    with pytest.warns(ModelOptWarning, match="did not run.*aux"):
        _, result = prune(net, "structured", {"ratio": 0.5}, X)
    assert result["did_not_run"] == ["aux"]


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)).view(-1, 16))


def test_a_size_that_cannot_be_repaired_is_refused_with_its_line():
    unchanged(
        Fixed(),
        X,
        ModelOptError,
        r"test_pruning.py:\d+",
        "structured",
        {"ratio": 0.5},
        torch.zeros(2, 8),
    )


def test_models_that_are_not_what_they_seem(net):
    wrapped = nn.DataParallel(copy.deepcopy(net))
    out, _ = prune(wrapped, "structured", {"ratio": 0.5}, X)
    assert out is wrapped and out.module.width == 8
    compiled = torch.compile(copy.deepcopy(net), backend="eager")
    out, _ = prune(compiled, "structured", {"ratio": 0.5}, X)
    assert out is compiled and compiled._orig_mod.width == 8
    seen = []
    net.head.register_forward_hook(lambda *a: seen.append(1))
    prune(net, "structured", {"ratio": 0.5}, X)
    assert seen and net(X).shape == (2, 5)
    quantized = mtq.quantize(Net().eval(), mtq.INT8_DEFAULT_CFG, [X])
    with pytest.raises(ModeError, match="quantized already"):
        prune(quantized, "structured", {"ratio": 0.5}, X)
