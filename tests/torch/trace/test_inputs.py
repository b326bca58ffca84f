"""Inputs: the forms that are accepted, the guesses, and the errors that say what to pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modelopt.core.errors import TraceError
from modelopt.torch.trace.inputs import normalize_inputs, resolve_inputs, run
from tests.torch.trace.models import Classic

X = torch.ones(1)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (X, ((X,), {})),
        ((X, X), ((X, X), {})),
        ([X], ((X,), {})),
        ({"x": X}, ((), {"x": X})),
        (((X,), {"mask": X}), ((X,), {"mask": X})),
        ((X, {"mask": X}), ((X,), {"mask": X})),
        ((), ((), {})),
    ],
)
def test_forms(given, wanted):
    assert normalize_inputs(given) == wanted


def test_a_form_that_is_none():
    with pytest.raises(TraceError, match="are a int.*dummy_input"):
        normalize_inputs(3)


@pytest.mark.parametrize(
    "model",
    [
        Classic(),
        nn.Linear(5, 2),
        nn.Sequential(nn.Conv1d(4, 4, 3), nn.ReLU()),
        nn.Sequential(nn.Conv3d(2, 4, 3)),
        nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10)),
        nn.LSTM(6, 4),
        nn.LayerNorm(7),
        nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(1, 4, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 12 * 12, 10)),
    ],
    ids=lambda m: type(m).__name__,
)
def test_guesses_for_plain_modules(model):
    run(model.eval(), resolve_inputs(model))


@pytest.mark.parametrize("name", ["Llama", "Bert", "T5", "ViT", "CLIP", "Whisper", "Wav2Vec2", "ResNet"])
def test_guesses_for_transformers(name):
    transformers = pytest.importorskip("transformers")
    tiny = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = dict(tiny, vocab_size=64, eos_token_id=2, bos_token_id=1, pad_token_id=0)
    vision = dict(tiny, image_size=32, patch_size=16)
    made = {
        "Llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**text)),
        "Bert": lambda t: t.BertForMaskedLM(t.BertConfig(**text)),
        "T5": lambda t: t.T5ForConditionalGeneration(t.T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)),
        "ViT": lambda t: t.ViTForImageClassification(t.ViTConfig(**vision)),
        "CLIP": lambda t: t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)),
        "Whisper": lambda t: t.WhisperForConditionalGeneration(
            t.WhisperConfig(
                d_model=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                vocab_size=64,
                max_source_positions=16,
                num_mel_bins=8,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
            )  # fmt: skip
        ),
        "Wav2Vec2": lambda t: t.Wav2Vec2ForCTC(t.Wav2Vec2Config(**tiny, vocab_size=32)),
        "ResNet": lambda t: t.ResNetForImageClassification(
            t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
        ),
    }
    model = made[name](transformers).eval()
    run(model, resolve_inputs(model))


def test_guess_is_the_same_every_time():
    first, second = resolve_inputs(nn.Linear(4, 4)), resolve_inputs(nn.Linear(4, 4))
    assert torch.equal(first[0][0], second[0][0])


def test_inputs_that_cannot_be_guessed():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x, mask):
            return x * self.scale * mask

    with pytest.raises(TraceError, match=r"guessed for a Two\(x, mask\).*dummy_input"):
        resolve_inputs(Two())


def test_guesses_that_all_fail_show_the_models_own_error():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            raise ValueError("only on Sundays")

    with pytest.raises(TraceError, match=r"float32\[1, 3, 32, 32\].*ValueError: only on Sundays.*dummy_input"):
        resolve_inputs(Picky())


def test_a_model_that_fails_says_what_was_passed():
    with pytest.raises(TraceError, match=r"Linear fails on these inputs. float32\[2, 3\].*RuntimeError"):
        run(nn.Linear(4, 4), ((torch.ones(2, 3),), {}))
