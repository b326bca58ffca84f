"""Imports torchvision beside a CPU build of torch.

The wheel of torchvision on PyPI is a CUDA build: without CUDA its library of operators does not load, and `import torchvision`
dies in `register_fake("torchvision::nms")` (and with it timm, and half of transformers). Declaring the two operators first is
enough for all that is Python; `nms`, `roi_align` and the like stay absent.
"""

from __future__ import annotations

import torch

SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_DECLARED: list[str] = []


def declare_torchvision_ops() -> None:
    """Declare the operators once, where no build of torchvision with its own has been loaded."""
    if _DECLARED or hasattr(torch.ops.torchvision, "nms") or torch.version.cuda is not None:
        return
    for name, schema in SCHEMAS.items():
        torch.library.define(f"torchvision::{name}", schema)
        _DECLARED.append(name)
