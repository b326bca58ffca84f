"""Writers: one checkpoint, many layouts. A writer has a name, says why it cannot write a checkpoint, and writes it."""

from __future__ import annotations

from modelopt.core.registry import Registry

WRITERS: Registry = Registry(
    "writer",
    **{
        "hf": "modelopt.torch.export.writers.hf:HFWriter",
        "compressed-tensors": "modelopt.torch.export.writers.compressed_tensors:CompressedTensorsWriter",
    },
)
