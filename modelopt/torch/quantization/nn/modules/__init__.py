"""The quantized modules. Importing this package registers every one of them."""

from __future__ import annotations

from modelopt.torch.quantization.nn.modules.packed import PackedExperts, PackedTensor
from modelopt.torch.quantization.nn.modules.quant_attention import QuantMultiheadAttention
from modelopt.torch.quantization.nn.modules.quant_conv import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
)
from modelopt.torch.quantization.nn.modules.quant_embedding import QuantEmbedding
from modelopt.torch.quantization.nn.modules.quant_linear import QuantLinear
from modelopt.torch.quantization.nn.modules.quant_module import (
    QuantInputBase,
    QuantizedTensor,
    QuantModule,
    QuantModuleRegistry,
)
from modelopt.torch.quantization.nn.modules.quant_rnn import (
    QuantGRU,
    QuantGRUCell,
    QuantLSTM,
    QuantLSTMCell,
    QuantRNN,
    QuantRNNCell,
)
from modelopt.torch.quantization.nn.modules.quant_simple import (
    QuantAdaptiveAvgPool1d,
    QuantAdaptiveAvgPool2d,
    QuantAdaptiveAvgPool3d,
    QuantAdaptiveMaxPool1d,
    QuantAdaptiveMaxPool2d,
    QuantAdaptiveMaxPool3d,
    QuantAvgPool1d,
    QuantAvgPool2d,
    QuantAvgPool3d,
    QuantBatchNorm1d,
    QuantBatchNorm2d,
    QuantBatchNorm3d,
    QuantInstanceNorm1d,
    QuantInstanceNorm2d,
    QuantInstanceNorm3d,
    QuantLayerNorm,
    QuantLeakyReLU,
    QuantMaxPool1d,
    QuantMaxPool2d,
    QuantMaxPool3d,
)
from modelopt.torch.quantization.nn.modules.tensor_quantizer import SequentialQuantizer, TensorQuantizer, leaf_quantizers

__all__ = [
    "PackedExperts",
    "PackedTensor",
    "QuantAdaptiveAvgPool1d",
    "QuantAdaptiveAvgPool2d",
    "QuantAdaptiveAvgPool3d",
    "QuantAdaptiveMaxPool1d",
    "QuantAdaptiveMaxPool2d",
    "QuantAdaptiveMaxPool3d",
    "QuantAvgPool1d",
    "QuantAvgPool2d",
    "QuantAvgPool3d",
    "QuantBatchNorm1d",
    "QuantBatchNorm2d",
    "QuantBatchNorm3d",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "QuantEmbedding",
    "QuantGRU",
    "QuantGRUCell",
    "QuantInputBase",
    "QuantInstanceNorm1d",
    "QuantInstanceNorm2d",
    "QuantInstanceNorm3d",
    "QuantLSTM",
    "QuantLSTMCell",
    "QuantLayerNorm",
    "QuantLeakyReLU",
    "QuantLinear",
    "QuantMaxPool1d",
    "QuantMaxPool2d",
    "QuantMaxPool3d",
    "QuantModule",
    "QuantModuleRegistry",
    "QuantMultiheadAttention",
    "QuantRNN",
    "QuantRNNCell",
    "QuantizedTensor",
    "SequentialQuantizer",
    "TensorQuantizer",
    "leaf_quantizers",
]
