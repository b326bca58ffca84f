"""Launching one kernel for one kind of tensors many times: what Triton works out for a call is kept after the first.

A `Launch` is made for fixed shapes, types and constants. What may still differ is whether addresses are multiples of 16, for
which Triton compiles variants; each is launched through Triton once and directly from then on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver


class Launch:
    """A kernel with its grid, its numbers (the arguments after the tensors) and its compile-time constants and options."""

    def __init__(self, kernel: Any, programs: int, numbers: tuple[int, ...], constants: dict[str, Any]) -> None:
        self.kernel, self.programs, self.numbers, self.constants = kernel, programs, numbers, constants
        self._ready: dict[tuple[int, ...], tuple[Any, ...]] = {}

    def __call__(self, *tensors: Tensor) -> None:
        """Launch on the current stream of the tensors' device."""
        index = tensors[0].device.index
        if index is not None and index != torch.cuda.current_device():
            with torch.cuda.device(index):
                self._launch(index, tensors)
        else:
            self._launch(index, tensors)

    def _launch(self, index: int | None, tensors: tuple[Tensor, ...]) -> None:
        addresses = [t.data_ptr() for t in tensors]
        key = tuple([a & 15 == 0 for a in addresses])
        ready = self._ready.get(key)
        if ready is None or knobs.runtime.launch_enter_hook is not None:
            compiled = self.kernel[(self.programs,)](*tensors, *self.numbers, **self.constants)
            if hasattr(compiled, "packed_metadata"):
                rest = [self.constants[p.name] for p in self.kernel.params[len(tensors) + len(self.numbers) :]]
                self._ready[key] = (compiled.run, compiled.function, compiled.packed_metadata, (*self.numbers, *rest))
            return
        run, function, metadata, rest = ready
        stream = driver.active.get_current_stream(index)
        run(self.programs, 1, 1, stream, function, metadata, None, None, None, *addresses, *rest)
