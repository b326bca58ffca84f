"""Cutting a model: layers, attributes, identity of parameters, refusals, the description that is saved."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from modelopt.core.errors import TraceError
from modelopt.torch.trace.axes import infer_axes
from modelopt.torch.trace.axes.apply import describe, reapply
from tests.torch.trace.axes.halving import half, pruned_by_half


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.depth, self.group = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 24, 3, groups=4)
        self.gn, self.up = nn.GroupNorm(4, 24), nn.ConvTranspose2d(24, 8, 2, 2)
        self.act, self.head = nn.PReLU(8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.depth(self.norm(self.stem(x)).relu())
        x = self.act(self.up(self.gn(self.group(x)).relu()))
        return self.head(x.mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, cls):
        super().__init__()
        self.embed, self.rnn = nn.Embedding(11, 12), cls(12, 16, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.norm(self.rnn(self.embed(x))[0]))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 32)
        self.attn, self.norm = nn.MultiheadAttention(32, 4, batch_first=True), nn.RMSNorm(32)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        x = self.norm(self.embed(x))
        return self.head(x + self.attn(x, x, x, need_weights=False)[0])


def consistent(model):
    """Each layer of torch says of itself what its tensors are."""
    for m in model.modules():
        if isinstance(m, nn.Linear):
            assert m.weight.shape == (m.out_features, m.in_features)
        elif isinstance(m, nn.Conv2d):
            assert m.weight.shape[:2] == (m.out_channels, m.in_channels // m.groups)
        elif isinstance(m, nn.ConvTranspose2d):
            assert m.weight.shape[:2] == (m.in_channels, m.out_channels // m.groups)
        elif isinstance(m, (nn.LayerNorm, nn.RMSNorm)):
            assert m.weight.shape == m.normalized_shape and type(m.normalized_shape) is tuple
        elif isinstance(m, nn.BatchNorm2d):
            assert m.weight.shape == m.running_mean.shape == (m.num_features,)
        elif isinstance(m, nn.Embedding):
            assert m.weight.shape == (m.num_embeddings, m.embedding_dim)
        elif isinstance(m, nn.MultiheadAttention):
            assert m.embed_dim == m.num_heads * m.head_dim == m.in_proj_weight.shape[0] // 3 == m.kdim
    return model


@pytest.mark.parametrize(
    "model, x, least",
    [
        (Conv(), torch.randn(2, 3, 8, 8), 0.5),
        (Recurrent(nn.LSTM), torch.randint(0, 11, (2, 5)), 0.3),
        (Recurrent(nn.GRU), torch.randint(0, 11, (2, 5)), 0.3),
        (Attention(), torch.randn(2, 5, 6), 0.6),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2), torch.randn(2, 5, 32), 0.2),
    ],
    ids=["conv", "lstm", "gru", "mha", "transformer"],
)
def test_layers_say_what_their_tensors_are(model, x, least):
    pruned, changes, *_ = pruned_by_half(model.eval(), (x,))
    consistent(pruned)
    assert 1 - sum(p.numel() for p in pruned.parameters()) / sum(p.numel() for p in model.parameters()) > least
    assert changes.attributes and all(type(v) is int for pair in changes.attributes.values() for v in pair)


def test_the_same_parameters_stay_in_place():
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))
    model[2].bias.requires_grad_(False)
    model.to(torch.bfloat16)
    ids = [id(p) for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    axes = infer_axes(model, (torch.zeros(1, 6, dtype=torch.bfloat16),))
    changes = axes.apply(model, half(axes))
    assert [id(p) for p in model.parameters()] == ids == [id(p) for p in optimizer.param_groups[0]["params"]]
    assert model[0].weight.shape == (6, 6) and model[0].weight.grad is None
    assert model[0].weight.dtype == torch.bfloat16 and not model[2].bias.requires_grad and model[2].weight.requires_grad
    assert changes.shapes["0.weight"] == ((12, 6), (6, 6))
    assert "0.out_features: 12 -> 6" in str(changes)


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mid, self.head = nn.Embedding(7, 8), nn.Linear(8, 8), nn.Linear(8, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            h = self.embed(x)
            return self.head(h + self.mid(h))

    pruned, *_ = pruned_by_half(Tied(), (torch.randint(0, 7, (2, 3)),))
    assert pruned.head.weight is pruned.embed.weight and pruned.head.weight.shape == (7, 4)
    assert pruned.head.in_features == pruned.embed.embedding_dim == 4


def test_a_list_in_a_config_that_modules_share_changes_everywhere():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.sizes = [4, 8]
            self.config = {"sizes": self.sizes, "rate": 0.5}
            self.a, self.b = nn.Linear(5, 12), nn.Linear(12, 2)

        def forward(self, x):
            x, y = self.a(x).split(self.sizes, dim=-1)
            return self.b(torch.cat([x.relu(), y], -1))

    model = Sized()
    axes = infer_axes(model, (torch.zeros(2, 5),))
    drop, _ = axes.relax(half(axes))
    axes.apply(model, drop)
    model(torch.zeros(2, 5))
    assert model.config["sizes"] is model.sizes and sum(model.sizes) == model.a.out_features < 12


def test_a_refusal_changes_nothing():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.width = 12
            self.a, self.b, self.c = nn.Linear(4, 12), nn.Linear(12, 12), nn.Linear(12, 2)

        def forward(self, x):
            return self.c(self.b(self.a(x).view(-1, self.width).relu()).view(-1, self.width))

    model = Fixed()
    before = copy.deepcopy(model.state_dict())
    axes = infer_axes(model, (torch.zeros(2, 4),))
    with pytest.raises(TraceError, match=r"test_apply.py:\d+: return self.c\(self.b\(self.a\(x\)"):
        axes.apply(model, axes.families[0].atoms[:3])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.a.out_features == 12


def test_another_model_is_refused():
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))
    axes = infer_axes(model, (torch.zeros(1, 6),))
    drop = half(axes)
    with pytest.raises(TraceError, match="Trace this model"):
        axes.apply(nn.Linear(6, 12), drop)
    with pytest.raises(TraceError, match=r"shape \(10,\)"):
        axes.apply(nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6)), drop)
    axes.apply(model, drop)
    with pytest.raises(TraceError, match="Trace the model again"):
        axes.apply(model, drop)


def test_tensors_that_cannot_be_cut_are_refused():
    class Sharded(torch.Tensor):
        pass

    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))
    axes = infer_axes(model, (torch.zeros(1, 6),))
    model[0].weight = nn.Parameter(torch.zeros(12, 6).as_subclass(Sharded))
    with pytest.raises(TraceError, match='"0.weight" is a Sharded'):
        axes.apply(model, half(axes))


def test_the_description_rebuilds_the_structure():
    dense = Attention()
    fresh = copy.deepcopy(dense)
    pruned, changes, *_ = pruned_by_half(dense, (torch.randn(2, 5, 6),))
    text = json.dumps(describe(changes))
    reapply(fresh, json.loads(text))
    consistent(fresh)
    fresh.load_state_dict(pruned.state_dict())
    x = torch.randn(2, 5, 6)
    assert torch.equal(fresh(x), pruned(x)) and str(fresh) == str(pruned)


@pytest.mark.parametrize(
    "change",
    [
        {"attributes": [["attn", "nothing", [], 2]]},
        {"attributes": [["attn", "training", [], 2]]},
        {"shapes": {"nothing.weight": [2, 2]}},
        {"shapes": {"head.weight": [3, 64]}},
        {"shapes": {"head.weight": [3]}},
        {"shapes": 3},
        {"attributes": "x"},
    ],
)
def test_a_description_that_does_not_fit_is_refused(change):
    model = Attention()
    before = str(model)
    with pytest.raises(TraceError):
        reapply(model, {"attributes": [], "shapes": {"embed.weight": [16, 6]}, **change})
    assert str(model) == before and model.embed.weight.shape == (32, 6)
