"""diffusers: inputs by the names of forward's parameters and the sizes in `model.config`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from modelopt.torch.trace.inputs import Inputs, forward_parameters, random_input
from modelopt.torch.utils import get_module_device

TOKENS = 5


def candidate_inputs(model: nn.Module) -> Iterator[Inputs]:
    """Yield keyword arguments for a UNet, an autoencoder or a diffusion transformer."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return
    names = forward_parameters(model)
    device = get_module_device(model)
    kwargs: dict[str, Any] = {}
    for name in names:
        value = _value(name, model, config)
        if value is not None:
            kwargs[name] = value.to(device)
    if "added_cond_kwargs" in names:
        kwargs["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    for unused in [n for n, needs in _ONLY_WITH.items() if n in kwargs and config.get(needs) is None]:
        del kwargs[unused]
    if kwargs:
        yield (), kwargs
        required = {n for n, p in names.items() if p.default is p.empty}
        yield (), {k: v for k, v in kwargs.items() if k in required or k in ("timestep", "encoder_hidden_states")}


_ONLY_WITH = {"class_labels": "num_embeds_ada_norm", "added_cond_kwargs": "caption_channels"}


def _value(name: str, model: nn.Module, config: Any) -> Tensor | None:
    channels = int(config.get("in_channels") or 3)
    side = config.get("sample_size") or 32
    height, width = (side, side) if isinstance(side, int) else side
    packed = "img_ids" in forward_parameters(model)  # Flux takes its latents as tokens already
    if name in ("sample", "hidden_states", "x"):
        return random_input(model, 1, 16, channels) if packed else random_input(model, 1, channels, height, width)
    if name in ("timestep", "timesteps"):
        return torch.tensor([0.3]) if packed else torch.tensor([3])
    if name in ("encoder_hidden_states", "context"):
        width = next(
            (config.get(k) for k in ("joint_attention_dim", "caption_channels", "cross_attention_dim") if config.get(k)), None
        )
        width = width[0] if isinstance(width, tuple | list) else width
        return None if width is None else random_input(model, 1, TOKENS, int(width))
    if name in ("pooled_projections", "pooled_projection"):
        width = config.get("pooled_projection_dim")
        return None if width is None else random_input(model, 1, int(width))
    if name == "class_labels":
        return torch.tensor([1])
    if name == "img_ids":
        return torch.zeros(16, 3)
    if name == "txt_ids":
        return torch.zeros(TOKENS, 3)
    return None
