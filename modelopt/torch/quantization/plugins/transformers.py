"""Hugging Face transformers: `Conv1D`, a Linear whose weight is stored as [in, out].

y = output_quantizer( input_quantizer(x) W_q + b ),   W_q = weight_quantizer(W^T)^T     quantized in the orientation of nn.Linear
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from modelopt.torch.quantization.nn.modules.quant_module import QuantInputBase, quantizes
from modelopt.torch.quantization.nn.weight_cache import quantized_weight


def prepare(model: nn.Module) -> None:
    """Look at a model before it is converted. Nothing depends on the model yet."""


@quantizes(Conv1D)
class QuantConv1D(QuantInputBase, Conv1D):
    """transformers' Conv1D with quantized input and weight; its weight is seen as [out, in]."""

    quantizer_names = ("input_quantizer", "weight_quantizer", "output_quantizer")
    counts_in_coverage = True

    @classmethod
    def weights_of(cls, module: nn.Module) -> Iterator[tuple[str, str, Tensor, int | None]]:
        """Yield the weight transposed, [out, in]."""
        yield "weight_quantizer", "weight", module.weight.t(), None  # type: ignore[operator]

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out]."""
        weight = quantized_weight(self.weight_quantizer, self.weight.t())
        return self.output_quantizer(F.linear(self.input_quantizer(input), weight, self.bias))
