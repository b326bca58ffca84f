"""A tiny Llama, quantized with any preset on random tokens."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")


def make_llama(dtype: torch.dtype = torch.float32, tie: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=64,
        tie_word_embeddings=tie,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # stays float32 in a model that was loaded, too
    return model


@pytest.fixture(autouse=True, scope="session")
def _two_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    return (torch.arange(64) * 7919 % 256).reshape(2, 32)


@pytest.fixture
def llama():
    return make_llama


@pytest.fixture(scope="session")
def quantized(ids):
    """quantized(preset or config, dtype=...) -> a quantized tiny Llama, made once for each."""
    import modelopt.torch.quantization as mtq

    made: dict = {}

    def make(config, dtype=torch.float32, **kwargs):
        key = (str(config), dtype, str(kwargs))
        if key not in made:
            model = make_llama(dtype, **kwargs)
            made[key] = mtq.quantize(model, config, forward_loop=lambda m: m(input_ids=ids))
        return made[key]

    return make
