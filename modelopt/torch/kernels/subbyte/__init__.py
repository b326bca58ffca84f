"""Codes of four and six bits from float16 and bfloat16, two values to an instruction: E2M1 and NF4, E3M2 and E2M3.

    nibbles.cu  fake_quantize and quantize of E2M1 (scales f32, or E4M3 with one f32; rule 46 too)
    normal.cu   fake_quantize and quantize of NF4 (scales f32)
    sixes.cu    quantize of E3M2 and E2M3 with e8m0 scales

CUDA C++, compiled at run time. What they do not serve is left to Triton (`why_not`). Formulas: constants.py.
"""

from __future__ import annotations

import functools
import math
import pathlib

import torch
from torch import Tensor

from modelopt.numerics import Format, parse
from modelopt.torch.kernels.matmul import cuda
from modelopt.torch.kernels.subbyte.constants import THREADS, TYPES, family, faster, of_nibbles, of_normal, of_sixes

_BLOCKS = (16, 32, 64, 128, 256, 512)


@functools.lru_cache(maxsize=4096)
def _unlike(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, text: str, codes: bool) -> str | None:
    """Return why these kernels do not serve tensors of one kind, or None."""
    fmt = parse(text)
    served = family(fmt)
    if served is None or (served == "sixes" and not codes):
        return f"no kernel of two values to an instruction for {fmt}"
    if dtype not in TYPES:
        return f"the tensor is {dtype}; the kernels take float16 and bfloat16"
    from modelopt.torch.kernels import triton_plan as planning  # needs Triton, which the sources do not

    plan = planning.layout(shape, fmt.block.sizes(shape) if shape else (), True)
    if isinstance(plan, str) or plan.form != "flat" or plan.block not in _BLOCKS[served == "sixes" :]:
        return "blocks are not neighbours in whole numbers of 16 (six bits: 32), 32, 64, ... 512"
    if fmt.rule == "46" and plan.block != 16:
        return "rule 46 is for blocks of 16"
    if math.prod(shape) // 16 >= 2**31:
        return "the tensor is too large"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return "packed comparisons need compute capability 9.0"
    return cuda.why_not(device)


def why_not(x: Tensor, fmt: Format, codes: bool) -> str | None:
    """Return why these kernels do not serve `x` (contiguous) for `quantize` (`codes`) or `fake_quantize`, or None."""
    if x.data_ptr() % 16:
        return "the tensor is not aligned to 16 bytes"
    return _unlike(tuple(x.shape), x.dtype, x.device, fmt.text, codes)


def preferred(x: Tensor, fmt: Format, codes: bool) -> bool:
    """Return whether these kernels serve `x` and are faster than Triton's."""
    return why_not(x, fmt, codes) is None and faster(fmt, codes)


def fake_quantize(x: Tensor, fmt: Format, amax: Tensor | None, global_amax: Tensor | None) -> Tensor:
    """Return `x` rounded to `fmt`; `amax` None is found. Ranges as `amax.triton.ranges` returns them."""
    out = torch.empty_like(x)
    _launch(x, fmt, False, (out, None, None, amax, global_amax), amax is None)
    return out


def quantize(x: Tensor, fmt: Format, amax: Tensor | None, global_amax: Tensor | None) -> list[Tensor]:
    """Return [codes, *scales]; see `fake_quantize`."""
    grid = fmt.grid(x.shape)
    codes = torch.empty((*x.shape[:-1], x.shape[-1] * fmt.element.bits // 8), dtype=torch.uint8, device=x.device)
    parts = [codes, torch.empty(grid, dtype=fmt.stored_scale.dtype, device=x.device)]
    if isinstance(fmt.scale, Format):
        parts.append(torch.empty(fmt.scale.grid(grid), dtype=torch.float32, device=x.device))
    others = (codes, parts[1], amax) if family(fmt) == "sixes" else (codes, parts[1], parts[-1], amax, global_amax)
    _launch(x, fmt, True, others, amax is None)
    return parts


def _launch(x: Tensor, fmt: Format, codes: bool, others: tuple[Tensor | None, ...], found: bool) -> None:
    if x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return _launch(x, fmt, codes, others, found)
    kernel, count, blocks, shared = _prepared(tuple(x.shape), x.dtype, x.device, fmt.text, found, codes)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    return kernel.launch((blocks, 1, 1), THREADS, shared, stream, (x, *others, count))


@functools.lru_cache(maxsize=4096)
def _prepared(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, text: str, found: bool, codes: bool
) -> tuple[cuda.Kernel, int, int, int]:
    """Return (kernel, pieces of a thread, blocks of threads, bytes of shared memory) for tensors of one kind."""
    fmt = parse(text)
    block, name = fmt.block.sizes(shape)[-1], family(fmt)
    if name == "sixes":
        given = of_sixes(fmt, dtype, found, block)
    else:
        given = (of_nibbles if name == "nibbles" else of_normal)(fmt, dtype, found, codes, block)
    options = dict(given)
    buffers = 2 if int(options["AHEAD"]) else 0 if codes and name != "sixes" else 1
    shared = 2 * int(options["EACH"]) * THREADS * buffers
    count = math.prod(shape) // int(options["EACH"])
    most = torch.cuda.get_device_properties(device).multi_processor_count * int(options["RESIDENT"])
    kernel = cuda.compiled(source(str(name)), str(name), given, device)
    return kernel, count, min(-(-count // THREADS), most), shared


@functools.cache
def source(name: str) -> str:
    """Return the source of a kernel, "nibbles", "normal" or "sixes"."""
    parts = ("words", "halves", *(("borders",) if name == "nibbles" else ()), name)
    return "".join(pathlib.Path(__file__).with_name(f"{part}.cu").read_text() for part in parts)
