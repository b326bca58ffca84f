"""The oracle accepts every correct pruning of these models, and each deliberate mistake in one of them is seen."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.zoo import build
from modelopt.core.errors import ConfigError
from modelopt.torch.prune.verify import verify_pruning
from modelopt.torch.trace.axes import infer_axes


def cut(model: nn.Module, kept: dict) -> nn.Module:
    """A copy of `model` with the kept indices of each dimension, and the attributes of its layers that follow."""
    model = copy.deepcopy(model)
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    done = set()
    for name, dims in kept.items():
        if id(tensors[name]) in done:
            continue
        done.add(id(tensors[name]))
        for dim, indices in enumerate(dims):
            if indices is not None:
                tensors[name].data = tensors[name].data.index_select(dim, torch.tensor(list(indices)))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and module.weight is not None:
            module.normalized_shape = tuple(module.weight.shape)
        if isinstance(module, nn.Conv2d):
            module.groups = module.weight.shape[0] if module.groups > 1 else 1
        if isinstance(module, nn.GroupNorm):
            module.num_channels = module.weight.shape[0]
        if isinstance(module, Block):
            module.width = module.up.weight.shape[1]
    return model


class HandNorm(nn.Module):
    """LayerNorm (centered) or RMSNorm, decomposed."""

    def __init__(self, width: int, centered: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.centered = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)), centered

    def forward(self, x: Tensor) -> Tensor:
        if self.centered:
            x = x - x.mean(-1, keepdim=True)
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight + self.bias


class StandardizedConv(nn.Conv2d):
    """A convolution whose weight is standardized over its inputs."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.weight.shape[0], -1)
        weight = nn.functional.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
        return self._conv_forward(x, weight, self.bias)


class Block(nn.Module):
    """embedding -> norm -> up -> act -> down -> residual -> norm -> tied head; `width` is written down as an attribute too."""

    def __init__(self, norm: str, width: int = 8, hidden: int = 12, vocabulary: int = 11) -> None:
        super().__init__()
        make = {
            "layer": nn.LayerNorm,
            "plain": lambda w: nn.LayerNorm(w, elementwise_affine=True),
            "rms": lambda w: HandNorm(w, False),
            "centered": lambda w: HandNorm(w, True),
        }[norm]
        self.embed, self.norm, self.final = nn.Embedding(vocabulary, width), make(width), make(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.linspace(0.5, 1.5, width))
        self.register_buffer("ids", torch.arange(vocabulary))
        self.width = width

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(self.ids[ids]) * self.scale
        x = x.view(*ids.shape, self.width)
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return {"logits": self.head(self.final(x)), "hidden_states": x}


class Conv(nn.Module):
    """Convolutions with batch, group and weight normalization, a depthwise one, pooling and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.dw, self.gn = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.GroupNorm(2, 8)
        self.ws, self.gate = StandardizedConv(8, 6, 1), nn.Linear(6, 6)
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.gn(self.dw(self.bn(self.a(x)).relu()))
        x = self.ws(x)
        pooled = x.mean((2, 3))
        x = x * (self.gate(pooled).sigmoid() + torch.rand(()))[:, :, None, None]  # a random op: both runs use one seed
        return self.out(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)), [pooled.sum(1)]


KEEP, FFN = [0, 2, 3, 5, 7], [1, 2, 4, 8, 9, 10]
BLOCK = {
    "embed.weight": (None, KEEP), "head.weight": (None, KEEP), "norm.weight": (KEEP,), "norm.bias": (KEEP,),
    "final.weight": (KEEP,), "final.bias": (KEEP,), "up.weight": (FFN, KEEP), "up.bias": (FFN,),
    "down.weight": (KEEP, FFN), "down.bias": (KEEP,), "scale": (KEEP,),
}  # fmt: skip
EVEN, SIX = [0, 2, 4, 6], [0, 3, 5]
CONV = {
    "a.weight": (EVEN, None, None, None), "a.bias": (EVEN,), "bn.weight": (EVEN,), "bn.bias": (EVEN,),
    "bn.running_mean": (EVEN,), "bn.running_var": (EVEN,), "dw.weight": (EVEN, None, None, None), "dw.bias": (EVEN,),
    "gn.weight": (EVEN,), "gn.bias": (EVEN,), "ws.weight": (SIX, EVEN, None, None), "ws.bias": (SIX,),
    "gate.weight": (SIX, SIX), "gate.bias": (SIX,), "out.weight": (None, SIX),
}  # fmt: skip
IDS, IMAGE = torch.tensor([[1, 5, 3, 10]]), torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("norm", ["layer", "rms", "centered"])
def test_correct_block_is_exact(norm: str) -> None:
    dense = Block(norm)
    report = verify_pruning(dense, cut(dense, BLOCK), dummy_input=IDS, kept=BLOCK)
    assert report.exact and report.error < 1e-12, report
    assert report.reduced == ("hidden_states",) and report.checked == 2 and not report.unknown_ops


def test_correct_convolutions_are_exact() -> None:
    dense = Conv()
    report = verify_pruning(dense, cut(dense, CONV), dummy_input=IMAGE, kept=CONV)
    assert report.exact and report.error < 1e-12, report
    assert not report.unknown_ops


def test_a_pruner_is_followed_through_tags() -> None:
    dense = Conv()
    assert verify_pruning(dense, lambda model: cut(model, CONV), dummy_input=IMAGE).exact
    dense = Block("rms")
    assert verify_pruning(dense, lambda model: cut(model, BLOCK), dummy_input=IDS).exact


def test_nothing_of_the_user_is_touched() -> None:
    dense = Conv().train()
    small = cut(dense, CONV).train()
    before, seed = copy.deepcopy([dense.state_dict(), small.state_dict()]), torch.get_rng_state()
    verify_pruning(dense, small, dummy_input=IMAGE, kept=CONV)
    for state, model in zip(before, (dense, small), strict=True):
        assert model.training and all(
            torch.equal(state[k], v) and state[k].dtype == v.dtype for k, v in model.state_dict().items()
        )
    assert torch.equal(seed, torch.get_rng_state()) and torch.get_default_dtype() == torch.float32


def wrong(kept: dict, **changes: tuple) -> dict:
    return kept | {name.replace("__", "."): dims for name, dims in changes.items()}


@pytest.mark.parametrize(
    ("model", "kept", "where"),
    [
        (Block("layer"), wrong(BLOCK, up__weight=(FFN, [0, 3, 2, 5, 7])), "up"),  # two channels swapped in one layer
        (Block("layer"), wrong(BLOCK, down__weight=(KEEP, [1, 2, 4, 8, 9, 11])), "down"),  # another channel than in `up`
        (Block("rms"), wrong(BLOCK, norm__weight=([0, 2, 3, 5, 6],)), "norm"),
        (Block("centered"), wrong(BLOCK, scale=([0, 1, 2, 3, 4],)), "norm"),
        (Conv(), wrong(CONV, gn__weight=([0, 2, 4, 5],)), "gn"),
        (Conv(), wrong(CONV, bn__running_var=([0, 1, 2, 3],)), "bn"),
        (Conv(), wrong(CONV, ws__weight=(SIX, [0, 2, 6, 4], None, None)), "ws"),
        (Conv(), wrong(CONV, gate__weight=(SIX, [0, 3, 4])), "gate"),
    ],
)
def test_a_wrong_channel_is_seen_and_located(model: nn.Module, kept: dict, where: str) -> None:
    inputs = IMAGE if isinstance(model, Conv) else IDS
    report = verify_pruning(model, cut(model, kept), dummy_input=inputs, kept=kept)
    assert not report.exact and report.error > 1e-4
    assert report.where is not None and report.where.split()[0] == where, report
    assert not verify_pruning(model, lambda copied: cut(copied, kept), dummy_input=inputs).exact


def test_wrong_groups_are_seen() -> None:
    """Channels 0..3 and 4..7 are the two groups; keeping three of one and one of the other moves a channel between them."""
    keep = [0, 1, 2, 6]
    kept = {name: tuple(keep if d is EVEN else d for d in dims) for name, dims in CONV.items()}
    dense = Conv()
    report = verify_pruning(dense, cut(dense, kept), dummy_input=IMAGE, kept=kept)
    assert not report.exact and report.where is not None and report.where.startswith("gn")


def test_untied_weights_are_seen() -> None:
    dense = Block("layer")
    small = cut(dense, BLOCK)
    other = [1, 2, 3, 5, 7]
    small.head.weight = nn.Parameter(dense.head.weight.data[:, other])
    report = verify_pruning(dense, small, dummy_input=IDS, kept=wrong(BLOCK, head__weight=(None, other)))
    assert not report.exact and "one tensor" in report.message


def test_values_that_are_not_those_said_to_be_kept() -> None:
    dense = Conv()
    small = cut(dense, CONV)
    with torch.no_grad():
        small.gate.weight[0, 0] += 1
    assert "gate.weight" in verify_pruning(dense, small, dummy_input=IMAGE, kept=CONV).message
    assert verify_pruning(dense, small, dummy_input=IMAGE, kept=CONV, check_values=False).exact


def test_a_pruner_that_computes_and_one_that_breaks() -> None:
    def averages(model: nn.Module) -> None:
        model.out.weight.data *= 0.5

    def breaks(model: nn.Module) -> None:
        model.out.weight.data = model.out.weight.data[:, :3]

    assert "computed" in verify_pruning(Conv(), averages, dummy_input=IMAGE).message
    report = verify_pruning(Conv(), breaks, dummy_input=IMAGE)
    assert not report.exact and "does not run" in report.message and "test_verify.py" in report.message


def test_a_pruned_output_is_refused() -> None:
    dense = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    kept = {"2.weight": ([0, 2], None), "2.bias": ([0, 2],)}
    report = verify_pruning(dense, cut(dense, kept), dummy_input=torch.randn(2, 4), kept=kept)
    assert not report.exact and "(2, 2) instead of (2, 3)" in report.message


def test_a_coincidental_zero_is_not_dead() -> None:
    """ReLU zeroes whole live channels of a single position; the mean after it still counts them."""

    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 16), nn.Linear(1, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu().mean(-1, keepdim=True))

    dense, keep = Pool(), list(range(0, 16, 2))
    kept = {"a.weight": (keep, None), "a.bias": (keep,)}
    assert verify_pruning(dense, cut(dense, kept), dummy_input=torch.randn(1, 4), kept=kept).exact


def test_softmax_and_topk_are_over_live_entries() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.value = nn.Linear(4, 6), nn.Parameter(torch.randn(6, 5))

        def forward(self, x: Tensor) -> Tensor:
            weights, chosen = self.gate(x).softmax(-1).topk(2)
            return (weights[..., None] * self.value[chosen]).sum(-2)

    dense, keep = Router(), [1, 2, 5]
    kept = {"gate.weight": (keep, None), "gate.bias": (keep,), "value": (keep, None)}
    assert verify_pruning(dense, cut(dense, kept), dummy_input=torch.randn(7, 4), kept=kept).exact


def test_outputs_in_a_dataclass() -> None:
    @dataclass
    class Out:
        first: Tensor
        rest: list[Tensor]

    class Model(nn.Sequential):
        def forward(self, x: Tensor) -> Out:
            y = super().forward(x)
            return Out(y, [y.sum(), y.argmax(-1)])

    dense = Model(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    kept = {"0.weight": ([0, 1], None), "0.bias": ([0, 1],), "2.weight": (None, [0, 1])}
    assert verify_pruning(dense, cut(dense, kept), dummy_input=torch.randn(2, 4), kept=kept).checked == 3


def family(name: str, *slots: tuple[str, int], size: int = 12) -> SimpleNamespace:
    made = [SimpleNamespace(parameter=p, dim=d, positions=[[i] for i in range(size)]) for p, d in slots]
    return SimpleNamespace(name=name, atoms=tuple(range(size)), slots=made)


def test_families_are_proven_by_permutation() -> None:
    dense = Block("layer")
    small, ffn = cut(dense, BLOCK), family("ffn", ("up.weight", 0), ("up.bias", 0), ("down.weight", 1))
    report = verify_pruning(dense, small, [ffn], dummy_input=IDS, kept=BLOCK)
    assert report.exact and report.permutation_error is not None and report.permutation_error < 1e-12
    incomplete = family("no bias", ("up.weight", 0), ("down.weight", 1))
    report = verify_pruning(dense, small, [ffn, incomplete], dummy_input=IDS, kept=BLOCK)
    assert not report.exact and "no bias" in report.message


def test_a_pruned_model_alone_proves_nothing() -> None:
    with pytest.raises(ConfigError, match="kept"):
        verify_pruning(Conv(), Conv(), dummy_input=IMAGE)
    dense = Conv()
    report = verify_pruning(dense, cut(dense, CONV), dummy_input=IMAGE, kept={})
    assert not report.exact and "a.weight of the pruned model is" in report.message


@pytest.mark.parametrize("name", ["residual", "attention"])
def test_every_single_mistake_of_a_cut_is_seen(name: str) -> None:
    """Each dimension of each tensor that the pruner cut is cut wrongly in turn: another index kept, or two exchanged."""
    example = build("plain", name)
    axes = infer_axes(example.model, example.args)
    drop, _ = axes.relax({a for f in axes.families for a in f.atoms[::2]})
    pruned, kept, dense = (
        copy.deepcopy(example.model),
        axes.kept(drop),
        dict(example.model.named_parameters(remove_duplicate=False)),
    )
    axes.apply(pruned, drop)
    assert verify_pruning(example.model, pruned, dummy_input=example.args, kept=kept).exact
    mistakes = 0
    for parameter, dims in kept.items():
        tied = [n for n, p in dense.items() if p is dense.get(parameter)]
        for dim, indices in enumerate(dims):
            if indices is None or parameter not in dense or len(indices) in (1, dense[parameter].shape[dim]):
                continue
            if ".1." in parameter or ".2." in parameter:  # blocks like the first one
                continue
            lost = sorted(set(range(dense[parameter].shape[dim])) - {int(i) for i in indices})
            for other in ([*indices[:-1], lost[0]], [indices[1], indices[0], *indices[2:]]):
                changed = tuple(other if d == dim else k for d, k in enumerate(dims))
                broken, data = copy.deepcopy(pruned), dense[parameter].data
                for d, index in enumerate(changed):
                    data = data if index is None else data.index_select(d, torch.as_tensor([int(i) for i in index]))
                broken.get_parameter(parameter).data = data
                report = verify_pruning(example.model, broken, dummy_input=example.args, kept=kept | dict.fromkeys(tied, changed))
                assert not report.exact, (parameter, dim, report)
                mistakes += 1
    assert mistakes > 20
