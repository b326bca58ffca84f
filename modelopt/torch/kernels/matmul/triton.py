"""quantized_linear on a GPU: which of the kernels multiplies, with what constants.

    few          `one.cu` and `skinny.cu`: a handful of rows, every weight read once   compute capability 8 and above
    tens         `tens.cu` (to 16 rows) and `broad.cu`: unpacked in registers, wgmma   compute capability 9
    eights       `eights.cu`: codes times codes, wgmma, up to 128 rows              9
    fp8, int8    codes times codes: torch._scaled_mm, `triton_codes`               8.9 and 9
    dequantize   the weight is dequantized once, then torch's product              everything else, every dtype

How many rows are a handful is in `tables.py`. The first three round inputs to FP8 and INT8 themselves; for the first two other
input formats are quantized and dequantized first, so that every one is served.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from modelopt.numerics import Format, parse
from modelopt.torch.kernels.dequantize import dequantize
from modelopt.torch.kernels.fake_quantize import fake_quantize
from modelopt.torch.kernels.matmul import broad, eights, one, skinny, tables, tens
from modelopt.torch.kernels.matmul.plan import Plan, pair, plan
from modelopt.torch.kernels.quantize import quantize


def why_not(x: Tensor, weight: list[Tensor], fmt: Format, n: int) -> str | None:
    """Return why no kernel reads the packed weight itself, so that it has to be dequantized, or None."""
    if x.dim() == 0 or x.numel() == 0 or n == 0:
        return "the input is empty"
    found = plan(fmt, n, x.shape[-1])
    if isinstance(found, str):
        return found
    copied = weight[: 1 + (found.scale != "none")] + weight[2:] * (found.kind == "u4")  # 16 bytes at a time
    if any(not p.is_contiguous() or p.device != x.device for p in weight) or any(p.data_ptr() % 16 for p in copied):
        return "the packed weight is not contiguous on the input's device, or not aligned"
    if x.dtype == torch.float16 and found.scale == "e8m0":
        return "float16 cannot hold e8m0 scales"
    return skinny.why_not(x)


def route(x: Tensor, fmt: Format, n: int, input_format: str = "") -> str:
    """Return the path that serves a product for which `why_not` has no reason: few, tens, eights, fp8, int8 or dequantize."""
    m, k = x.numel() // x.shape[-1], x.shape[-1]
    read = plan(fmt, n, k)
    assert isinstance(read, Plan)
    if input_format and eights.why_not(x, read, _rounding(input_format, x), n) is None:
        return "eights"
    codes = pair(input_format, fmt, n, k) if input_format and n % 16 == 0 and k % 16 == 0 else ""
    if codes and m > tables.CODES_ROWS[k >= tables.LONG_K] and _multiplies(codes, x):
        return codes
    if _few(read, m, n, k, x.device) is not None:
        return "few"
    if m <= tables.TENS_ROWS and broad.why_not(x) is None and _tens(read, m, n, k, x.device) is not None:
        return "tens"
    return codes if codes and _multiplies(codes, x) else "dequantize"


def _multiplies(codes: str, x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= ((8, 9) if codes == "fp8" else (9, 0))


def _few(read: Plan, m: int, n: int, k: int, device: torch.device) -> tables.Skinny | tables.One | None:
    capability = torch.cuda.get_device_capability(device)
    if m == 1 and one.serves(read, capability):
        alone = one.choose(read, n, k, skinny.processors(device), skinny.memory(device))
        if alone is not None:
            return alone
    hopper = capability[0] == 9
    if m > (tables.FEW_ROWS[8] if not hopper else _few_on_hopper(read, m, n, k, device)):
        return None
    found = skinny.choose(read, m, n, k, skinny.processors(device), skinny.memory(device))
    return None if found is not None and found.splits > 1 and m > tables.FEW_ALONE and hopper else found


def _few_on_hopper(read: Plan, m: int, n: int, k: int, device: torch.device) -> int:
    """Return the rows of x up to which "few" is faster: fewer the larger W is, and the finer its scales."""
    fine = read.kind == "u4" or (read.scale != "none" and read.group < 4 * read.each)
    most = next((rows[fine] for size, *rows in tables.FEW_SIZES if n * k >= size), tables.FEW_ROWS[9])
    return most if _tens(read, m, n, k, device) is not None else tables.FEW_ROWS[9]


def _tens(read: Plan, m: int, n: int, k: int, device: torch.device) -> tables.Broad | None:
    if read.ragged:  # its boxes are whole steps
        return None
    return broad.choose(read, m, n, k, skinny.processors(device), skinny.memory(device))


@functools.lru_cache(maxsize=1024)
def _quantizer(input_format: str, k: int, fp8: bool) -> tuple[int, int] | None:
    """Return how the kernels round x themselves (constants XKIND and XRANGE), or None where they do not."""
    given = parse(input_format)
    kind = {"e4m3": 1, "i8": 2}.get(given.element.name, 0)
    rows, group = given.block.sizes((4, k))
    if not kind or (kind == 1 and not fp8) or given.zero is not None or isinstance(given.scale, Format) or group < k:
        return None
    if given.scale.name != "f32" or (rows, given.dynamic) not in ((4, False), (1, True)):
        return None
    return kind, int(given.dynamic)


def _rounding(input_format: str, x: Tensor) -> tuple[int, int] | None:
    return _quantizer(input_format, x.shape[-1], torch.cuda.get_device_capability(x.device) >= (8, 9))


def quantized_linear(
    x: Tensor, weight: list[Tensor], fmt: Format, n: int, bias: Tensor | None, input_format: str, input_amax: Tensor | None
) -> Tensor:
    """Return q(x) W^T + bias, [..., n] in the dtype of `x`, for a product for which `why_not` has no reason."""
    how, k = route(x, fmt, n, input_format), x.shape[-1]
    flat = x.reshape(-1, k)
    if bias is not None:
        bias = bias.contiguous()
        if bias.dtype != x.dtype or bias.device != x.device or bias.numel() != n:
            how = "dequantize"  # torch adds it, or says what is wrong
    if how in ("fp8", "int8"):
        y = _codes(flat, weight, n, bias, input_format, input_amax, how)
    elif how == "dequantize":
        y = dequantized_linear(flat, weight, fmt, n, bias, input_format, input_amax)
    else:
        flat = flat.contiguous()
        flat = flat.clone() if flat.data_ptr() % 16 else flat
        y = _packed(flat, weight, fmt, n, bias, how, input_format, input_amax)
    return y.reshape(*x.shape[:-1], n)


def dequantized_linear(
    x: Tensor, weight: list[Tensor], fmt: Format, n: int, bias: Tensor | None, input_format: str, input_amax: Tensor | None
) -> Tensor:
    """Dequantize the weight once, quantize and dequantize the input, multiply."""
    values = dequantize(weight, fmt, torch.Size((n, x.shape[-1])), x.dtype)
    return F.linear(fake_quantize(x, input_format, input_amax) if input_format else x, values, bias)


def _packed(
    x: Tensor, weight: list[Tensor], fmt: Format, n: int, bias: Tensor | None, how: str, input_format: str, amax: Tensor | None
) -> Tensor:
    (m, k), read = x.shape, plan(fmt, n, x.shape[1])
    assert isinstance(read, Plan)
    quantizer = _rounding(input_format, x) if input_format else (0, 0)
    if quantizer is None:
        x, quantizer, amax = fake_quantize(x, input_format, amax), (0, 0), None
    if quantizer[0] and not quantizer[1] and amax is None:
        amax = x.abs().amax()
    scales, post = skinny.scales_of(weight, read)
    zeros = weight[-1] if read.kind == "u4" else None
    amax = None if amax is None else amax.to(x.device, torch.float32)
    if how == "eights":
        eight = eights.choose(m, n, k, skinny.processors(x.device), skinny.memory(x.device))
        assert eight is not None
        return eights.product(x, weight[0], post, bias, n, read, eight, quantizer, amax)
    if how == "few":
        few = _few(read, m, n, k, x.device)
        assert few is not None
        if isinstance(few, tables.One):
            return one.product(x, weight[0], scales, zeros, post, bias, n, read, few, quantizer, amax)
        return skinny.product(x, weight[0], scales, zeros, post, bias, n, read, few, quantizer, amax)
    alone = tens.choose(read, m, n, k, skinny.processors(x.device), skinny.memory(x.device)) if quantizer == (0, 0) else None
    if alone is not None:
        return tens.product(x, weight[0], scales, zeros, post, bias, n, read, alone)
    wide = _tens(read, m, n, k, x.device)
    assert wide is not None
    return broad.product(x, weight[0], scales, zeros, post, bias, n, read, wide, quantizer, amax)


def _codes(
    x: Tensor, weight: list[Tensor], n: int, bias: Tensor | None, input_format: str, amax: Tensor | None, how: str
) -> Tensor:
    """Multiply codes with codes; the scales come afterwards."""
    codes, x_scale = quantize(x, input_format, amax)
    w_codes, w_scale = weight[0].reshape(n, -1), weight[1]
    (m, k), hopper = x.shape, torch.cuda.get_device_capability(x.device) >= (9, 0)
    one = x_scale.numel() == 1 and w_scale.numel() == 1
    if how == "int8" or (hopper and not one and tables.fp8_rows(m, n)):
        from modelopt.torch.kernels.matmul.triton_codes import codes_product

        dtype = torch.int8 if how == "int8" else torch.float8_e4m3fn
        return codes_product(codes.view(dtype), w_codes.view(dtype), x_scale, w_scale, bias, tables.codes(m, n, k))
    a, b = codes.view(torch.float8_e4m3fn), w_codes.view(torch.float8_e4m3fn).t()
    if one:
        return torch._scaled_mm(
            a, b, x_scale.reshape(()), w_scale.reshape(()), bias, out_dtype=torch.bfloat16, use_fast_accum=tables.FAST_FP8
        )
    rows = x_scale.reshape(-1, 1).expand(x.shape[0], 1).contiguous()
    columns = w_scale.reshape(1, -1).expand(1, n).contiguous()
    return torch._scaled_mm(a, b, rows, columns, bias, out_dtype=torch.bfloat16, use_fast_accum=tables.FAST_FP8)
