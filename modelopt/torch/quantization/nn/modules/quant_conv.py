"""Quantized convolutions:  y = output_quantizer( conv(input_quantizer(x), weight_quantizer(W)) + b ).

The weight is [out, in / groups, ...], transposed ones [in, out / groups, ...]: `axis` 0 of a configuration is the first of these
in both, so a per-output-channel scale of a transposed convolution is `axis` 1.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from modelopt.torch.quantization.nn.modules.quant_module import QuantInputBase, quantizes

_NAMES = ("input_quantizer", "weight_quantizer", "output_quantizer")


class _QuantConv(QuantInputBase):
    quantizer_names = _NAMES
    packable = ("weight",)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Same shapes as the original convolution."""
        output = self._conv_forward(self.input_quantizer(input), self.quantized(), self.bias)  # type: ignore[operator]
        return self.output_quantizer(output)


class _QuantConvTranspose(QuantInputBase):
    quantizer_names = _NAMES
    packable = ("weight",)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Same shapes as the original transposed convolution."""
        if self.padding_mode != "zeros":
            raise ValueError("Only `zeros` padding mode is supported for transposed convolutions")
        dims = len(self.kernel_size)
        padding = self._output_padding(  # type: ignore[operator]
            input, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
        )
        conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        weight = self.quantized()
        x = self.input_quantizer(input)
        return self.output_quantizer(conv(x, weight, self.bias, self.stride, self.padding, padding, self.groups, self.dilation))


@quantizes(nn.Conv1d)
class QuantConv1d(_QuantConv, nn.Conv1d):
    """nn.Conv1d with quantized input and weight."""


@quantizes(nn.Conv2d)
class QuantConv2d(_QuantConv, nn.Conv2d):
    """nn.Conv2d with quantized input and weight."""


@quantizes(nn.Conv3d)
class QuantConv3d(_QuantConv, nn.Conv3d):
    """nn.Conv3d with quantized input and weight."""


@quantizes(nn.ConvTranspose1d)
class QuantConvTranspose1d(_QuantConvTranspose, nn.ConvTranspose1d):
    """nn.ConvTranspose1d with quantized input and weight."""


@quantizes(nn.ConvTranspose2d)
class QuantConvTranspose2d(_QuantConvTranspose, nn.ConvTranspose2d):
    """nn.ConvTranspose2d with quantized input and weight."""


@quantizes(nn.ConvTranspose3d)
class QuantConvTranspose3d(_QuantConvTranspose, nn.ConvTranspose3d):
    """nn.ConvTranspose3d with quantized input and weight."""
