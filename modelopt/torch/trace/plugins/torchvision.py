"""torchvision: every classifier takes an image of 224 pixels or smaller, videos are recognised by their first convolution."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from modelopt.torch.trace.inputs import Inputs, random_input, required_parameters


def candidate_inputs(model: nn.Module) -> Iterator[Inputs]:
    """Yield an image (two for models that compare two), or a short video."""
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)), None)
    if conv is None:
        return
    if isinstance(conv, nn.Conv3d):
        shapes: list[tuple[int, ...]] = [(8, 64, 64), (16, 224, 224), (16, 112, 112)]
    elif "image2" in required_parameters(model):
        shapes = [(128, 128)]
    else:
        shapes = [(224, 224), (299, 299), (64, 64)]
    count = max(1, len(required_parameters(model)))
    for shape in shapes:
        yield tuple(random_input(model, 1, conv.in_channels, *shape) for _ in range(count)), {}
