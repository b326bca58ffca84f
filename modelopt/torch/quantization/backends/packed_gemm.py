"""A linear layer on its packed codes:  y = q(x) W^T + b  as one op, `modelopt::quantized_linear`.

The kernel that serves bfloat16 layers on a GPU unless another is registered. Where the input quantizer does more than round (a
pre-quantization scale, a rotation, an observer), it runs first and the op takes its output as it is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from modelopt.torch import kernels
from modelopt.torch.quantization.backends.gemm_registry import find_kernel
from modelopt.torch.quantization.nn.modules.tensor_quantizer import TensorQuantizer


def packed_linear(input: Tensor, module: Any) -> Tensor:
    """Multiply `input` [..., K] by the packed weight [N, K] of a quantized linear module; [..., N] in the input's dtype."""
    packed, quantizer = module.weight_packed, module.input_quantizer
    text, amax = "", None
    if only_rounds(quantizer):
        text, amax, global_amax, _ = quantizer.op_arguments()
        amax = global_amax if amax is None else amax
    else:
        input = quantizer(input)
    return kernels.quantized_linear(input, packed.parts, packed.format, packed.shape[0], module.bias, text, amax)


def only_rounds(quantizer: Any) -> bool:
    """Return whether the quantizer is one call of fake_quantize with at most one range."""
    if not isinstance(quantizer, TensorQuantizer) or not quantizer.enabled or quantizer.clip_grad:
        return False
    extras = (quantizer.pre_quant_scale, quantizer.rotation, quantizer.observer, quantizer.bias_value, quantizer.amin)
    _, amax, global_amax, _ = quantizer.op_arguments()
    return all(e is None for e in extras) and (amax is None or global_amax is None)


def explain(module: Any, input: Tensor) -> str:
    """Return what multiplies in a quantized linear `module` for `input`: a kernel, or "dequantized: " and the reason.

    >>> explain(torch.nn.Linear(4, 4), torch.ones(1, 4))
    'dequantized: the module has no packed weight; compress the model'
    """
    packed = module._modules.get("weight_packed")
    if packed is None:
        return "dequantized: the module has no packed weight; compress the model"
    quantizer, dtype = module.input_quantizer, str(input.dtype).removeprefix("torch.")
    text = quantizer.op_arguments()[0] if only_rounds(quantizer) else ""
    kernel = find_kernel(text if quantizer.is_enabled else dtype, packed.format, dtype)
    if kernel is None:
        return f"dequantized: no kernel is registered for {text or dtype} times {packed.format} in {dtype}"
    if kernel is not packed_linear:
        return getattr(kernel, "__name__", type(kernel).__name__)
    return kernels.explain_linear(input, packed.parts, packed.format, packed.shape[0], text)
