"""timm: the size of the image stands in `patch_embed.img_size` or in the pretrained configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from modelopt.torch.trace.inputs import Inputs, random_input


def candidate_inputs(model: nn.Module) -> Iterator[Inputs]:
    """Yield one image: of the size that the model was built for, else of its pretrained configuration, else small."""
    config: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    channels, *sides = config.get("input_size") or (3, 224, 224)
    channels = getattr(model, "in_chans", None) or channels
    built: Any = getattr(getattr(model, "patch_embed", None), "img_size", None)
    sizes = [tuple(built)] if isinstance(built, tuple | list) else []
    sizes += [tuple(sides)]
    if config.get("fixed_input_size"):  # then the model may have been built for another size than its configuration says
        sizes += [(64, 64), (128, 128), (256, 256), (224, 224)]
    for size in dict.fromkeys(sizes):
        yield (random_input(model, 1, channels, *size),), {}
