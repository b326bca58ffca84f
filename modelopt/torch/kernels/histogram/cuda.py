"""The histogram on a CUDA device: counters in shared memory, a few copies of each so that threads seldom meet, one read of x."""

from __future__ import annotations

import functools
import pathlib

import torch
from torch import Tensor

from modelopt.torch.kernels.matmul import cuda

_TYPES = {torch.float32: ("F32", 4), torch.float16: ("F16", 8), torch.bfloat16: ("BF16", 8)}
_COUNTERS = 1 << 14  # of one block, in all copies
_THREADS = 512


def why_not(x: Tensor, num_bins: int) -> str | None:
    """Return why this kernel does not serve `x`, or None."""
    if x.dtype not in _TYPES:
        return f"the tensor is {x.dtype}; the kernel takes float32, float16 and bfloat16"
    return "the tensor is empty" if x.numel() == 0 else cuda.why_not()


@functools.cache
def _source() -> str:
    return pathlib.Path(__file__).with_name("histogram.cu").read_text()


def histogram(x: Tensor, num_bins: int, limit: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (counts, int64 [num_bins]; max |x|, float32); see `kernels.histogram`."""
    x = x.detach().contiguous()
    x = x.clone() if x.data_ptr() % 16 else x
    kind, each = _TYPES[x.dtype]
    copies = max(1, min(8, _COUNTERS // num_bins))
    log = limit is None
    constants = (
        (kind, "1"),
        ("BINS", str(num_bins)),
        ("COPIES", str(copies)),
        ("THREADS", str(_THREADS)),
        ("SHIFT", str(32 - num_bins.bit_length()) if log else "-1"),
    )
    kernel = cuda.compiled(_source(), "histogram", constants, x.device)
    counts = torch.zeros(num_bins, dtype=torch.int64, device=x.device)
    peak = torch.zeros((), dtype=torch.int32, device=x.device)
    factor = None if limit is None else torch.full_like(limit, num_bins) / limit
    per_block = _THREADS * 4 * each
    blocks = min(-(-x.numel() // per_block), 2 * torch.cuda.get_device_properties(x.device).multi_processor_count)
    size = x.numel()
    stream = torch.cuda.current_stream(x.device).cuda_stream
    shared = 4 * num_bins * copies
    kernel.launch((blocks, 1, 1), _THREADS, shared, stream, (x, counts, peak, factor, size & 0x7FFFFFFF, size >> 31))
    return counts, peak.view(torch.float32)
