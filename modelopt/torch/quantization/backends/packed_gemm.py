"""A linear layer on its packed codes:  y = q(x) W^T + b  as one op, `modelopt::quantized_linear`.

The kernel that serves bfloat16 layers on a GPU unless another is registered. Where the input quantizer does more than round (a
pre-quantization scale, a rotation, an observer), it runs first and the op takes its output as it is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from modelopt.torch import kernels
from modelopt.torch.quantization.nn.modules.tensor_quantizer import TensorQuantizer


def packed_linear(input: Tensor, module: Any) -> Tensor:
    """Multiply `input` [..., K] by the packed weight [N, K] of a quantized linear module; [..., N] in the input's dtype."""
    packed, quantizer = module.weight_packed, module.input_quantizer
    text, amax = "", None
    if _only_rounds(quantizer):
        text, amax, global_amax, _ = quantizer.op_arguments()
        amax = global_amax if amax is None else amax
    else:
        input = quantizer(input)
    return kernels.quantized_linear(input, packed.parts, packed.format, packed.shape[0], module.bias, text, amax)


def _only_rounds(quantizer: Any) -> bool:
    """Return whether the quantizer is one call of fake_quantize with at most one range."""
    if not isinstance(quantizer, TensorQuantizer) or not quantizer.enabled or quantizer.clip_grad:
        return False
    extras = (quantizer.pre_quant_scale, quantizer.rotation, quantizer.observer, quantizer.bias_value, quantizer.amin)
    _, amax, global_amax, _ = quantizer.op_arguments()
    return all(e is None for e in extras) and (amax is None or global_amax is None)
