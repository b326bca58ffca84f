"""Hadamard matrices H (entries +-1, H H^T = n I) of the orders that are no power of two and come up as layer widths.

    Paley I    order q + 1, q = 3 mod 4 prime:  H = I + S,   S = [[0, 1], [-1, Q]]
    Paley II   order 2(q + 1), q = 1 mod 4 prime:  H = S (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]],   S = [[0, 1], [1, Q]]
    Q_ij = chi(i - j): 1 where i - j is a square modulo q, -1 where it is none, 0 on the diagonal

A size n = m 2^k uses H_m (x) S_k, S_k being Sylvester's matrix in its natural order (element i j is -1 to the popcount of i & j).
Source: Paley, On orthogonal matrices (1933).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from modelopt.core.errors import ShapeError

ORDERS = {12: (1, 11), 20: (1, 19), 28: (2, 13)}  # order: (Paley I or II, q)
LARGEST = 1 << 15


@functools.cache
def matrix(order: int) -> Tensor:
    """Return a Hadamard matrix of `order` (12, 20, 28), float32 [order, order].

    >>> h = matrix(12)
    >>> bool(torch.equal(h @ h.T, 12 * torch.eye(12)))
    True
    """
    kind, q = ORDERS[order]
    squares = {i * i % q for i in range(1, q)}
    chi = torch.tensor([0.0, *(1.0 if i in squares else -1.0 for i in range(1, q))])
    i = torch.arange(q)
    core = torch.ones(q + 1, q + 1)
    core[0, 0] = 0
    core[1:, 1:] = chi[(i[:, None] - i[None, :]) % q]
    if kind == 1:
        core[1:, 0] = -1
        return core + torch.eye(q + 1)
    plus, minus = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(core, plus) + torch.kron(torch.eye(q + 1), minus)


def factors(size: int) -> tuple[int, int]:
    """Return (m, 2^k) with size = m 2^k, m in {1, 12, 20, 28}. Raises ShapeError if there is none, or beyond 32768.

    >>> factors(14336), factors(128)
    ((28, 512), (1, 128))
    """
    for m in (1, *ORDERS):
        rest = size // m
        if 0 < size <= LARGEST and size % m == 0 and rest & (rest - 1) == 0:
            return m, rest
    raise ShapeError(
        f"A Hadamard transform of {size} is not known here: sizes are 2^k, 12 2^k, 20 2^k and 28 2^k up to {LARGEST}."
    )
