"""Every criterion ranks as its formula says, sees all slices of an atom, and refuses what it cannot measure."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from modelopt.core.errors import CalibrationError, UnknownNameError
from modelopt.torch.prune.importance import IMPORTANCE, Data, score_families
from modelopt.torch.trace.axes import infer_axes


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    return model, infer_axes(model, (torch.randn(2, 6),))


def scores(model, axes, name, **data):
    return score_families(model, axes, name, Data(**data))[axes.families[0].name]


def test_magnitudes_are_sums_over_row_bias_and_column(net):
    model, axes = net
    first, last = model[0], model[2]
    l1 = first.weight.abs().sum(1) + first.bias.abs() + last.weight.abs().sum(0)
    l2 = (first.weight.square().sum(1) + first.bias.square() + last.weight.square().sum(0)).sqrt()
    np.testing.assert_allclose(scores(model, axes, "l1"), l1.detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(scores(model, axes, "l2"), l2.detach().numpy(), rtol=1e-5)


def test_fpgm_is_the_distance_to_the_other_filters(net):
    model, axes = net
    wanted = torch.cdist(model[0].weight, model[0].weight).sum(1)
    np.testing.assert_allclose(scores(model, axes, "fpgm"), wanted.detach().numpy(), rtol=1e-4)


def test_activation_is_the_norm_of_what_the_consumer_reads(net):
    model, axes = net
    batches = [torch.randn(5, 6), torch.randn(3, 6)]
    hidden = torch.relu(model[0](torch.cat(batches)))
    np.testing.assert_allclose(
        scores(model, axes, "activation", forward_loop=batches), hidden.norm(dim=0).detach().numpy(), rtol=1e-5
    )


def test_padding_does_not_count():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, pad_token_id=0)).eval()
    ids = torch.arange(3, 11)[None]
    axes = infer_axes(model, (), {"input_ids": ids, "use_cache": False})
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[:, 8:] = 0
    padded = {"input_ids": torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], 1), "attention_mask": mask, "use_cache": False}
    plain = score_families(model, axes, "activation", Data(forward_loop=[{"input_ids": ids, "use_cache": False}]))
    found = score_families(model, axes, "activation", Data(forward_loop=[padded]))
    for name in plain:
        np.testing.assert_allclose(found[name], plain[name], rtol=1e-4)


def test_taylor_is_weight_times_gradient(net):
    model, axes = net
    x, y = torch.randn(7, 6), torch.randn(7, 3)
    loss = nn.functional.mse_loss(model(x), y)
    grads = dict(zip([n for n, _ in model.named_parameters()], torch.autograd.grad(loss, list(model.parameters())), strict=True))
    effect = {n: (p * grads[n]).abs().detach() for n, p in model.named_parameters()}
    wanted = effect["0.weight"].sum(1) + effect["0.bias"] + effect["2.weight"].sum(0)
    found = scores(
        model, axes, "taylor", data_loader=[(x, y)], loss_func=lambda out, batch: nn.functional.mse_loss(out, batch[1])
    )
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4)
    assert all(p.grad is None for p in model.parameters())


def test_random_depends_on_the_seed_alone(net):
    model, axes = net
    assert (scores(model, axes, "random", seed=1) == scores(model, axes, "random", seed=1)).all()
    assert (scores(model, axes, "random", seed=1) != scores(model, axes, "random", seed=2)).any()


@pytest.mark.parametrize("name", ["activation", "taylor"])
def test_measuring_leaves_every_training_flag_alone(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3)).train()
    model[1].eval()
    before = model[1].running_mean.clone()
    axes = infer_axes(model, (torch.randn(4, 6),))
    seen = []
    model[2].register_forward_hook(lambda module, args, output: seen.append(module.training))
    data = [torch.randn(4, 6)]
    given = {"forward_loop": data} if name == "activation" else {"data_loader": data, "loss_func": lambda y, _: y.square().mean()}
    scores(model, axes, name, **given)
    assert seen and not any(seen)
    assert [m.training for m in model] == [True, False, True, True]
    assert torch.equal(model[1].running_mean, before)


def test_missing_data_and_unknown_names(net):
    model, axes = net
    with pytest.raises(CalibrationError, match="forward_loop"):
        scores(model, axes, "activation")
    with pytest.raises(CalibrationError, match="did not run"):
        scores(model, axes, "activation", forward_loop=[])
    with pytest.raises(CalibrationError, match="loss_func"):
        scores(model, axes, "taylor")
    with pytest.raises(UnknownNameError, match='Did you mean "taylor"'):
        scores(model, axes, "tailor")
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="not finite"):
        scores(model, axes, "l2")


def test_one_can_add_a_criterion(net):
    model, axes = net
    IMPORTANCE.register("first", lambda model, axes, data: -np.arange(axes.store.count, dtype=float))
    try:
        assert scores(model, axes, "first").argmax() == 0
    finally:
        IMPORTANCE.unregister("first")
