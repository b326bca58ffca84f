"""FP8 times FP8 with one scale each:  y = (q(x) q(W)^T) * s_x s_W + b,  accumulated in float32.

The codes are multiplied first and scaled afterwards, as tensor cores do; the result therefore differs from the fake-quantized
model by float32 rounding. It is registered by whoever wants it:

    register_kernel(("e4m3[...]*f32", "e4m3[...]*f32", "*"), fp8_per_tensor_gemm)

On GPUs with FP8 units `torch._scaled_mm` multiplies; elsewhere the codes are multiplied as float32, exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modelopt.core.errors import CalibrationError
from modelopt.torch import kernels

FORMAT = "e4m3[...]*f32"


def fp8_per_tensor_gemm(input: Tensor, module: Any) -> Tensor:
    """Multiply `input` [..., K] by the packed E4M3 weight [N, K] of a quantized linear module; [..., N] in the input's dtype.

    Raises CalibrationError if the input quantizer has no amax.
    """
    amax = module.input_quantizer.amax
    if amax is None:
        raise CalibrationError("The FP8 GEMM needs the amax of its input. Calibrate the input quantizer first.")
    codes, w_scale = module.weight_packed.parts
    n, k = module.weight_packed.shape
    x_codes, x_scale = kernels.quantize(input.reshape(-1, k), FORMAT, amax)
    x_MK, w_NK = x_codes.view(torch.float8_e4m3fn), codes.reshape(n, k).view(torch.float8_e4m3fn)
    if _has_units(input) and k % 16 == 0 and n % 16 == 0:
        y = torch._scaled_mm(x_MK, w_NK.t(), x_scale.reshape(()), w_scale.reshape(()), out_dtype=torch.bfloat16).float()
    else:
        y = (x_MK.float() @ w_NK.float().t()) * (x_scale.reshape(()) * w_scale.reshape(()))
    if module.bias is not None:
        y = y + module.bias.float()
    return y.to(input.dtype).reshape(*input.shape[:-1], n)


def _has_units(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 9)
