"""Readers: a directory back into a checkpoint, and a checkpoint back into a model."""

from __future__ import annotations

from modelopt.core.registry import Registry

READERS: Registry = Registry(
    "reader",
    **{
        "modelopt": "modelopt.torch.export.readers.hf:read",
        "compressed-tensors": "modelopt.torch.export.readers.compressed_tensors:read",
    },
)
