"""Models of torchvision, on small images and clips."""

from __future__ import annotations

import torch

from benchmarks.zoo import Example
from benchmarks.zoo.guard import declare_torchvision_ops

declare_torchvision_ops()

import torchvision  # noqa: E402

SHAPES = {
    "r3d_18": (8, 32, 32), "r2plus1d_18": (8, 32, 32), "mc3_18": (8, 32, 32), "s3d": (16, 224, 224), "mvit_v1_b": (16, 224, 224),
    "mvit_v2_s": (16, 224, 224), "swin3d_t": (8, 64, 64), "vit_b_32": (224, 224), "swin_t": (224, 224), "swin_v2_t": (64, 64),
    "maxvit_t": (224, 224), "inception_v3": (96, 96), "raft_small": (128, 128), "raft_large": (128, 128),
}  # fmt: skip


def build(name: str) -> Example:
    """Create `name` without weights and without auxiliary heads."""
    options: dict[str, object] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": False, "aux_logits": False}
    if name.startswith(("deeplab", "fcn", "lraspp")):
        options = {"weights_backbone": None}
    model = torchvision.models.get_model(name, weights=None, **options)
    inputs = 2 if name.startswith("raft") else 1
    return Example(model, tuple(torch.randn(1, 3, *SHAPES.get(name, (64, 64))) for _ in range(inputs)))
