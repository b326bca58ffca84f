"""Zeros by which the blocks of a launch find out who arrives last; every kernel leaves them zero.

A stream has its own; every call that is captured in a graph gets some for itself alone, since the graph may be replayed anywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modelopt.torch.kernels.matmul import cuda

_POOL = 1 << 20
_streams: dict[tuple[torch.device, int], Tensor] = {}
_captured: dict[torch.device, tuple[Tensor, int]] = {}
_gates: dict[tuple[torch.device, int, int], Tensor] = {}


def take(device: torch.device, count: int) -> Tensor:
    """Return `count` int32 zeros on `device` for a launch on the current stream."""
    if torch.cuda.is_current_stream_capturing():
        pool, used = _captured.get(device, (None, 0))
        if pool is None or used + count > pool.numel():
            return torch.zeros(count, dtype=torch.int32, device=device)  # a node of the graph, which zeroes them at each replay
        _captured[device] = pool, used + count
        return pool[used : used + count]
    _provide(device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _streams or _streams[key].numel() < count:
        _streams[key] = torch.zeros(max(count, 1 << 16), dtype=torch.int32, device=device)
    return _streams[key]


def _provide(device: torch.device) -> None:
    """Make what captured calls will get; memory that is allocated within a capture would stay with its graph's."""
    if device not in _captured:
        _captured[device] = torch.zeros(_POOL, dtype=torch.int32, device=device), 0
        torch.cuda.current_stream(device).synchronize()


def gate(device: torch.device) -> Tensor:
    """Return two int32 on `device` that all calls on the current stream share, or all that are captured from it at one time.

    They begin as zeros; what they are for is written in `eights_x.cu`.
    """
    capturing, stream = torch.cuda.is_current_stream_capturing(), torch.cuda.current_stream(device).cuda_stream
    capture = cuda.capture(stream) if capturing else 0
    if capture is None:
        return take(device, 2)
    key = device, stream, capture
    if not capturing:
        _provide(device)
    if key not in _gates:
        _gates[key] = take(device, 2) if capturing else torch.zeros(2, dtype=torch.int32, device=device)
    return _gates[key]
