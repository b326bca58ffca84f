"""Hugging Face transformers: attention and KV-cache quantizers, fused experts, and `Conv1D`, whose weight is stored [in, out].

Conv1D:  y = output_quantizer( input_quantizer(x) W_q + b ),  W_q = weight_quantizer(W^T)^T   in the orientation of nn.Linear
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from modelopt.torch.opt.surgery import original_class, walk
from modelopt.torch.quantization.nn.modules.quant_linear import packed_matmul
from modelopt.torch.quantization.nn.modules.quant_module import QuantInputBase, QuantizedTensor, quantizes
from modelopt.torch.quantization.nn.modules.weight_cache import quantized_weight
from modelopt.torch.quantization.plugins.hf_attention import register_attention
from modelopt.torch.quantization.plugins.hf_experts import register_experts

# Linear children whose weight their parent reads without calling them, so that a quantizer in them would never act.
READ_DIRECTLY = {
    "MambaMixer": ("dt_proj",),
    "FalconMambaMixer": ("dt_proj",),
    "JambaMambaMixer": ("dt_proj",),
    "MobileBertLMPredictionHead": ("dense", "decoder"),
}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)


def prepare(model: nn.Module) -> dict[nn.Module, str]:
    """Register quantized classes for the attention and expert classes of `model`. The model is not changed.

    Returns the modules that must not be quantized, with the reason.
    """
    modules = [module for _, module in walk(model)]
    register_experts(modules)
    register_attention({type(module) for module in modules})
    kept = {}
    for module in modules:
        if isinstance(module, CONVOLUTIONS) and isinstance(model, PreTrainedModel):
            kept[module] = "a convolution of a transformers model (patches, audio frames): no engine's layout holds it quantized"
        kind = original_class(module).__name__
        for name in READ_DIRECTLY.get(kind, ()):
            if name in module._modules:
                kept[module._modules[name]] = f"{kind} reads this weight without calling its layer"
    return kept


@quantizes(Conv1D)
class QuantConv1D(QuantInputBase, Conv1D):
    """transformers' Conv1D with quantized input and weight; its weight is seen as [out, in]."""

    quantizer_names = ("input_quantizer", "weight_quantizer", "output_quantizer")
    packable = ("weight",)
    counts_in_coverage = True

    @classmethod
    def weights_of(cls, module: nn.Module) -> Iterator[tuple[str, str, Tensor, int | None]]:
        """Yield the weight transposed, [out, in]."""
        yield "weight_quantizer", "weight", module.weight.t(), None  # type: ignore[operator]

    def quantized_tensors(self) -> Iterator[QuantizedTensor]:
        """Yield the weight as [out, in], and say that it is stored [in, out]."""
        for item in super().quantized_tensors():
            yield replace(item, transposed=True)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out]."""
        if "weight_packed" in self._modules:
            return self.output_quantizer(packed_matmul(self, input))
        weight = quantized_weight(self.weight_quantizer, self.weight.t())
        return self.output_quantizer(F.linear(self.input_quantizer(input), weight, self.bias))
