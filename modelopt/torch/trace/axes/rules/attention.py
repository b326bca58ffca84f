"""Fused attention: q [B, H, L, E], k [B, Hk, S, E], v [B, Hk, S, V] -> [B, H, L, V]; Hk divides H for grouped queries."""

from __future__ import annotations

from modelopt.torch.trace.axes.rules.contraction import contract
from modelopt.torch.trace.axes.rules.registry import Axes, Call, register_rule


@register_rule(
    "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable", "aten::_scaled_dot_product_attention_math",
    "aten::scaled_dot_product_attention", "aten::_scaled_dot_product_attention_math_for_mps",
)  # fmt: skip
def attention(call: Call) -> Axes:
    query, key, value = call.args[:3]
    q, k, v = call.axes(query), call.axes(key), call.axes(value)
    rank = query.dim()
    contract(call, q[-1], k[-1], query, key, None, None)
    call.unify(k[-2], v[-2])
    call.freeze(k[-2], "softmax over the keys")
    for d in range(rank - 2):
        call.unify(k[d], v[d])
        if query.shape[d] == key.shape[d]:
            call.unify(q[d], k[d])
        elif key.shape[d] > 1:
            call.unify(call.factor(q[d], (key.shape[d], query.shape[d] // key.shape[d]))[0], k[d])
    mask = call.arg(3, "attn_mask") if call.name.endswith("attention") else call.kwargs.get("attn_mask")
    scores = [*q[:-1], k[-2]]
    if hasattr(mask, "shape"):
        known = call.axes(mask)
        for d in range(1, mask.dim() + 1):
            if mask.shape[-d] > 1:
                call.unify(scores[-d], known[-d])
    for other in call.outputs()[1:]:
        call.set(other, [None] * other.dim())
    return [*q[:-1], v[-1]]
