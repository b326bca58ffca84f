"""Orthogonal transforms of the last dimension, applied before quantization to spread outliers.

    rotate(x) = x H / sqrt(n)      H: the Sylvester-Hadamard matrix of order n (a power of two); rotate(rotate(x)) = x

Source: the fast Walsh-Hadamard transform; QuaRot (Ashkboos et al., 2024) for its use here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modelopt.core.errors import ShapeError


def rotate(x: Tensor, block_size: int = -1, in_float32: bool = False) -> Tensor:
    """Rotate the last dimension of `x` [..., n] by a normalized Hadamard matrix, in blocks of `block_size` (-1: whole).

    Same shape and dtype. Raises ShapeError where the block is no power of two or does not divide n. It is its own inverse.

    >>> rotate(torch.tensor([1.0, 0.0]))
    tensor([0.7071, 0.7071])
    """
    size = x.shape[-1]
    block = size if block_size == -1 else block_size
    if block < 1 or block & (block - 1) or size % block:
        raise ShapeError(f"A Hadamard rotation needs blocks of a power of two that divide the dimension; got {block} of {size}.")
    y = x.reshape(-1, block)
    y = y.float() if in_float32 else y
    width = 1
    while width < block:
        y = y.reshape(-1, block // (2 * width), 2, width)
        low, high = y[:, :, 0], y[:, :, 1]
        y = torch.stack((low + high, low - high), dim=2).reshape(-1, block)
        width *= 2
    return (y * (1.0 / math.sqrt(block))).reshape(x.shape).to(x.dtype)
