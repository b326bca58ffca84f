"""The Walsh-Hadamard transform on a CUDA device: `blocks.cu` for short blocks, within warps, and `rows.cu` through shared memory.

Both read the tensor once, coalesced, while the tile before is computed, and add in the order of the law.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt.torch.kernels.hadamard.matrices import factors, matrix
from modelopt.torch.kernels.hadamard.reference import scale
from modelopt.torch.kernels.matmul import cuda

TYPES = {torch.float32: ("F32", 4), torch.float16: ("F16", 8), torch.bfloat16: ("BF16", 8)}  # name, values in 16 bytes
LARGEST_BLOCK = 256  # of blocks.cu
_WARPS = 8
_REGISTERS, SHARED = 1 << 16, 226 << 10  # of a multiprocessor; bytes of shared memory
_TILE = 8192  # values of a thread block of rows.cu, where blocks are shorter


def why_not(x: Tensor, size: int) -> str | None:
    """Return why these kernels do not serve `x`, or None."""
    if x.dtype not in TYPES:
        return f"the tensor is {x.dtype}; the kernels take float32, float16 and bfloat16"
    if x.numel() == 0:
        return "the tensor is empty"
    if x.numel() % 8:
        return "the tensor does not fill pieces of 16 bytes"
    if size == 1 or size * (4 + x.element_size()) > min(SHARED - 1024, cuda.shared_memory(x.device)):
        return f"blocks of {size} do not fit into shared memory"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "the device does not copy to shared memory by itself"
    return cuda.why_not(x.device)


@functools.cache
def source(*names: str) -> str:
    """Return the CUDA C++ of some files, given by their paths from this folder, one after another."""
    return "\n".join((pathlib.Path(__file__).parent / name).read_text() for name in names)


@dataclass(frozen=True, eq=False)  # plans are cached, and found by identity
class Plan:
    """How a kernel is compiled and launched: its files, constants, threads, bytes of shared memory, values of a block."""

    name: str
    files: tuple[str, ...]
    constants: tuple[tuple[str, str], ...]
    threads: int
    shared: int
    tile: int
    resident: int


@functools.lru_cache(maxsize=256)
def plan(size: int, dtype: torch.dtype, signs: int, inverse: bool) -> Plan:
    """Return the kernel for blocks of `size`; `signs`: 0 none, 1 before, -1 after the transform."""
    kind, each = TYPES[dtype]
    common = ((kind, "1"), ("SCALE", f"{float.hex(scale(size))}f"), ("SIGNS", str(signs)))
    if size & (size - 1) or size > LARGEST_BLOCK:
        return _rows(size, each, inverse, common)
    shared = _WARPS * 2 * 32 * 32 // each * 16
    resident = 4 if each == 8 else 3
    constants = (*common, ("SIZE", str(size)), ("WARPS", str(_WARPS)), ("RESIDENT", str(resident)))
    return Plan("blocks", ("values.cu", "tiles.cu", "blocks.cu"), constants, 32 * _WARPS, shared, 1024 * _WARPS, resident)


def _rows(size: int, each: int, inverse: bool, common: tuple[tuple[str, str], ...]) -> Plan:
    """Return the kernel that holds blocks in shared memory; `each`: values in 16 bytes."""
    m, power = factors(size)
    bits = power.bit_length() - 1
    count = max(1, _TILE // size)
    if bits < 5:
        count = max(count // 16, 1) * 16  # whole pieces in groups of eight
    tile = size * count
    few = tile < 7168 or (m == 20 and tile > 2 * _TILE)  # threads of 64 values would be too few
    own = 6 if each == 8 and bits >= 6 and not few else 5
    columns = 0 if m == 1 else (count << bits) // (1 if (m == 28 and own == 5) or bits == 0 else 2)
    threads = -(-tile // (32 << own)) * 32
    if own == 5:
        threads = min(512, max(threads, -(-columns // 32) * 32))
    elif threads < columns:  # as many as divide the columns
        threads = -(-columns // (32 * -(-columns // (threads * 8 // 7)))) * 32
    shared = tile * (4 + 16 // each)
    registers = 112 if own == 6 else 80 if m == 20 else 64
    resident = max(1, min(_REGISTERS // (threads * registers), SHARED // (shared + 1024)))
    first, second, last = stages(bits, m > 1, own)
    numbers = {"OWN_BITS": own, "M": m, "BITS": bits, "MIDDLE_1": first, "MIDDLE_2": second, "LAST": last, "COUNT": count}
    numbers |= {"THREADS": threads, "RESIDENT": resident}
    signs = "0"
    if m > 1:
        h = matrix(m).T if inverse else matrix(m)
        signs = ",".join(hex(sum(1 << j for j in range(m) if row[j] < 0)) for row in h.tolist())
    constants = (*common, ("ROWS", signs), *((name, str(n)) for name, n in numbers.items()))
    return Plan("rows", ("values.cu", "rows.cu"), constants, threads, shared, tile, resident)


def stages(bits: int, matrix_follows: bool, own: int = 5) -> tuple[int, int, int]:
    """Return how many bits beyond the lowest `own` the passes through shared memory transform: two in the middle and the last.

    The last pass stores to the tensor, and does so the faster the fewer bits it transforms (own - 2: four neighbours at once).

    >>> stages(9, False), stages(10, False), stages(14, False), stages(14, False, 6), stages(9, True)
    ((0, 0, 4), (2, 0, 3), (5, 0, 4), (4, 0, 4), (4, 0, 0))
    """
    rest, four = max(bits - own, 0), own - 2
    if matrix_follows:
        return min(rest, 5), max(rest - 5, 0), 0
    if rest <= 4:
        return 0, 0, rest
    if rest <= four + 5:
        return rest - four, 0, four
    return 5, 0, rest - 5


@functools.lru_cache(maxsize=256)
def loaded(how: Plan, device: torch.device) -> tuple[cuda.Kernel, int]:
    """Return the kernel of a plan and how many thread blocks `device` holds at once."""
    kernel = cuda.compiled(source(*how.files), how.name, how.constants, device)
    return kernel, how.resident * torch.cuda.get_device_properties(device).multi_processor_count


def hadamard(x: Tensor, size: int, signs: Tensor | None = None, inverse: bool = False) -> Tensor:
    """Return the transform of every `size` elements of the last dimension of `x`; see `kernels.hadamard`."""
    x = x.detach().contiguous()
    x = x.clone() if x.data_ptr() % 16 else x
    out = torch.empty_like(x)
    how = plan(size, x.dtype, 0 if signs is None else -1 if inverse else 1, inverse)
    kernel, most = loaded(how, x.device)
    pieces = x.numel() // TYPES[x.dtype][1]
    signs = None if signs is None else signs.to(x.device, torch.float32).contiguous()
    launch(kernel, how, min(-(-x.numel() // how.tile), most), x, signs, out, pieces & 0x7FFFFFFF, pieces >> 31)
    return out


def launch(kernel: cuda.Kernel, how: Plan, blocks: int, x: Tensor, *rest: Tensor | int | None) -> None:
    """Launch with the arguments `x, *rest` on the current stream of the device of `x`."""
    device = x.device
    with contextlib.nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        kernel.launch((blocks, 1, 1), how.threads, how.shared, stream, (x, *rest))
