"""transformers: inputs from `main_input_name`, the signature of forward and the sizes in the config.

Composite configs (text, vision, audio) are searched for the first part that knows a size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modelopt.torch.trace.inputs import Inputs, forward_parameters, random_input, token_input

_PARTS = ("text_config", "vision_config", "audio_config", "encoder", "decoder", "thinker_config", "backbone_config")


def fx_hopeless(model: nn.Module) -> str | None:
    """Return why torch.fx is not tried: every forward of transformers branches on its inputs."""
    if isinstance(model, PreTrainedModel):
        return f"torch.fx was not tried: the forward of {type(model).__name__} takes **kwargs and branches on its inputs"
    return None


def candidate_inputs(model: nn.Module) -> Iterator[Inputs]:
    """Yield keyword arguments for a PreTrainedModel: the main input alone, then with what else the model may need."""
    if not isinstance(model, PreTrainedModel):
        return
    names = forward_parameters(model)
    makers: dict[str, Callable[..., Tensor]] = {
        "input_ids": _tokens,
        "pixel_values": _image,
        "input_values": _waveform,
        "input_features": _spectrogram,
        "pixel_values_videos": _video,
    }
    main = model.main_input_name
    known = [n for n in (main, *makers) if n in makers and n in names]
    if not known:
        return
    extra = _fixed(model, names)
    first: dict[str, Any] = {known[0]: makers[known[0]](model)}
    if "decoder_input_ids" in names:
        first["decoder_input_ids"] = _tokens(model, 8)
    every: dict[str, Any] = {n: makers[n](model) for n in dict.fromkeys(known)}
    pair: dict[str, Any] = {n: every[n] for n in ("input_ids", "pixel_values") if n in every}
    contrastive = len(pair) == 2 and hasattr(model.config, "projection_dim")
    order: list[dict[str, Any]] = (
        [pair, first, every] if contrastive or "Siglip" in type(model).__name__ else [first, {**first, **pair}, every]
    )
    seen: list[list[str]] = []
    for kwargs in order:
        if list(kwargs) not in seen:
            seen.append(list(kwargs))
            yield (), {**kwargs, **extra}
    if known[0] == "pixel_values":
        for side in (64, 384, 512):
            yield (), {"pixel_values": _image(model, side), **extra}


def _fixed(model: nn.Module, names: dict[str, Any]) -> dict[str, Any]:
    fixed = {"use_cache": False, "return_dict": True}
    return {k: v for k, v in fixed.items() if k in names or (k == "use_cache" and hasattr(model.config, k) and "kwargs" in names)}


def setting(config: Any, *names: str, default: Any = None) -> Any:
    """Return the first of `names` that the config, or one of its parts, has."""
    configs = [config]
    for part in configs:
        for name in names:
            value = getattr(part, name, None)
            if value is not None:
                return value
        configs += [sub for key in _PARTS if (sub := getattr(part, key, None)) is not None and hasattr(sub, "to_dict")]
    return default


def _tokens(model: nn.Module, length: int = 16) -> Tensor:
    limit = setting(model.config, "max_position_embeddings", "n_positions", default=length)
    limit = limit if isinstance(limit, int) and limit > 4 else length
    return token_input(model, int(setting(model.config, "vocab_size", default=32)), min(length, limit))


def _side(config: Any) -> tuple[int, int]:
    size = setting(config, "image_size", default=224)
    if isinstance(size, dict):
        size = (size.get("height", 224), size.get("width", 224))
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _image(model: nn.Module, side: int | None = None) -> Tensor:
    channels = int(setting(model.config, "num_channels", default=3))
    return random_input(model, 1, channels, *(_side(model.config) if side is None else (side, side)))


def _video(model: nn.Module) -> Tensor:
    frames = int(setting(model.config, "num_frames", default=4))
    return random_input(model, 1, frames, int(setting(model.config, "num_channels", default=3)), *_side(model.config))


def _waveform(model: nn.Module) -> Tensor:
    strides, kernels = setting(model.config, "conv_stride"), setting(model.config, "conv_kernel")
    bins = setting(model.config, "num_mel_bins")
    if bins is not None and strides is None:
        return random_input(model, 1, int(setting(model.config, "max_length", default=128)), int(bins))
    if strides is None:
        return random_input(model, 1, 4000)
    length = 24  # frames that shall come out
    for stride, kernel in zip(reversed(strides), reversed(kernels), strict=False):
        length = (length - 1) * stride + kernel
    return random_input(model, 1, length)


def _spectrogram(model: nn.Module) -> Tensor:
    bins = int(setting(model.config, "num_mel_bins", "feature_size", "input_dim", "input_feat_per_channel", default=80))
    frames = setting(model.config, "max_source_positions")
    if "whisper" in str(getattr(model.config, "model_type", "")) and frames:
        return random_input(model, 1, bins, 2 * int(frames))
    features = random_input(model, 1, 64, bins)
    return features if math.prod(features.shape) else torch.zeros_like(features)
