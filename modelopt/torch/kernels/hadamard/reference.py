"""The Walsh-Hadamard transform by its law: butterflies in float32, from the nearest neighbours to the farthest, then H_m.

    for h = 1, 2, 4, ... 2^(k-1):  (a, b) at distance h  becomes  (a + b, a - b);   then y = H_m x;   then times RN(1 / sqrt(n))

Every sum is rounded to float32 on its own. The order in which the m terms of H_m x are added is not fixed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modelopt.torch.kernels.hadamard.matrices import factors, matrix

_CHUNK = 1 << 20


def hadamard(x: Tensor, size: int, signs: Tensor | None = None, inverse: bool = False) -> Tensor:
    """Return the transform of every `size` elements of the last dimension of `x`; see `kernels.hadamard`."""
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    blocks = x.reshape(-1, size)
    out = torch.empty_like(blocks, memory_format=torch.contiguous_format)
    step = max(_CHUNK // size, 1)
    for i in range(0, blocks.shape[0], step):
        out[i : i + step] = _transform(blocks[i : i + step].float(), size, signs, inverse)
    return out.reshape(x.shape)


def _transform(x: Tensor, size: int, signs: Tensor | None, inverse: bool) -> Tensor:
    m, power = factors(size)
    if signs is not None and not inverse:
        x = x * signs.float()
    h = 1
    while h < power:
        pairs = x.reshape(-1, 2, h)
        x = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), 1)
        h *= 2
    if m > 1:
        h_m = matrix(m).to(x.device)
        x = torch.matmul(h_m.T if inverse else h_m, x.reshape(-1, m, power))
    y = x.reshape(-1, size) * scale(size)
    return y * signs.float() if signs is not None and inverse else y


def scale(size: int) -> float:
    """Return 1 / sqrt(size) rounded to float32."""
    return torch.tensor(1 / math.sqrt(size), dtype=torch.float32).item()
