"""The process group, if there is one: every function is the single-process answer until `torch.distributed` is initialized."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def is_initialized() -> bool:
    """Return whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def rank(group: ProcessGroup | None = None) -> int:
    """Return the rank of this process, 0 without a group."""
    return dist.get_rank(group) if is_initialized() else 0


def world_size(group: ProcessGroup | None = None) -> int:
    """Return the number of processes, 1 without a group."""
    return dist.get_world_size(group) if is_initialized() else 1


def is_master() -> bool:
    """Return whether this process is the one that writes files."""
    return rank() == 0


def all_reduce_max(tensor: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Replace `tensor` in place by its elementwise maximum over the group, and return it; nothing happens without a group."""
    if world_size(group) > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor
