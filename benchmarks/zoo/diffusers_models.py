"""Models of diffusers with two blocks of 32 to 64 channels."""

# ruff: noqa: C408
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.zoo import Example
from benchmarks.zoo.guard import declare_torchvision_ops

declare_torchvision_ops()

import diffusers  # noqa: E402

TWO = (32, 64)


def _r(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def _step(value: float = 3) -> torch.Tensor:
    return torch.tensor([value])


SPECS: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "UNet2DModel": (
        dict(sample_size=16, block_out_channels=TWO, layers_per_block=1, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
             up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=8, attention_head_dim=8),
        lambda: dict(sample=_r(1, 3, 16, 16), timestep=_step()),
    ),
    "UNet2DConditionModel": (
        dict(sample_size=16, block_out_channels=TWO, layers_per_block=1, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
             up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32, norm_num_groups=8, attention_head_dim=8),
        lambda: dict(sample=_r(1, 4, 16, 16), timestep=_step(), encoder_hidden_states=_r(1, 5, 32)),
    ),
    "AutoencoderKL": (
        dict(block_out_channels=TWO, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
             norm_num_groups=8, latent_channels=4),
        lambda: dict(sample=_r(1, 3, 32, 32)),
    ),
    "DiTTransformer2DModel": (
        dict(num_attention_heads=4, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, norm_num_groups=8),
        lambda: dict(hidden_states=_r(1, 4, 8, 8), timestep=_step(), class_labels=torch.tensor([1])),
    ),
    "SD3Transformer2DModel": (
        dict(sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
             joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32, out_channels=4, pos_embed_max_size=16),
        lambda: dict(hidden_states=_r(1, 4, 16, 16), encoder_hidden_states=_r(1, 5, 32), pooled_projections=_r(1, 32),
                     timestep=_step()),
    ),
    "FluxTransformer2DModel": (
        dict(patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
             joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8]),
        lambda: dict(hidden_states=_r(1, 16, 4), encoder_hidden_states=_r(1, 5, 32), pooled_projections=_r(1, 32),
                     timestep=_step(0.3), img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(5, 3)),
    ),
    "PixArtTransformer2DModel": (
        dict(num_attention_heads=4, attention_head_dim=8, in_channels=4, num_layers=2, cross_attention_dim=32, sample_size=8,
             patch_size=2, norm_num_groups=8, out_channels=8, caption_channels=32, use_additional_conditions=False),
        lambda: dict(hidden_states=_r(1, 4, 8, 8), encoder_hidden_states=_r(1, 5, 32), timestep=_step(),
                     added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
    ),
}  # fmt: skip


def build(name: str) -> Example:
    """Create one of `SPECS`."""
    options, inputs = SPECS[name]
    return Example(getattr(diffusers, name)(**options), (), inputs())
