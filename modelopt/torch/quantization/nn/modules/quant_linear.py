"""Quantized Linear:  y = output_quantizer( input_quantizer(x) W_q^T + b ),  W_q = weight_quantizer(W)  [out, in].

Where the weight is packed and the GEMM registry knows a kernel for the formats, that kernel multiplies the codes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from modelopt.torch.quantization.backends.gemm_registry import find_kernel, have_kernels
from modelopt.torch.quantization.nn.modules.quant_module import QuantInputBase, QuantModule, quantizes


@quantizes(nn.Linear)
class QuantLinear(QuantInputBase, nn.Linear):
    """nn.Linear with quantized input and weight; subclasses that keep its forward become one too."""

    quantizer_names = ("input_quantizer", "weight_quantizer", "output_quantizer")
    packable = ("weight",)
    counts_in_coverage = True

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.output_quantizer(packed_matmul(self, input))


def packed_matmul(module: QuantModule, input: Tensor) -> Tensor:
    """Multiply the input with the weight of a linear `module` [out, in]: on its codes where the GEMM registry has a kernel."""
    packed = module._modules.get("weight_packed")
    if packed is not None and (input.is_cuda or have_kernels()):
        quantizer = module.input_quantizer
        input_type = quantizer._format_text if quantizer.is_enabled else str(input.dtype).removeprefix("torch.")
        kernel = find_kernel(input_type, packed.format, str(input.dtype).removeprefix("torch."))
        if kernel is not None:
            return kernel(input, module)
    return F.linear(module.input_quantizer(input), module.quantized(), module.bias)
