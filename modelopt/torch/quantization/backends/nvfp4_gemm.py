"""NVFP4 weights times activations:  y = x W^T,  W[n, k] = code[n, k] * block_scale[n, k // 16] * tensor_scale.

Plain torch: the weight is dequantized exactly, the product is accumulated in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modelopt.core.errors import ConfigError, ShapeError
from modelopt.torch import kernels

FORMAT = "e2m1[16]~*e4m3[...]*f32"
_LARGEST = 6.0 * 448.0


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
    def gemm(input_fp8: Tensor, weights_nvfp4: Tensor, scales: tuple[Tensor, Tensor]) -> Tensor:
        """Return `input_fp8` [..., K] (FP8 or any float dtype) times the weight [N, K]: [..., N] float32."""
        n, k = weights_nvfp4.shape[0], weights_nvfp4.shape[1] * 2
        if input_fp8.shape[-1] != k:
            raise ShapeError(f"The input has {input_fp8.shape[-1]} features, the weight {k}.")
        weight = kernels.dequantize([weights_nvfp4, *scales], FORMAT, (n, k), torch.float32)
        return input_fp8.float() @ weight.t()
