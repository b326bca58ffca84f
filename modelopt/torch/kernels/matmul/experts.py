"""quantized_grouped_linear on a GPU: which kernel multiplies, with what constants.

few          up to tables.EXPERT_ROWS rows in all: `skinny.cu`, every weight of an expert that has rows is read once
codes        FP8 x FP8 and INT8 x INT8 with a scale per row or one: `triton_codes.py` (8.9: `triton_grouped.py`)
tiles        weights decoded a tile at a time; inputs are quantized and dequantized first
dequantize   the same with many rows for each expert: all matrices are decoded once, then torch._grouped_mm
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modelopt.numerics import Format
from modelopt.torch.kernels.fake_quantize import fake_quantize
from modelopt.torch.kernels.matmul import skinny, tables
from modelopt.torch.kernels.matmul.plan import Plan, kind_of, pair, plan
from modelopt.torch.kernels.quantize import quantize


def why_not(x: Tensor, weight: list[Tensor], fmt: Format, n: int) -> str | None:
    """Return why these kernels do not serve the product, or None."""
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the input is {x.dtype}"
    if x.numel() == 0 or n == 0:
        return "the input is empty"
    if any(not p.is_contiguous() or p.device != x.device for p in weight):
        return "the packed weights are not contiguous on the input's device"
    k = x.shape[-1]
    if kind_of(fmt) is None:
        return f"there is no kernel for codes of {fmt.element} with this zero point"
    _, group = fmt.block.sizes((n, k))
    if k % 2 or (group < k and (group & (group - 1) or k % group)):
        return f"blocks of {group} columns in rows of {k}: a power of two that divides them is served"
    if isinstance(fmt.scale, Format) and not (fmt.scale.element.name == "e4m3" and fmt.scale.block.whole):
        return f"{fmt}: scales with scales are served as e4m3 with one for the matrix"
    return None


def route(x: Tensor, weight: list[Tensor], fmt: Format, n: int, input_format: str = "") -> str:
    """Return the name of the path: few, codes, tiles or dequantize."""
    (rows, k), experts = x.shape, weight[0].shape[0]
    if _few(x, weight, fmt, n) is not None:
        return "few"
    major, minor = torch.cuda.get_device_capability(x.device)
    codes = pair(input_format, fmt, n, k) if input_format else ""
    if codes and k % 16 == 0 and weight[0].data_ptr() % 16 == 0 and (major, minor) >= ((8, 9) if codes == "fp8" else (8, 0)):
        return "codes"
    aligned = x.dtype == torch.bfloat16 and n % 16 == 0 and k % 16 == 0 and weight[0].data_ptr() % 16 == 0
    many = aligned and rows >= tables.DECODED_ROWS * experts and experts * n * k * 2 <= tables.DECODED_BYTES
    return "dequantize" if many and major >= 9 and min(fmt.block.sizes((n, k))[1], k) % 8 == 0 else "tiles"


def _few(x: Tensor, weight: list[Tensor], fmt: Format, n: int) -> tuple[Plan, tables.Skinny] | None:
    (rows, k), experts, read = x.shape, weight[0].shape[0], plan(fmt, n, x.shape[-1])
    if rows > tables.EXPERT_ROWS or isinstance(read, str) or skinny.why_not(x) is not None:
        return None
    copied = weight[: 1 + (read.scale != "none")] + weight[2:] * (read.kind == "u4")  # 16 bytes at a time
    if any(p.data_ptr() % 16 for p in copied):
        return None
    if x.dtype == torch.float16 and read.scale == "e8m0":
        return None
    config = skinny.choose(read, rows, n, k, skinny.processors(x.device), skinny.memory(x.device), min(experts, rows))
    return None if config is None else (read, config)


def product(
    x: Tensor,
    offsets: Tensor,
    weight: list[Tensor],
    fmt: Format,
    n: int,
    bias: Tensor | None,
    input_format: str,
    input_amax: Tensor | None,
) -> Tensor:
    """Return q(x) times the matrices of the rows' experts, [T, n] in the dtype of `x`."""
    how, x = route(x, weight, fmt, n, input_format), x.contiguous()
    x = x.clone() if x.data_ptr() % 16 else x
    offsets = offsets.to(x.device).contiguous()
    bias = None if bias is None else bias.to(x.device).contiguous()
    if how == "codes":
        codes, sx = quantize(x, input_format, input_amax)
        codes = codes.view(torch.int8 if fmt.element.name.startswith("i8") else torch.float8_e4m3fn)
        if torch.cuda.get_device_capability(x.device) >= (9, 0):
            return _codes(codes, sx, offsets, weight, n, bias, x.dtype)
        return _tiles(codes, sx.reshape(-1).expand(x.shape[0]).contiguous(), offsets, weight, fmt, n, bias, x.dtype)
    given = fake_quantize(x, input_format, input_amax) if input_format else x
    if how == "dequantize":
        return _dequantized(given, offsets, weight, fmt, n, bias)
    few = _few(x, weight, fmt, n)
    if few is None:
        return _tiles(given, None, offsets, weight, fmt, n, bias, x.dtype)
    read, config = few
    scales, post = skinny.scales_of(weight, read)
    zeros = weight[-1] if read.kind == "u4" else None
    bias = None if bias is None else bias.to(x.dtype)
    return skinny.product(given, weight[0], scales, zeros, post, bias, n, read, config, offsets=offsets)


def _codes(
    codes: Tensor, sx: Tensor, offsets: Tensor, weight: list[Tensor], n: int, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    from modelopt.torch.kernels.matmul.triton_codes import codes_product

    (t, k), experts = codes.shape, weight[0].shape[0]
    w = weight[0].view(codes.dtype).reshape(experts, n, k)
    return codes_product(codes, w, sx, weight[1], bias, tables.expert_codes(t, experts), offsets, dtype)


def _dequantized(x: Tensor, offsets: Tensor, weight: list[Tensor], fmt: Format, n: int, bias: Tensor | None) -> Tensor:
    from modelopt.torch.kernels.matmul.triton_decode import decoded, finish

    matrices = decoded(offsets, weight, fmt, n, x.shape[1], x.dtype)
    return finish(torch._grouped_mm(x, matrices.transpose(1, 2), offs=offsets[1:].contiguous()), offsets, bias)


def _tiles(
    x: Tensor,
    sx: Tensor | None,
    offsets: Tensor,
    weight: list[Tensor],
    fmt: Format,
    n: int,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    from modelopt.torch.kernels.matmul.triton_grouped import grouped

    (t, k), experts = x.shape, offsets.shape[0] - 1
    rows, group = fmt.block.sizes((n, k))
    two = isinstance(fmt.scale, Format)
    scale = "e4m3" if two else "e8m0" if fmt.scale.name == "e8m0" else "float"  # type: ignore[union-attr]
    scales = weight[1].view(torch.uint8) if scale != "float" else weight[1]
    c = tables.grouped(t, experts, x.element_size(), sx is not None)
    y = torch.zeros((t, n), dtype=dtype, device=x.device)
    grid = (math.ceil(n / c.BN), math.ceil(t / c.BM) + experts)
    grouped[grid](
        x,
        x if sx is None else sx,
        offsets,
        weight[0],
        scales,
        weight[-1] if fmt.zero is not None else weight[0],
        weight[-1] if two else scales,
        x if bias is None else bias,
        y,
        experts,
        n,
        k,
        max(math.ceil(k / group), 1),
        scales.numel() // experts,
        EXPERTS=max(2 ** math.ceil(math.log2(experts)), 2),
        KIND=kind_of(fmt),
        SCALE=scale,
        ROWS=min(rows, n),
        G=1 << 30 if group >= k else group,
        CODES=sx is not None,
        SX=sx is not None,
        BIAS=bias is not None,
        BM=c.BM,
        BN=c.BN,
        BK=c.BK,
        num_warps=c.warps,
        num_stages=c.stages,
    )
    return y
