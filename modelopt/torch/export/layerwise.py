"""Two models compared layer by layer, each layer of both on what the first model feeds it.

    d(layer) = |y1 - y2| / |y1|,   y1, y2: the layer's outputs in both models for one input;   |.| the Euclidean norm

A quantized input near a rounding boundary falls to either side when one bit before it differs, and every later quantizer
multiplies that: whole logits, and whole attentions, then differ between two right models. A single layer differs by the few
values that flipped.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modelopt.torch.quantization.nn.modules import QuantModule


def largest_layer_difference(model: nn.Module, other: nn.Module, ids: Tensor) -> tuple[float, str]:
    """Return the largest d(layer) over the quantized layers of `model`, and the name of that layer.

    `other`, another object, must have the same module names. `ids` [batch, tokens] are the token ids of one forward pass.

    >>> largest_layer_difference(model, copy.deepcopy(model), ids)[0]    # doctest: +SKIP
    0.0
    """
    found: list[tuple[float, str]] = [(0.0, "")]

    def compare(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ours, theirs = _first(output), _first(other.get_submodule(name)(*args, **kwargs))
        found.append((float((ours - theirs).norm() / ours.norm().clamp_min(1e-30)), name))

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, QuantModule) and not hasattr(module, "k_bmm_quantizer"):
            handles.append(module.register_forward_hook(partial(compare, name), with_kwargs=True))
    try:
        with torch.no_grad():
            model(**model_inputs(model, ids))
    finally:
        for handle in handles:
            handle.remove()
    return max(found)


def _first(output: Any) -> Tensor:
    value: Tensor = output[0] if isinstance(output, tuple) else output
    return value.float()


def model_inputs(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """Return the arguments with which a transformers model runs on token `ids` [batch, tokens].

    An encoder-decoder gets the ids in its decoder, and in its encoder the same ids or, for speech, fixed random features.
    """
    config: Any = model.config
    if not getattr(config, "is_encoder_decoder", False):
        return {"input_ids": ids}
    inputs: dict[str, Any] = {"decoder_input_ids": ids, "use_cache": False}
    if not hasattr(config, "num_mel_bins"):
        return {"input_ids": ids, **inputs}
    shape = (len(ids), config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(ids.device), **inputs}
