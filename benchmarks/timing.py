"""The time of a call within a CUDA graph; needs torch alone, so that a process without this library can measure with it."""

from __future__ import annotations

from collections.abc import Callable

import torch


def measure(calls: list[Callable[[], object]], count: int) -> float:
    """Return the microseconds of one call, `count` calls (cycling through `calls`) being one graph; the median of its replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(count):
                calls[i % len(calls)]()
        graph.replay()
        torch.cuda.synchronize()
        times = []
        for _ in range(9):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(stream)
            graph.replay()
            end.record(stream)
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1000 / count)
    return sorted(times)[len(times) // 2]
