"""Transform and quantize in one pass on a CUDA device (`rounded.cu`): the transformed tensor is not written in between.

It can be done where scales belong to blocks of neighbours without gaps, and where no range of the transformed tensor must be
known beforehand: ranges are given, or those of 16 to 1024 neighbours or of a row, which one thread block holds.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from modelopt.numerics import Format, parse
from modelopt.numerics import reference as law
from modelopt.numerics.blocks import canonical
from modelopt.torch.kernels.choice import forced
from modelopt.torch.kernels.hadamard.cuda import LARGEST_BLOCK, SHARED, TYPES, Plan, launch, loaded
from modelopt.torch.kernels.hadamard.reference import scale
from modelopt.torch.kernels.matmul import cuda
from modelopt.torch.kernels.subbyte.constants import of_borders

_FILES = ("values.cu", "tiles.cu", "../subbyte/words.cu", "rounding.cu", "rounded.cu")
_ROOM = {0: 0, 2: 311, 3: 287}  # pieces of 16 bytes in which the lanes of a warp exchange their neighbours
_WARPS = 8
_OWN = 32  # values of a thread
_RULES = {"up": 0, "nearest": 1, "floor": 2}


def why_not(x: Tensor, size: int, fmt: Format, codes: bool, found: bool) -> str | None:
    """Return why one pass cannot transform blocks of `size` and quantize, or None; `found`: the ranges are not given."""
    if not x.is_cuda or forced():
        return "the tensor is not on a CUDA device, or the law is forced"
    if torch.cuda.get_device_capability(x.device) < (8, 9):
        return "the device does not convert FP8"
    answer = plan(x.shape, x.dtype, size, fmt.text, codes, found)
    if isinstance(answer, str):
        return answer
    if answer[0].shared > cuda.shared_memory(x.device):
        return "rows do not fit into the shared memory of the device"
    return cuda.why_not(x.device)


def rotated(
    x: Tensor, size: int, fmt: Format, amax: Tensor | None, global_amax: Tensor | None, amin: Tensor | None, codes: bool
) -> list[Tensor] | None:
    """Return [values], or with `codes` [codes, *scales], of `x` with blocks of `size` transformed; None where two passes must."""
    law.check(x, fmt)
    amax, global_amax, _ = law.given_range(x.shape, fmt, amax, global_amax, amin)
    if (fmt.is_two_level and amax is None and global_amax is None) or why_not(x, size, fmt, codes, amax is None) is not None:
        return None
    how = plan(x.shape, x.dtype, size, fmt.text, codes, amax is None)
    if isinstance(how, str):
        return None
    if fmt.is_two_level and global_amax is None and amax is not None:
        global_amax = amax.amax()
    x = x.detach().contiguous()
    x = x.clone() if x.data_ptr() % 16 else x
    out, scales = _outputs(x, fmt, codes)
    kernel, most = loaded(how[0], x.device)
    blocks = min(-(-x.numel() // how[0].tile), most)
    pieces = x.numel() // TYPES[x.dtype][1]
    given = None if amax is None else amax.to(x.device).contiguous()
    global_amax = None if global_amax is None else global_amax.to(x.device)
    stored = (scales[0] if scales else None, scales[1] if len(scales) > 1 else None)
    launch(kernel, how[0], blocks, x, out, *stored, given, global_amax, how[1], pieces & 0x7FFFFFFF, pieces >> 31)
    return [out, *scales]


@functools.lru_cache(maxsize=4096)
def plan(shape: torch.Size, dtype: torch.dtype, size: int, text: str, codes: bool, found: bool) -> tuple[Plan, int] | str:
    """Return the kernel and how many pieces of 32 values share a scale, or why there is none."""
    fmt, count = parse(text), math.prod(shape)
    constants = format_constants(fmt, codes)
    if constants is None:
        return f"{fmt} is left to other kernels"
    if dtype not in TYPES or count == 0 or count % _OWN or not 2 <= size <= LARGEST_BLOCK or size & (size - 1):
        return f"blocks of {size} in a tensor of {tuple(shape)}, {dtype}"
    dims, sizes = canonical(tuple(shape), fmt.block.sizes(shape))
    group = sizes[-1]
    if any(b != 1 for b in sizes[:-1]) or dims[-1] % group or (group != 16 and group % _OWN) or group // _OWN >= 2**31:
        return f"scales of blocks of {sizes} in {dims}"
    kind, each = TYPES[dtype]
    across = _across(size, group, each, codes, fmt.element.bits)
    per_warp = 2 * 32 * _OWN // each * 16
    per_warp += max(_ROOM[across] * 16 - per_warp // 2, 0)
    row = found and (group > 1024 or group & (group - 1) != 0)
    warps = -(-group // 1024) if row else _WARPS
    if row and (group % size or warps > 32 or warps * per_warp + 256 > SHARED):
        return f"the range of rows of {group}"
    most = 1 << (warps - 1).bit_length()  # one compilation for rows of one power-of-two class
    resident = min((32 if codes or row else 24) // most, (SHARED - 1024) // (most * per_warp + 1024))
    kept = group if group <= _OWN or (found and not row) else 0
    constants |= {kind: 1, "SIZE": size, "SCALE": f"{float.hex(scale(size))}f", "CODES": int(codes), "FIND": int(found)}
    constants |= {"GROUP": kept, "ROW": int(row), "WARPS": most, "RESIDENT": max(resident, 1)}
    constants |= {"ACROSS": across, "ROOM": _ROOM[across]} | (
        of_borders(fmt.element) if each == 8 and codes and "FLOAT" in constants else {}
    )
    named = tuple((name, str(value)) for name, value in constants.items())
    tile = group if row else 1024 * warps
    files = (*_FILES[:3], "../subbyte/borders.cu", *_FILES[3:]) if "COUNT" in constants else _FILES
    return Plan("rounded", files, named, 32 * warps, warps * per_warp + 256 * row, tile, max(resident, 1)), max(group // _OWN, 1)


def _across(size: int, group: int, each: int, codes: bool, bits: int) -> int:
    """Return how many bits of the index lanes bring into a thread through shared memory; 0: they exchange values one by one.

    It takes fewer instructions, but a thread then has neighbours of the whole block, which must share a scale.
    """
    across = max(size.bit_length() - 1 - 5, 0)
    return across if across > 1 and each == 8 and group % size == 0 and not (codes and bits == 4 and across == 3) else 0


def format_constants(fmt: Format, codes: bool) -> dict[str, Any] | None:
    """Return the constants of rounding.cu for a format, or None if it does not know it."""
    e, inner = fmt.element, fmt.scale
    if fmt.zero is not None or fmt.rule == "46" or e.kind not in ("int", "float") or e.min >= 0 or e.name == "e5m2":
        return None
    kind = "INT" if e.kind == "int" else "E4M3" if e.name == "e4m3" else "FLOAT"
    if codes and (e.bits not in (4, 8) or (kind == "FLOAT" and (e.bits != 4 or e.mantissa_bits != 1))):
        return None
    out: dict[str, Any] = {kind: 1, "BITS": e.bits, "MBITS": e.mantissa_bits, "MIN_EXP": 1 - e.bias + 127, "EMAX": e.emax}
    out |= {"E_MAX": f"{float(e.max)}f", "E_MIN": f"{float(e.min)}f", "RULE": _RULES.get(fmt.rule, 0), "TOP": "1.0f"}
    if isinstance(inner, Format):
        if not fmt.needs_global or inner.element.name != "e4m3" or str(inner.scale) != "f32":
            return None
        top = inner.element.max if fmt.rule == "fp8" else e.max * inner.element.max
        return out | {"SCALE_TWO": 1, "TOP": f"{float(top)}f"}
    return out | {f"SCALE_{inner.name.upper()}": 1} if inner.name in ("f32", "e8m0") else None


def _outputs(x: Tensor, fmt: Format, codes: bool) -> tuple[Tensor, list[Tensor]]:
    """Return (values or codes, scales level by level), which the kernel fills."""
    if not codes:
        return torch.empty_like(x), []
    grid = fmt.grid(x.shape)
    scales = [torch.empty(grid, dtype=fmt.stored_scale.dtype, device=x.device)]
    if isinstance(fmt.scale, Format):
        scales.append(torch.empty(fmt.scale.grid(grid), dtype=torch.float32, device=x.device))
    shape = tuple(x.shape) or (1,)
    return torch.empty((*shape[:-1], shape[-1] * fmt.element.bits // 8), dtype=torch.uint8, device=x.device), scales
