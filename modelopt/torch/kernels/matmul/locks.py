"""Zeros by which the blocks of a launch find out who arrives last; every kernel leaves them zero.

A stream has its own; every call that is captured in a graph gets some for itself alone, since the graph may be replayed anywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

_POOL = 1 << 20
_streams: dict[tuple[torch.device, int], Tensor] = {}
_captured: dict[torch.device, tuple[Tensor, int]] = {}


def take(device: torch.device, count: int) -> Tensor:
    """Return `count` int32 zeros on `device` for a launch on the current stream."""
    if torch.cuda.is_current_stream_capturing():
        pool, used = _captured.get(device, (None, 0))
        if pool is None or used + count > pool.numel():
            return torch.zeros(count, dtype=torch.int32, device=device)  # a node of the graph, which zeroes them at each replay
        _captured[device] = pool, used + count
        return pool[used : used + count]
    if device not in _captured:
        _captured[device] = torch.zeros(_POOL, dtype=torch.int32, device=device), 0
        torch.cuda.current_stream(device).synchronize()
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _streams or _streams[key].numel() < count:
        _streams[key] = torch.zeros(max(count, 1 << 16), dtype=torch.int32, device=device)
    return _streams[key]
