"""Fake quantization of one tensor as plain functions, under the names that users of this field know.

scaled_e4m3(x, amax) = cast_e4m3(x * 448 / amax) * amax / 448        fake_tensor_quant: the same with integers
"""

from __future__ import annotations

from torch import Tensor

from modelopt.core.errors import ConfigError, ShapeError
from modelopt.torch import kernels


def scaled_e4m3_impl(inputs: Tensor, amax: Tensor | None = None, disable_fused_kernel: bool = True) -> Tensor:
    """Return `inputs` (any floating dtype) rounded to what FP8 E4M3 can hold with 448 at `amax`; same shape and dtype.

    `amax` is a scalar, or has one value per index of one dimension and size 1 elsewhere; None takes the largest magnitude.
    `disable_fused_kernel` is accepted for compatibility: which kernel serves is chosen by `modelopt.torch.kernels`.

    >>> scaled_e4m3_impl(torch.tensor([1.0, 100.0, 500.0]), torch.tensor(448.0))
    tensor([  1., 104., 448.])
    """
    return kernels.fake_quantize(inputs, f"e4m3{_block(inputs, amax)}*f32", amax)


scaled_e4m3 = scaled_e4m3_impl


def fake_tensor_quant(
    inputs: Tensor, amax: Tensor | None = None, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = False
) -> Tensor:
    """Return `inputs` rounded to integers of `num_bits` with the largest code at `amax` (as in `scaled_e4m3_impl`).

    >>> fake_tensor_quant(torch.tensor([0.3, -1.0]), torch.tensor(1.0), num_bits=3)
    tensor([ 0.3333, -1.0000])
    """
    if not 2 <= num_bits <= 8:
        raise ConfigError(f"num_bits is 2 to 8, got {num_bits}.")
    element = f"u{num_bits}" if unsigned else f"i{num_bits}{'n' if narrow_range else ''}"
    return kernels.fake_quantize(inputs, f"{element}{_block(inputs, amax)}*f32", amax)


def _block(inputs: Tensor, amax: Tensor | None) -> str:
    if amax is None or amax.numel() == 1:
        return "[...]"
    wide = [d for d, n in enumerate(amax.shape) if n != 1]
    if amax.dim() != inputs.dim() or any(amax.shape[d] != inputs.shape[d] for d in wide):
        raise ShapeError(f"amax of shape {list(amax.shape)} does not broadcast over {list(inputs.shape)} with whole dimensions.")
    return "[" + ",".join("1" if d in wide else "-1" for d in range(inputs.dim())) + "]"
