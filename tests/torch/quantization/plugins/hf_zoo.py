"""Tiny transformers models of many families, with random weights; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

VOCAB = 96
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
Inputs = dict[str, Tensor]


def tokens(batch: int = 2, length: int = 8, seed: int = 0) -> Tensor:
    """Return token ids [batch, length], none of which is special."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def _decoder(name: str, **changes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(**{**TEXT, **changes})
        if hasattr(transformers, f"{name}ForCausalLM"):
            return getattr(transformers, f"{name}ForCausalLM")(config)
        return getattr(transformers, f"{name}LMHeadModel")(config)

    return make


def _gemma3() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(Gemma3TextConfig(**TEXT, head_dim=16, sliding_window=16))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64))


def _llama4() -> nn.Module:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    kept = {k: v for k, v in TEXT.items() if k != "intermediate_size"}
    return Llama4ForCausalLM(
        Llama4TextConfig(
            **kept,
            intermediate_size=64,
            intermediate_size_mlp=128,
            num_local_experts=4,
            num_experts_per_tok=1,
            head_dim=16,
            attention_chunk_size=32,
        )
    )


def _dbrx() -> nn.Module:
    from transformers import DbrxConfig, DbrxForCausalLM

    return DbrxForCausalLM(
        DbrxConfig(
            d_model=64,
            n_heads=4,
            n_layers=2,
            max_seq_len=64,
            vocab_size=VOCAB,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
        )
    )


def _jetmoe() -> nn.Module:
    from transformers import JetMoeConfig, JetMoeForCausalLM

    return JetMoeForCausalLM(
        JetMoeConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            num_hidden_layers=2,
            num_key_value_heads=2,
            kv_channels=32,
            intermediate_size=64,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=64,
        )
    )


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    kept = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    return BertForMaskedLM(BertConfig(**kept))


def _whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=VOCAB,
            num_mel_bins=16,
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            max_source_positions=16,
            max_target_positions=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    )


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            pad_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=0,
        )
    )


_MOE = {"num_experts_per_tok": 2}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": _decoder("Llama"),
    "qwen3": _decoder("Qwen3", head_dim=16),
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "phi3": _decoder("Phi3"),
    "mamba": _decoder("Mamba", state_size=8),
    "mixtral": _decoder("Mixtral", num_local_experts=4, **_MOE),
    "qwen3_moe": _decoder("Qwen3Moe", num_experts=4, moe_intermediate_size=64, head_dim=16, **_MOE),
    "deepseek_v3": _decoder(
        "DeepseekV3",
        moe_intermediate_size=64,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=32,
        q_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        num_key_value_heads=4,
        **_MOE,
    ),
    "gpt_oss": _decoder("GptOss", intermediate_size=64, num_local_experts=4, head_dim=16, sliding_window=16, **_MOE),
    "llama4": _llama4,
    "dbrx": _dbrx,
    "jetmoe": _jetmoe,
    "bert": _bert,
    "whisper": _whisper,
    "t5": _t5,
}


def build(name: str, seed: int = 0) -> nn.Module:
    """Return the model called `name`, in evaluation mode. Experts' parameters get values where the family leaves them zero."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2 and not bool(parameter.any()):
                parameter.normal_(0, 0.02)
    return model


def inputs(name: str, batch: int = 2, length: int = 8, seed: int = 0) -> Inputs:
    """Return what the model called `name` takes."""
    ids = tokens(batch, length, seed)
    if name == "whisper":
        features = torch.randn(batch, 16, 32, generator=torch.Generator().manual_seed(seed))
        return {"input_features": features, "decoder_input_ids": ids}
    if name == "t5":
        return {"input_ids": ids, "decoder_input_ids": tokens(batch, length, seed + 1)}
    return {"input_ids": ids}


def logits(model: nn.Module, batch: Inputs) -> Tensor:
    """Return the logits [B, T, V]."""
    with torch.no_grad():
        return model(**batch).logits
