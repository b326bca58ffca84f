"""Round float32 scales to the type that a layout stores. Codes stay as they are: they may be the work of an algorithm."""

from __future__ import annotations

from dataclasses import replace

import torch

from modelopt.numerics.elements import element
from modelopt.numerics.formats import Format
from modelopt.numerics.reference import Quantized

_NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def round_scales(q: Quantized, dtype: torch.dtype) -> Quantized:
    """Return `q` with its float32 scale in `dtype` (float32, float16 or bfloat16). Other kinds of scales are left alone.

    A weight with a scale that would leave the range of `dtype` (float16: above 65504 or to zero) keeps float32 for all.
    """
    if isinstance(q.format.scale, Format) or q.format.scale.name not in ("f32", "bf16", "f16"):
        return q
    rounded = q.scales[0].to(dtype)
    if not rounded.is_meta and not bool((rounded.isfinite() & (rounded > 0)).all()):
        return q
    return replace(q, scales=(rounded,), format=q.format.with_(scale=element(_NAMES[dtype])))
