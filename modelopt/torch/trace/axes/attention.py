"""`F.multi_head_attention_forward` written out in views, products and a softmax, so that its sizes are seen like any model's.

Torch runs its own body where no mode looks; the same function in plain operations has the same result (torch 2.11 to 2.13).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask to be added to the scores; True in a boolean mask means hidden."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _project(inputs: tuple[Tensor, ...], embed_dim: int, weights: tuple[Tensor | None, ...], bias: Tensor | None) -> list[Tensor]:
    packed, *separate = weights
    if packed is not None:
        separate = list(packed.unflatten(0, (3, embed_dim)).unbind(0))
    biases = (None, None, None) if bias is None else bias.unflatten(0, (3, embed_dim)).unbind(0)
    return [F.linear(x, w, b) for x, w, b in zip(inputs, separate, biases, strict=True)]  # type: ignore[arg-type]


def multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int, in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None, add_zero_attn: bool, dropout_p: float,
    out_proj_weight: Tensor, out_proj_bias: Tensor | None, training: bool = True, key_padding_mask: Tensor | None = None,
    need_weights: bool = True, attn_mask: Tensor | None = None, use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None, k_proj_weight: Tensor | None = None, v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None, static_v: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
) -> tuple[Tensor, Tensor | None] | None:  # fmt: skip
    """Return (output, weights or None) as `F.multi_head_attention_forward` does; None for a case that is not written here."""
    rare: list[Any] = [bias_k, bias_v, static_k, static_v, add_zero_attn or None, (training and dropout_p > 0) or None]
    if any(r is not None for r in rare) or any(x.is_nested for x in (query, key, value)):
        return None
    batched = query.dim() == 3
    if not batched:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
    target, batch, embed_dim = query.shape
    if embed_dim != embed_dim_to_check:
        raise AssertionError(f"was expecting embedding dimension of {embed_dim_to_check}, but got {embed_dim}")
    head_dim = embed_dim // num_heads
    weights = (None if use_separate_proj_weight else in_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight)
    q, k, v = (
        x.view(x.shape[0], x.shape[1], num_heads, head_dim).permute(1, 2, 0, 3)  # [batch, heads, tokens, head_dim]
        for x in _project((query, key, value), embed_dim, weights, in_proj_bias)
    )
    source = k.shape[2]
    mask = _additive(attn_mask, query.dtype)
    if mask is not None and mask.dim() == 3:  # [batch * heads, target, source]
        mask = mask.view(batch, num_heads, target, source)
    padding = _additive(key_padding_mask, query.dtype)
    if padding is not None:
        padding = padding.reshape(batch, 1, 1, source)
        mask = padding if mask is None else mask + padding
    scores = (q * head_dim**-0.5) @ k.transpose(-2, -1)
    attention = F.softmax(scores if mask is None else scores + mask, dim=-1)
    out = (attention @ v).permute(2, 0, 1, 3).reshape(target, batch, embed_dim)
    out = F.linear(out, out_proj_weight, out_proj_bias)
    shown = attention.mean(dim=1) if average_attn_weights else attention
    if not batched:
        out, shown = out.squeeze(1), shown.squeeze(0)
    return out, shown if need_weights else None
