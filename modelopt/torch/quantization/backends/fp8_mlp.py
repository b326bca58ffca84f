"""FP8 layers with an activation between them as one op, `modelopt::fp8_mlp`; the kernel registered for such chains.

second(act(first(x)))  or  second(act(first(x)) * up(x)),  the intermediate written once, as the E4M3 codes that `second` reads
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from modelopt.torch.kernels.fused_mlp import fp8_mlp as op


def fp8_mlp(input: Tensor, layers: Any) -> Tensor:
    """Return the output [..., N2] of a chain of compressed FP8 layers (`fusion.Layers`) for `input` [..., K], in its dtype."""
    n = [m.weight_packed.shape for m in layers.modules]
    parts: list[Tensor] = []
    for module, shape in zip(layers.modules, n, strict=True):
        codes, scale = module.weight_packed.parts
        parts += [codes.reshape(shape), scale]
    text, amax, _, _ = layers.first.input_quantizer.op_arguments()
    hidden = layers.second.input_quantizer.amax
    return op(input, parts, [m.bias for m in layers.modules], layers.activation, text, amax, hidden)
