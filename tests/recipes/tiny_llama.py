"""Models small enough for tests of whole jobs, with a tokenizer of single bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def write_tiny(path: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """Write a random Llama; `changes` go into its configuration."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = {**sizes, "num_key_value_heads": 2, "vocab_size": 260, "max_position_embeddings": 512, **changes}
    config = transformers.LlamaConfig(**settings, bos_token_id=256, eos_token_id=257, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(path)
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path
