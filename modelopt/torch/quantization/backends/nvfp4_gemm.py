"""NVFP4 weights times FP8 activations:  y = x W^T,  W[n, k] = code[n, k] * block_scale[n, k // 16] * tensor_scale.

A code (2 significant bits) times a block scale (4) is exact in bf16, and so is every E4M3 activation: on a GPU both are
multiplied as bf16 by the tensor cores and the tensor scale comes last, so that only the order of the float32 sums differs from
the dequantized product in float32. Elsewhere the weight is dequantized to float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modelopt.core.errors import ConfigError, ShapeError
from modelopt.torch import kernels

FORMAT = "e2m1[16]~*e4m3[...]*f32"
_LARGEST = 6.0 * 448.0
_LARGE = 1 << 20
_EXACT_IN_BF16 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16)


class NVFP4Kernel:
    """Quantize a weight to NVFP4, and multiply by it.

    >>> codes, scales = NVFP4Kernel.apply_quantization(torch.ones(2, 32))
    >>> NVFP4Kernel.gemm(torch.ones(1, 32), codes, scales)
    tensor([[32., 32.]])
    """

    @staticmethod
    def apply_quantization(
        weights: Tensor, scales: Tensor | None = None, offsets: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return packed codes (uint8 [N, K / 2]) and (block scales E4M3 [N, K / 16], tensor scale float32).

        `weights` [N, K]; `scales` is the tensor scale, amax / 2688, taken from the weights where it is None. The format has no
        `offsets`: anything but None raises ConfigError.
        """
        if offsets is not None:
            raise ConfigError("NVFP4 is symmetric: it has no offsets. Pass None.")
        if weights.dim() != 2 or weights.shape[1] % 16:
            raise ShapeError(f"NVFP4 weights are [N, K] with K a multiple of 16, got {list(weights.shape)}.")
        top = None if scales is None else scales.float() * _LARGEST
        codes, block_scales, tensor_scale = kernels.quantize(weights, FORMAT, None, top)
        return codes, (block_scales, tensor_scale)

    @staticmethod
    def gemm(
        input_fp8: Tensor, weights_nvfp4: Tensor, scales: tuple[Tensor, Tensor], out_dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Return `input_fp8` [..., K] (FP8 or any float dtype) times the weight [N, K]: [..., N] in `out_dtype`.

        `scales` are the block scales and the tensor scale of `apply_quantization`. The product is accumulated in float32;
        `out_dtype` bfloat16 takes `modelopt::quantized_linear`, faster, with the weight rounded to bf16 where it is not read as
        codes. A scale of the input is the caller's to multiply. Raises ShapeError where the sizes do not match.
        """
        n, k = weights_nvfp4.shape[0], weights_nvfp4.shape[1] * 2
        if input_fp8.shape[-1] != k:
            raise ShapeError(f"The input has {input_fp8.shape[-1]} features, the weight {k}.")
        parts = [weights_nvfp4, *scales]
        if input_fp8.is_cuda and input_fp8.dtype in _EXACT_IN_BF16:
            return _by_tensor_cores(_as_bf16(input_fp8), parts, n, out_dtype)
        weight = kernels.dequantize(parts, FORMAT, (n, k), torch.float32)
        return (input_fp8.float() @ weight.t()).to(out_dtype)


def _as_bf16(x: Tensor) -> Tensor:
    """Return FP8 or bf16 `x` in bf16, exactly; E4M3 by the dequantization kernel, which is four times as fast as torch's cast."""
    if x.dtype != torch.float8_e4m3fn or x.numel() < _LARGE:
        return x.to(torch.bfloat16)
    one = torch.ones((), device=x.device)
    return kernels.dequantize([x.contiguous().view(torch.uint8), one], "e4m3[...]*f32", x.shape, torch.bfloat16)


def _by_tensor_cores(x: Tensor, parts: list[Tensor], n: int, dtype: torch.dtype) -> Tensor:
    """Multiply bf16 `x` [..., K] by the codes with their block scales, exactly in bf16; the tensor scale multiplies the sums."""
    if dtype == torch.bfloat16:
        return kernels.quantized_linear(x, parts, FORMAT, n)
    k = x.shape[-1]
    unscaled = [*parts[:2], torch.ones_like(parts[2])]
    weight = kernels.dequantize(unscaled, FORMAT, (n, k), torch.bfloat16)
    sums = torch.mm(x.reshape(-1, k), weight.t(), out_dtype=torch.float32)
    return sums.mul_(parts[2]).to(dtype).reshape(*x.shape[:-1], n)
