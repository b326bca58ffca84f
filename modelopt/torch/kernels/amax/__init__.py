"""`modelopt::amax`: the largest magnitude of each block of a tensor, float32, in the shape of the format's scales.

Schema: amax(Tensor x, str format) -> Tensor
"""

from __future__ import annotations

import torch
from torch import Tensor

from modelopt.numerics import Format, parse
from modelopt.torch.kernels.amax import reference
from modelopt.torch.kernels.choice import fast_kernel
from modelopt.torch.kernels.library import define, notation


def amax(x: Tensor, fmt: Format | str) -> Tensor:
    """Return max |x| of each block of `fmt` (a scalar for `[...]`), float32. NaN propagates.

    >>> amax(torch.tensor([[1.0, -3.0], [0.5, 2.0]]), "i8[-1]*f32")
    tensor([[3.],
            [2.]])
    """
    return torch.ops.modelopt.amax(x, notation(fmt))


def _run(x: Tensor, format: str) -> Tensor:
    fmt = parse(format)
    kernel = fast_kernel("amax", x, fmt)
    return (kernel or reference).amax(x, fmt)


def _fake(x: Tensor, format: str) -> Tensor:
    return x.new_empty(parse(format).grid(x.shape), dtype=torch.float32)


define("amax(Tensor x, str format) -> Tensor", _run, _fake)
