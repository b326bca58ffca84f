"""The histogram on a CUDA device: counters in shared memory, a few copies of each so that threads seldom meet, one read of x."""

from __future__ import annotations

import contextlib
import functools
import pathlib

import torch
from torch import Tensor

from modelopt.torch.kernels.matmul import cuda

_TYPES = {torch.float32: ("F32", 4), torch.float16: ("F16", 8), torch.bfloat16: ("BF16", 8)}
_COUNTERS = 1 << 14  # of one block, in all columns
_LARGE = 1 << 25  # elements from which on larger blocks are faster
_IN_FLIGHT = 4  # vectors of 16 bytes that a thread loads at once


def why_not(x: Tensor, num_bins: int) -> str | None:
    """Return why this kernel does not serve `x`, or None."""
    if x.dtype not in _TYPES:
        return f"the tensor is {x.dtype}; the kernel takes float32, float16 and bfloat16"
    if x.numel() == 0:
        return "the tensor is empty"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "the device does not reduce within warps"
    if 4 * num_bins > cuda.shared_memory(x.device):
        return f"counters of {num_bins} bins do not fit into the shared memory of the device"
    return cuda.why_not(x.device)


@functools.cache
def _source() -> str:
    return pathlib.Path(__file__).with_name("histogram.cu").read_text()


def plan(num_bins: int, size: int) -> tuple[int, int]:
    """Return (threads of a block, columns: copies of each counter, one for every few lanes).

    >>> plan(2048, 1 << 28), plan(2048, 1 << 20), plan(32768, 1 << 28)
    ((512, 4), (256, 4), (512, 1))
    """
    columns = 1 << max((_COUNTERS // num_bins).bit_length() - 1, 0)
    return 512 if size >= _LARGE else 256, min(columns, 4)


def histogram(x: Tensor, num_bins: int, limit: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (counts, int64 [num_bins]; max |x|, float32); see `kernels.histogram`."""
    x = x.detach().contiguous()
    x = x.clone() if x.data_ptr() % 16 else x
    kind, each = _TYPES[x.dtype]
    size = x.numel()
    threads, columns = plan(num_bins, size)
    resident = min(2048 // threads, 3)
    constants = (
        (kind, "1"),
        ("BINS", str(num_bins)),
        ("COLUMNS", str(columns)),
        ("THREADS", str(threads)),
        ("RESIDENT", str(resident)),
        ("SHIFT", str(32 - num_bins.bit_length()) if limit is None else "-1"),
    )
    kernel = cuda.compiled(_source(), "histogram", constants, x.device)
    counts = torch.zeros(num_bins, dtype=torch.int64, device=x.device)
    peak = torch.zeros((), dtype=torch.int32, device=x.device)
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
    blocks = min(-(-size // (threads * _IN_FLIGHT * each)), resident * multiprocessors)
    arguments = (x, counts, peak, limit, size & 0x7FFFFFFF, size >> 31)
    with contextlib.nullcontext() if x.device.index == torch.cuda.current_device() else torch.cuda.device(x.device):
        stream = torch.cuda.current_stream(x.device).cuda_stream
        kernel.launch((blocks, 1, 1), threads, 4 * num_bins * columns, stream, arguments)
    return counts, peak.view(torch.float32)
