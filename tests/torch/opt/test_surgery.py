from __future__ import annotations

import copy
import functools

import pytest
import torch
import toy
from torch import nn

from modelopt.core.errors import ModeError
from modelopt.core.plugins import has
from modelopt.torch.opt.surgery import (
    convert_class,
    instance_forward_patched,
    is_converted,
    named_paths,
    original_class,
    replace_module,
    revert_class,
    walk,
)


class Loud(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 3


def test_identity_hooks_ties_and_optimizers_survive():
    model = toy.Tied()
    head, weight, calls = model.head, model.head.weight, []
    head.register_forward_hook(lambda *a: calls.append(1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    plain = model(toy.ids())
    assert convert_class(head, Loud) is head
    assert model.head is head and head.weight is weight is model.embed.weight
    assert any(p is weight for g in optimizer.param_groups for p in g["params"])
    torch.testing.assert_close(model(toy.ids()), plain * 3)
    assert len(calls) == 2
    assert is_converted(head) and original_class(head) is nn.Linear
    revert_class(head)
    assert type(head) is nn.Linear and not is_converted(head)
    torch.testing.assert_close(model(toy.ids()), plain)
    assert "_modelopt_original_class" not in vars(nn.Linear)


def test_one_new_class_for_two_originals():
    class Other(nn.Linear):
        pass

    a, b = nn.Linear(2, 2), Other(2, 2)
    convert_class(a, Loud), convert_class(b, Loud)
    assert original_class(a) is nn.Linear and original_class(b) is Other
    assert type(revert_class(b)) is Other and type(revert_class(a)) is nn.Linear
    convert_class(b, Loud)
    assert type(revert_class(copy.deepcopy(b))) is Other


def test_deepcopy_and_state(tmp_path):
    layer = convert_class(nn.Linear(2, 2), toy.scaled_class(nn.Linear))
    layer.register_buffer("_amax", torch.tensor(2.0))
    twin = copy.deepcopy(layer)
    assert type(twin) is type(layer)
    x = torch.randn(3, 2)
    assert torch.equal(twin(x), layer(x))
    torch.save(layer.state_dict(), tmp_path / "s.pt")
    twin.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True))


def test_converted_module_compiles():
    layer = convert_class(nn.Linear(2, 2), Loud)
    x = torch.randn(3, 2)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_what_is_no_module_is_refused():
    with pytest.raises(ModeError):
        convert_class(nn.Linear(2, 2), dict)

    class Slotted(nn.Module):
        __slots__ = ("x",)

    layer = nn.Linear(2, 2)
    with pytest.raises(ModeError, match="cannot become"):
        convert_class(layer, Slotted)
    assert type(layer) is nn.Linear


@pytest.mark.skipif(not has("accelerate"), reason="accelerate is not installed")
def test_accelerate_hooks_reach_the_new_forward():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counter(ModelHook):
        before = after = 0

        def pre_forward(self, module, *args, **kwargs):
            self.before += 1
            return args, kwargs

        def post_forward(self, module, output):
            self.after += 1
            return output

    layer, hook, x = nn.Linear(2, 2), Counter(), torch.randn(3, 2)
    plain = layer(x)
    add_hook_to_module(layer, hook)
    assert instance_forward_patched(layer)
    convert_class(layer, Loud)
    torch.testing.assert_close(layer(x), plain * 3)
    assert (hook.before, hook.after) == (1, 1)
    assert layer.forward.__wrapped__ == layer._old_forward
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(twin(x), plain * 3)
    revert_class(layer)
    torch.testing.assert_close(layer(x), plain)
    convert_class(layer, Loud)
    remove_hook_from_module(layer)  # leaves the bound method in `forward`
    torch.testing.assert_close(layer(x), plain * 3)
    torch.testing.assert_close(revert_class(layer)(x), plain)
    add_hook_to_module(convert_class(layer, Loud), hook)
    torch.testing.assert_close(layer(x), plain * 3)


def test_an_unknown_patch_is_refused_and_nothing_changes():
    layer = nn.Linear(2, 2)
    layer.forward = functools.partial(lambda x: x)
    with pytest.raises(ModeError, match="replaced on the instance"):
        convert_class(layer, Loud)
    assert type(layer) is nn.Linear

    class Quiet(nn.Linear):  # does not override forward, so nothing is bypassed
        extra = 1

    assert convert_class(layer, Quiet).extra == 1


def test_walk_yields_second_names():
    model = toy.Tied()
    once = [n for n, _ in walk(model)]
    assert once == [n for n, _ in model.named_modules()]
    every = [n for n, _ in walk(model, duplicates=True)]
    assert every == [n for n, _ in model.named_modules(remove_duplicate=False)]
    assert "again.0" in every and "again.0" not in once
    assert named_paths(model, model.block) == ["block", "again"]


def test_replace_module_under_every_name():
    model = toy.Tied()
    new = nn.Identity()
    assert replace_module(model, model.block, new) == ["block", "again"]
    assert model.block is new and model.again is new
