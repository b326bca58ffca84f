"""Quantized recurrent modules: every weight matrix of every layer and direction has a quantizer of its own.

    h' = cell( input_quantizer(x), h; weight_quantizer(W_ih), weight_quantizer(W_hh), b )

The quantizer of the parameter `weight_ih_l0` is `weight_ih_l0_weight_quantizer`, so the pattern `*weight_quantizer` finds it.
Only what enters the module is quantized by `input_quantizer`; what flows between layers inside one nn.LSTM is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from modelopt.torch.quantization.nn.modules.quant_module import QuantModule, quantizes


def _weight_names(module: nn.Module) -> list[str]:
    return [name for name, p in module._parameters.items() if p is not None and name.startswith("weight_")]


class _QuantRecurrent(QuantModule):
    @classmethod
    def quantizers_of(cls, module: nn.Module) -> tuple[str, ...]:
        """One quantizer for the input, one for each weight matrix, one for the output."""
        return "input_quantizer", *(f"{name}_weight_quantizer" for name in _weight_names(module)), "output_quantizer"

    @classmethod
    def weights_of(cls, module: nn.Module) -> Iterator[tuple[str, str, Tensor, int | None]]:
        """Yield every weight matrix [gates * hidden, in or hidden]."""
        for name in _weight_names(module):
            yield f"{name}_weight_quantizer", name, getattr(module, name), None

    def _quantized_or_plain(self, name: str) -> Tensor:
        key = f"{name}_weight_quantizer"
        return self.quantized(name, key) if key in self._modules else getattr(self, name)


class _QuantRNN(_QuantRecurrent):
    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        """Same shapes as the original module; a PackedSequence is quantized in its data."""
        x: Any = input
        if isinstance(x, PackedSequence):
            x = x._replace(data=self.input_quantizer(x.data))
        else:
            x = self.input_quantizer(x)
        kept = self.__dict__["_flat_weights"]
        self.__dict__["_flat_weights"] = [self._quantized_or_plain(name) for name in self._flat_weights_names]
        try:  # the original forward reads its weights from this list
            output, hidden = super().forward(x, hx)
        finally:
            self.__dict__["_flat_weights"] = kept
        if isinstance(output, PackedSequence):
            return output._replace(data=self.output_quantizer(output.data)), hidden
        return self.output_quantizer(output), hidden


class _QuantRNNCell(_QuantRecurrent):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Same shapes as the original cell."""
        kept = dict(self._parameters)
        for name in _weight_names(self):
            self._parameters[name] = self._quantized_or_plain(name)  # type: ignore[assignment]
        try:
            hidden = super().forward(self.input_quantizer(input), hx)
        finally:
            self._parameters.update(kept)
        if isinstance(hidden, tuple):
            return self.output_quantizer(hidden[0]), *hidden[1:]
        return self.output_quantizer(hidden)


@quantizes(nn.RNN)
class QuantRNN(_QuantRNN, nn.RNN):
    """nn.RNN with a quantized input and weights."""


@quantizes(nn.LSTM)
class QuantLSTM(_QuantRNN, nn.LSTM):
    """nn.LSTM with a quantized input and weights."""


@quantizes(nn.GRU)
class QuantGRU(_QuantRNN, nn.GRU):
    """nn.GRU with a quantized input and weights."""


@quantizes(nn.RNNCell)
class QuantRNNCell(_QuantRNNCell, nn.RNNCell):
    """nn.RNNCell with a quantized input and weights."""


@quantizes(nn.LSTMCell)
class QuantLSTMCell(_QuantRNNCell, nn.LSTMCell):
    """nn.LSTMCell with a quantized input and weights."""


@quantizes(nn.GRUCell)
class QuantGRUCell(_QuantRNNCell, nn.GRUCell):
    """nn.GRUCell with a quantized input and weights."""
