"""Models of timm, at the smallest image size that they accept."""

from __future__ import annotations

import os

os.environ["TIMM_FUSED_ATTN"] = "0"

import torch

from benchmarks.zoo import Example
from benchmarks.zoo.guard import declare_torchvision_ops

declare_torchvision_ops()

import timm  # noqa: E402

# Two blocks of a model that is only offered large.
SHALLOW = {name: {"depth": 2} for name in ("deepseek_vit_412m", "gemma4_vit_167m", "qwen3_vit_88m", "aimv2_large_patch14_224",
           "beit3_base_patch16_224", "naflexvit_base_patch16_gap")} | {
    "samvit_base_patch16_224": {"depth": 3, "embed_dim": 96, "num_heads": 4, "global_attn_indexes": (2,)}
}  # fmt: skip


def build(name: str) -> Example:
    """Create `name` for 64 pixels if it takes an image size, else run it on 64, 128 or its own size, whichever works first."""
    failure: Exception | None = None
    for options in ({"img_size": 64}, {"img_size": 128}, {}):
        try:
            model = timm.create_model(name, pretrained=False, **SHALLOW.get(name, {}), **options).eval()
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            failure = error
            continue
        full = tuple(model.default_cfg["input_size"])
        if options:
            shapes = [(full[0], options["img_size"], options["img_size"])]
        else:
            shapes = [full] if model.default_cfg.get("fixed_input_size") else [(full[0], 64, 64), (full[0], 128, 128), full]
        for shape in shapes:
            image = torch.randn(1, *shape)
            try:
                with torch.no_grad():
                    model(image)
            except (TypeError, ValueError, RuntimeError, AssertionError, IndexError) as error:
                failure = error
                continue
            return Example(model, (image,))
    raise RuntimeError(f"timm's {name} runs at none of the sizes tried: {failure}")
