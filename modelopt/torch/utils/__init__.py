"""Small helpers about networks, tensors, random numbers and processes. No technique words in here."""

from __future__ import annotations

from modelopt.torch.utils.distributed import all_reduce_max, is_master, rank, world_size
from modelopt.torch.utils.network import (
    get_module_device,
    get_submodule,
    is_parallel,
    num_parameters,
    set_submodule,
    unwrap_model,
)
from modelopt.torch.utils.random import seeded
from modelopt.torch.utils.tensor import digest, num_bytes

__all__ = [
    "all_reduce_max",
    "digest",
    "get_module_device",
    "get_submodule",
    "is_master",
    "is_parallel",
    "num_bytes",
    "num_parameters",
    "rank",
    "seeded",
    "set_submodule",
    "unwrap_model",
    "world_size",
]
