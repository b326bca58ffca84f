from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from modelopt.core.errors import UnknownNameError
from modelopt.torch import utils


def test_device_parameters_and_wrappers():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    assert utils.get_module_device(model) == torch.device("cpu")
    assert utils.get_module_device(nn.ReLU()) == torch.device("cpu")
    assert utils.get_module_device(nn.Linear(1, 1, device="meta")).type == "meta"
    model.append(model[0])
    assert utils.num_parameters(model) == 8
    model[0].bias.requires_grad_(False)
    assert utils.num_parameters(model, trainable_only=True) == 6
    assert utils.unwrap_model(model) is model and not utils.is_parallel(model)
    wrapped = torch.compile(nn.DataParallel(model), backend="eager")
    assert utils.unwrap_model(wrapped) is model
    assert utils.is_parallel(nn.DataParallel(model))

    class OptimizedModule(nn.Linear):  # a user's class of that name is not torch.compile's
        pass

    other = OptimizedModule(1, 1)
    assert utils.unwrap_model(other) is other


def test_submodules_by_name():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ReLU())
    assert utils.get_submodule(model, "") is model and utils.get_submodule(model, "0.0") is model[0][0]
    for bad in ("0.7", "__class__", "0.weight", "..", "0..0", "forward"):
        with pytest.raises(UnknownNameError):
            utils.get_submodule(model, bad)
    new = nn.Identity()
    utils.set_submodule(model, "0.0", new)
    assert model[0][0] is new
    for bad in ("", "0.1", "x"):
        with pytest.raises(UnknownNameError):
            utils.set_submodule(model, bad, new)
    with pytest.raises(UnknownNameError, match='Did you mean "0.0"'):
        utils.get_submodule(model, "0.0x")


def test_bytes_count_shared_memory_once():
    w = torch.zeros(4, 2)
    assert utils.num_bytes(w) == 32
    assert utils.num_bytes([w, w.t(), w[1:]]) == 32
    assert utils.num_bytes([w, w.clone().to(torch.float8_e4m3fn)]) == 40
    meta = torch.zeros(4, device="meta")
    assert utils.num_bytes([meta, torch.zeros(2, device="meta")]) == 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.bool, torch.int64])
def test_digest_sees_every_bit_and_not_the_layout(dtype):
    x = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    assert utils.digest(x) == utils.digest(x.clone()) == utils.digest(x.t().contiguous().t())
    assert utils.digest(x) != utils.digest(x.reshape(3, 2))
    y = x.clone()
    y.view(torch.uint8)[0, 0] ^= 1
    assert utils.digest(x) != utils.digest(y)


def test_digest_of_special_values():
    assert utils.digest(torch.tensor([0.0])) != utils.digest(torch.tensor([-0.0]))
    assert utils.digest(torch.tensor([float("nan")])) == utils.digest(torch.tensor([float("nan")]))
    assert utils.digest(torch.zeros(0)) != utils.digest(torch.zeros(0, 2))
    assert utils.digest(torch.tensor(1.0)) != utils.digest(torch.tensor([1.0]))


def test_seeded_leaves_no_trace():
    torch.manual_seed(3), random.seed(3)
    expected = torch.rand(3), random.random()
    torch.manual_seed(3), random.seed(3)
    with utils.seeded(0) as generator:
        a = torch.rand(2), random.random(), torch.rand(2, generator=generator)
    assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]
    with utils.seeded(0) as generator:
        b = torch.rand(2), random.random(), torch.rand(2, generator=generator)
    assert torch.equal(a[0], b[0]) and a[1] == b[1] and torch.equal(a[2], b[2])
    torch.manual_seed(3)
    with pytest.raises(KeyError), utils.seeded(0):
        raise KeyError
    assert torch.equal(torch.rand(3), expected[0])


def test_single_process_answers():
    x = torch.tensor([1.0])
    assert utils.rank() == 0 and utils.world_size() == 1 and utils.is_master()
    assert utils.all_reduce_max(x) is x and x.item() == 1.0


def _worker(rank, path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    x = torch.tensor([rank, -rank], dtype=torch.float32)
    result = utils.all_reduce_max(x)
    ok = result.tolist() == [1.0, 0.0] and utils.rank() == rank and utils.world_size() == 2 and utils.is_master() == (rank == 0)
    torch.distributed.destroy_process_group()
    if not ok:
        raise RuntimeError(f"rank {rank}: {result}")


def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(_worker, args=(str(tmp_path / "store"),), nprocs=2)
