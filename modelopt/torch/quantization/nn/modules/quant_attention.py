"""Quantized nn.MultiheadAttention: the projections that it computes without calling a module are quantized too.

    q, k, v = input_quantizer(query), ... times weight_quantizer(W_in);   y = out_proj(attention(q, k, v))

`out_proj` is a Linear child whose forward the original never calls; here it is called, so its own quantizers act.
While quantized, `_qkv_same_embed_dim` is False: by that switch nn.TransformerEncoderLayer leaves its fused path, which reads the
weights directly and would pass every quantizer by in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelopt.torch.quantization.nn.modules.quant_module import QuantModule, quantizes

_INPUTS = {"q_proj_weight": "query", "k_proj_weight": "key", "v_proj_weight": "value"}


def _projections(module: nn.Module) -> list[str]:
    names = ("in_proj_weight", *_INPUTS)
    return [name for name in names if module._parameters.get(name) is not None]


def _quantizer_of(name: str) -> str:
    return "weight_quantizer" if name == "in_proj_weight" else f"{name.removesuffix('_weight')}_weight_quantizer"


@quantizes(nn.MultiheadAttention)
class QuantMultiheadAttention(QuantModule, nn.MultiheadAttention):
    """nn.MultiheadAttention with quantized inputs and projections."""

    counts_in_coverage = True

    @classmethod
    def quantizers_of(cls, module: nn.Module) -> tuple[str, ...]:
        """One quantizer for query, key and value, one for each projection weight."""
        return "input_quantizer", *(_quantizer_of(name) for name in _projections(module)), "output_quantizer"

    @classmethod
    def weights_of(cls, module: nn.Module) -> Iterator[tuple[str, str, Tensor, int | None]]:
        """Yield in_proj_weight [3 * embed, embed], or the three separate projections."""
        for name in _projections(module):
            yield _quantizer_of(name), name, getattr(module, name), None

    def setup_quantizers(self) -> None:
        """Add the quantizers and leave the fused path."""
        super().setup_quantizers()
        self._qkv_same_embed_dim = False

    def remove_quantizers(self) -> None:
        """Remove the quantizers and allow the fused path again."""
        super().remove_quantizers()
        self._qkv_same_embed_dim = self._parameters.get("in_proj_weight") is not None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Same arguments and results as nn.MultiheadAttention."""
        inputs = _each_once(self.input_quantizer, (query, key, value))
        if self.batch_first and query.dim() == 3:
            inputs = _each_once(lambda x: x.transpose(0, 1), inputs)
        weights: dict[str, Any] = {"q_proj_weight": None, "k_proj_weight": None, "v_proj_weight": None}
        for name in _projections(self):
            weights[name] = self.quantized(name, _quantizer_of(name))
        in_proj = weights.pop("in_proj_weight", None)
        mixed, attention = F.multi_head_attention_forward(
            *inputs,
            self.embed_dim,
            self.num_heads,
            in_proj,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            # An identity in place of out_proj gives the mixed values themselves, exactly; out_proj is then called as a module.
            torch.eye(self.embed_dim, dtype=query.dtype, device=query.device),
            None,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=in_proj is None,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
            **weights,
        )
        output = self.output_quantizer(self.out_proj(mixed))
        return (output.transpose(0, 1) if self.batch_first and output.dim() == 3 else output), attention


def _each_once(fn: Any, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Apply `fn` once to each distinct tensor, so that self-attention stays recognizable by identity."""
    done = {id(t): fn(t) for t in tensors}
    return tuple(done[id(t)] for t in tensors)
