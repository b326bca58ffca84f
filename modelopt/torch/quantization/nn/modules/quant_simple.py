"""Modules without a quantized weight: norms, pooling, activations.  y = output_quantizer( module(input_quantizer(x)) ).

All are opt-in: only a rule that names the module or its class switches their quantizers on.
"""

from __future__ import annotations

from torch import nn

from modelopt.torch.quantization.nn.modules.quant_module import QuantInputBase, quantizes


@quantizes(nn.BatchNorm1d)
class QuantBatchNorm1d(QuantInputBase, nn.BatchNorm1d):
    """nn.BatchNorm1d with a quantized input."""


@quantizes(nn.BatchNorm2d)
class QuantBatchNorm2d(QuantInputBase, nn.BatchNorm2d):
    """nn.BatchNorm2d with a quantized input."""


@quantizes(nn.BatchNorm3d)
class QuantBatchNorm3d(QuantInputBase, nn.BatchNorm3d):
    """nn.BatchNorm3d with a quantized input."""


@quantizes(nn.InstanceNorm1d)
class QuantInstanceNorm1d(QuantInputBase, nn.InstanceNorm1d):
    """nn.InstanceNorm1d with a quantized input."""


@quantizes(nn.InstanceNorm2d)
class QuantInstanceNorm2d(QuantInputBase, nn.InstanceNorm2d):
    """nn.InstanceNorm2d with a quantized input."""


@quantizes(nn.InstanceNorm3d)
class QuantInstanceNorm3d(QuantInputBase, nn.InstanceNorm3d):
    """nn.InstanceNorm3d with a quantized input."""


@quantizes(nn.LayerNorm)
class QuantLayerNorm(QuantInputBase, nn.LayerNorm):
    """nn.LayerNorm with a quantized input."""


@quantizes(nn.LeakyReLU)
class QuantLeakyReLU(QuantInputBase, nn.LeakyReLU):
    """nn.LeakyReLU with a quantized input."""


@quantizes(nn.AvgPool1d)
class QuantAvgPool1d(QuantInputBase, nn.AvgPool1d):
    """nn.AvgPool1d with a quantized input."""


@quantizes(nn.AvgPool2d)
class QuantAvgPool2d(QuantInputBase, nn.AvgPool2d):
    """nn.AvgPool2d with a quantized input."""


@quantizes(nn.AvgPool3d)
class QuantAvgPool3d(QuantInputBase, nn.AvgPool3d):
    """nn.AvgPool3d with a quantized input."""


@quantizes(nn.MaxPool1d)
class QuantMaxPool1d(QuantInputBase, nn.MaxPool1d):
    """nn.MaxPool1d with a quantized input."""


@quantizes(nn.MaxPool2d)
class QuantMaxPool2d(QuantInputBase, nn.MaxPool2d):
    """nn.MaxPool2d with a quantized input."""


@quantizes(nn.MaxPool3d)
class QuantMaxPool3d(QuantInputBase, nn.MaxPool3d):
    """nn.MaxPool3d with a quantized input."""


@quantizes(nn.AdaptiveAvgPool1d)
class QuantAdaptiveAvgPool1d(QuantInputBase, nn.AdaptiveAvgPool1d):
    """nn.AdaptiveAvgPool1d with a quantized input."""


@quantizes(nn.AdaptiveAvgPool2d)
class QuantAdaptiveAvgPool2d(QuantInputBase, nn.AdaptiveAvgPool2d):
    """nn.AdaptiveAvgPool2d with a quantized input."""


@quantizes(nn.AdaptiveAvgPool3d)
class QuantAdaptiveAvgPool3d(QuantInputBase, nn.AdaptiveAvgPool3d):
    """nn.AdaptiveAvgPool3d with a quantized input."""


@quantizes(nn.AdaptiveMaxPool1d)
class QuantAdaptiveMaxPool1d(QuantInputBase, nn.AdaptiveMaxPool1d):
    """nn.AdaptiveMaxPool1d with a quantized input."""


@quantizes(nn.AdaptiveMaxPool2d)
class QuantAdaptiveMaxPool2d(QuantInputBase, nn.AdaptiveMaxPool2d):
    """nn.AdaptiveMaxPool2d with a quantized input."""


@quantizes(nn.AdaptiveMaxPool3d)
class QuantAdaptiveMaxPool3d(QuantInputBase, nn.AdaptiveMaxPool3d):
    """nn.AdaptiveMaxPool3d with a quantized input."""
