"""Sizes and fingerprints of tensors: bytes of storage, and a SHA-256 of type, shape and bits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def num_bytes(tensors: Tensor | Iterable[Tensor]) -> int:
    """Return the bytes that the tensors occupy; memory that several of them share counts once.

    >>> w = torch.zeros(4, 2)
    >>> num_bytes([w, w.t()])
    32
    """
    storages: dict[tuple[str, int], int] = {}
    for t in [tensors] if isinstance(tensors, Tensor) else tensors:
        storage = t.untyped_storage()
        key = (str(t.device), id(t) if t.device.type == "meta" else storage.data_ptr())
        storages[key] = max(storages.get(key, 0), storage.nbytes())
    return sum(storages.values())


def digest(tensor: Tensor) -> str:
    """Return the SHA-256 (hex) of dtype, shape and bits, so that NaN payloads and the sign of zero count.

    Works for every dtype, float8 and bool included; strides and device do not matter.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    h = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    if flat.numel():
        h.update(flat.view(torch.uint8).numpy().data)
    return h.hexdigest()
