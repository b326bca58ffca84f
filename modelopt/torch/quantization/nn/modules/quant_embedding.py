"""Quantized Embedding:  y = output_quantizer( weight_quantizer(W)[ids] ).  Weight only: its input are indices."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from modelopt.torch.quantization.nn.modules.quant_module import QuantModule, quantizes


@quantizes(nn.Embedding)
class QuantEmbedding(QuantModule, nn.Embedding):
    """nn.Embedding with a quantized table. Opt-in: only a rule that names it switches its quantizers on."""

    quantizer_names = ("weight_quantizer", "output_quantizer")
    packable = ("weight",)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[...] indices -> [..., features]."""
        if not self.weight_quantizer.is_enabled and "weight_packed" not in self._modules:
            return self.output_quantizer(super().forward(input))
        table = self.quantized()
        return self.output_quantizer(
            F.embedding(input, table, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)
        )
