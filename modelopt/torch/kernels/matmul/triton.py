"""quantized_linear on a GPU: which of the kernels multiplies, with what constants.

    M <= NARROW_ROWS `triton_narrow`   weights unpacked straight into tensor-core registers, K split over programs
    M <= WIDE_ROWS   `triton_wide`     the same weights, x in shared memory, wgmma
    above            the weight is dequantized once, then torch's bf16 product
    FP8 x FP8        torch._scaled_mm on the codes         INT8 x INT8   `triton_int8`; both from CODES_ROWS rows up

Below CODES_ROWS quantized inputs are quantized and dequantized first, so that every input format is served.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from modelopt.numerics import Format, parse
from modelopt.torch.kernels.dequantize import dequantize
from modelopt.torch.kernels.fake_quantize import fake_quantize
from modelopt.torch.kernels.matmul import tables
from modelopt.torch.kernels.quantize import quantize

_KINDS = {"i4": "i4", "i4n": "i4", "u4": "u4", "e2m1": "e2m1", "i8": "i8", "i8n": "i8", "e4m3": "e4m3"}
_LOCKS = 65536
_EIGHT = ("i8", "e4m3")


@dataclass(frozen=True)
class Plan:
    """How the kernels read one weight format: see the constants of `triton_narrow.narrow`."""

    kind: str
    scale: str
    group: int
    scale_rows: int
    each: int
    post: str
    factor: float


@functools.lru_cache(maxsize=1024)
def plan(fmt: Format, n: int, k: int) -> Plan | str:
    """Return how the kernels read a weight [n, k] in `fmt`, or why they cannot."""
    kind = _KINDS.get(fmt.element.name)
    if kind is None:
        return f"there is no kernel for codes of {fmt.element}"
    if (fmt.zero is None) == (kind == "u4"):
        return f"zero points go with u4 here, not with {fmt.element}"
    each = 16 if kind in _EIGHT else 32
    if k % (4 * each):
        return f"K = {k} is no multiple of {4 * each}"
    rows, group = fmt.block.sizes((n, k))
    rows, group = min(rows, n), min(group, k)
    if isinstance(fmt.scale, Format):
        if not (kind == "e2m1" and fmt.scale.element.name == "e4m3" and fmt.scale.block.whole):
            return f"{fmt}: scales with scales are served for e2m1 with e4m3 scales and one for the tensor"
        scale, post, factor = "e4m3", "one", 128.0
    elif group == k and kind != "u4" and fmt.scale.name != "e8m0" and rows in (1, n):
        return Plan(kind, "none", 4 * each, 1, each, "rows" if rows == 1 else "one", 1.0)
    else:
        scale, post, factor = "e8m0" if fmt.scale.name == "e8m0" else "f32", "none", 1.0
        if fmt.scale.name == "e4m3":
            return f"{fmt}: e4m3 scales need a scale of their own"
    fits = 2 * group == each or (group % each == 0 and (group % (4 * each) == 0 or (4 * each) % group == 0))
    if k % group or not fits:
        return f"blocks of {group} columns do not divide a step of {4 * each}"
    return Plan(kind, scale, group, rows, each, post, factor)


@functools.cache
def _unfit(device: torch.device) -> str | None:
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "the kernels are written for compute capability 9 (Hopper)"
    if importlib.util.find_spec("triton.experimental") is None or importlib.util.find_spec("triton.experimental.gluon") is None:
        return "this Triton has no Gluon"
    return None


def why_not(x: Tensor, weight: list[Tensor], fmt: Format, n: int) -> str | None:
    """Return why these kernels do not serve the product, or None."""
    if x.dtype != torch.bfloat16:
        return f"the input is {x.dtype}; the kernels take bfloat16"
    if x.dim() == 0 or x.numel() == 0 or n == 0:
        return "the input is empty"
    found = plan(fmt, n, x.shape[-1])
    if isinstance(found, str):
        return found
    if any(not p.is_contiguous() or p.device != x.device for p in weight) or weight[0].data_ptr() % 16:
        return "the packed weight is not contiguous on the input's device, or not aligned"
    return _unfit(x.device)


def route(x: Tensor, fmt: Format, n: int, input_format: str = "") -> str:
    """Return the name of the path that `quantized_linear` takes: narrow, wide, dequantize, fp8 or int8."""
    m, k = x.numel() // x.shape[-1], x.shape[-1]
    if m >= tables.CODES_ROWS and n % 16 == 0 and input_format:
        pair = _pair(input_format, fmt, n, k)
        if pair and k % 16 == 0:
            return pair
    if m <= tables.NARROW_ROWS:
        return "narrow"
    return "wide" if m <= tables.WIDE_ROWS else "dequantize"


@functools.lru_cache(maxsize=1024)
def _pair(input_format: str, fmt: Format, n: int, k: int) -> str:
    """Return "fp8" or "int8" where codes can be multiplied and scaled afterwards: a scale per row, or one, on either side."""
    given = parse(input_format)
    names = {given.element.name, fmt.element.name}
    if given.zero is not None or isinstance(given.scale, Format) or given.scale.name != "f32":
        return ""
    if fmt.zero is not None or isinstance(fmt.scale, Format) or fmt.scale.name != "f32":
        return ""
    rows, group = fmt.block.sizes((n, k))
    x_rows, x_group = given.block.sizes((4, k))
    if group < k or x_group < k or rows not in (1, n) or x_rows not in (1, 4):
        return ""
    return "fp8" if names == {"e4m3"} else "int8" if names <= {"i8", "i8n"} else ""


def quantized_linear(
    x: Tensor, weight: list[Tensor], fmt: Format, n: int, bias: Tensor | None, input_format: str, input_amax: Tensor | None
) -> Tensor:
    """Return q(x) W^T + bias, [..., n] bfloat16."""
    how = route(x, fmt, n, input_format)
    k = x.shape[-1]
    flat = x.reshape(-1, k)
    if how in ("fp8", "int8"):
        y = _codes(flat, weight, n, bias, input_format, input_amax, how)
    else:
        if input_format:
            flat = fake_quantize(flat, input_format, input_amax)
        if how == "dequantize":
            y = F.linear(flat, dequantize(weight, fmt, (n, k), torch.bfloat16), bias)
        else:
            y = packed_product(flat.contiguous(), weight, fmt, n, bias, how)
    return y.reshape(*x.shape[:-1], n)


def _codes(
    x: Tensor, weight: list[Tensor], n: int, bias: Tensor | None, input_format: str, amax: Tensor | None, how: str
) -> Tensor:
    """Multiply codes with codes; the scales come afterwards."""
    codes, x_scale = quantize(x, input_format, amax)
    w_codes, w_scale = weight[0].reshape(n, -1), weight[1]
    if how == "int8":
        from modelopt.torch.kernels.matmul.triton_int8 import int8_product

        return int8_product(codes.view(torch.int8), w_codes.view(torch.int8), x_scale, w_scale, bias)
    a, b = codes.view(torch.float8_e4m3fn), w_codes.view(torch.float8_e4m3fn).t()
    if x_scale.numel() == 1 and w_scale.numel() == 1:
        return torch._scaled_mm(
            a, b, x_scale.reshape(()), w_scale.reshape(()), bias, out_dtype=torch.bfloat16, use_fast_accum=tables.FAST_FP8
        )
    rows = x_scale.reshape(-1, 1).expand(x.shape[0], 1).contiguous()
    columns = w_scale.reshape(1, -1).expand(1, n).contiguous()
    return torch._scaled_mm(a, b, rows, columns, bias, out_dtype=torch.bfloat16, use_fast_accum=tables.FAST_FP8)


def _locks(device: torch.device, count: int) -> Tensor:
    """Return `count` zeros; kernels leave them zero. A graph that is being captured gets its own, zeroed at each replay."""
    if count > _LOCKS or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    return _stream_locks(device, torch.cuda.current_stream(device).cuda_stream)


@functools.cache
def _stream_locks(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(_LOCKS, dtype=torch.int32, device=device)


def packed_product(
    x: Tensor,
    weight: list[Tensor],
    fmt: Format,
    n: int,
    bias: Tensor | None,
    how: str,
    config: tables.Config | None = None,
) -> Tensor:
    """Return x [M, K] times the packed weight by the kernel `how` ("narrow" or "wide"); `config` overrides the table."""
    from modelopt.torch.kernels.matmul.triton_narrow import narrow
    from modelopt.torch.kernels.matmul.triton_wide import wide

    (m, k), read = x.shape, plan(fmt, n, x.shape[1])
    assert isinstance(read, Plan)
    steps = k // (4 * read.each)
    sums = read.scale == "f32" and read.group % (4 * read.each) == 0
    chosen = config or tables.choose(how, m, n, steps, read.each, sums, _processors(x.device))
    codes, scales = weight[0].view(torch.int32), weight[1]
    raw = scales.view(torch.uint8) if scales.dtype in (torch.float8_e4m3fn, torch.uint8) else scales
    y = torch.empty((m, n), dtype=torch.bfloat16, device=x.device)
    tiles = math.ceil(n / chosen.BN)
    blocks = math.ceil(m / chosen.BM) if how == "wide" else 1
    split = chosen.SPLITS > 1
    parts = torch.empty(tiles * blocks * chosen.SPLITS * chosen.BN * chosen.BM if split else 1, device=x.device)
    locks = _locks(x.device, tiles * blocks) if split else parts
    options = {"PARTS": chosen.PARTS} if how == "narrow" else {}
    if chosen.registers:
        options["maxnreg"] = chosen.registers
    (narrow if how == "narrow" else wide)[(tiles, chosen.SPLITS, blocks)](
        x,
        codes,
        raw,
        weight[-1].view(torch.uint8) if read.kind == "u4" else raw,
        weight[-1] if read.scale == "e4m3" else scales,
        x if bias is None else bias,
        y,
        parts,
        locks,
        m,
        n,
        k,
        codes.shape[-1],
        1 if scales.dim() < 2 else scales.shape[-1],
        steps,
        KIND=read.kind,
        SCALE=read.scale,
        G=read.group,
        S_ROWS=read.scale_rows,
        EACH=read.each,
        POST=read.post,
        FACTOR=read.factor,
        BIAS=bias is not None,
        BM=chosen.BM,
        BN=chosen.BN,
        SPLITS=chosen.SPLITS,
        WARPS=chosen.warps,
        num_warps=chosen.warps,
        **options,
    )
    return y


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
