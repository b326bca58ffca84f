"""Padding a batch changes no scale: decoders, encoders, encoder-decoders, and routed experts."""

from __future__ import annotations

import inspect

import hf_zoo as zoo
import pytest
import torch

import modelopt.torch.quantization as mtq
from modelopt.torch.quantization.presets import get_config, update_quant_cfg_with_kv_cache_quant

PAD = 2  # a token of no batch, whose embedding is far from any other
FAMILIES = ["llama", "gpt2", "gemma3", "bert", "mixtral", "deepseek_v3", "gpt_oss", "llama4", "dbrx", "whisper", "t5"]


def scales(name, batch):
    model = zoo.build(name)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.num_embeddings == zoo.VOCAB:
                module.weight[PAD] = 0
                module.weight[PAD, 0] = 100  # large in one channel, and so it stays behind a norm
    config = update_quant_cfg_with_kv_cache_quant(get_config("fp8"), "fp8")
    mtq.quantize(model, config, [batch])
    return {n: q.amax for n, q in model.named_modules() if isinstance(q, mtq.nn.TensorQuantizer) and q.enabled}


def padded(ids, left, count=5):
    pad = torch.full((ids.shape[0], count), PAD)
    join = (lambda a, b: torch.cat([b, a], 1)) if left else (lambda a, b: torch.cat([a, b], 1))
    return join(ids, pad), join(torch.ones_like(ids), torch.zeros_like(pad))


def assert_same(one, two):
    assert one.keys() == two.keys()
    worst = {n: float(((one[n] - two[n]).abs() / one[n]).max()) for n in one}
    assert {n: w for n, w in worst.items() if not w <= 1e-5} == {}


def padded_batch(name, left):
    batch = zoo.inputs(name)
    prefix = "decoder_" if "decoder_input_ids" in batch else ""
    key, mask, positions = (prefix + part for part in ("input_ids", "attention_mask", "position_ids"))
    batch[key], batch[mask] = padded(batch[key], left)
    if left and positions in inspect.signature(type(zoo.build(name)).forward).parameters:
        batch[positions] = (batch[mask].cumsum(1) - 1).clamp(min=0)
    return batch, mask


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_padding_changes_no_scale(name, left):
    if name == "t5" and left:
        pytest.skip("its relative positions are those of the padded sequence, so that decoder states differ")
    batch, mask = padded_batch(name, left)
    plain = scales(name, zoo.inputs(name))
    assert_same(plain, scales(name, batch))
    del batch[mask]
    unmasked = scales(name, batch)  # without its mask, padding is data: the test can fail
    assert any(float(unmasked[n].max()) > 1.5 * float(plain[n].max()) for n in plain)


@pytest.mark.parametrize("lengths", [(5, 5), (5, 3)])
def test_an_encoder_and_a_decoder_padded_at_once(lengths):
    batch = zoo.inputs("t5")
    plain = scales("t5", batch)
    ids, mask = padded(batch["input_ids"], False, lengths[0])
    decoder_ids, decoder_mask = padded(batch["decoder_input_ids"], False, lengths[1])
    # the mask of one half kept apart from that of the other: the first row is padded more in the encoder
    both = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder_ids, "decoder_attention_mask": decoder_mask}
    assert_same(plain, scales("t5", both))


def test_masks_of_equal_shape_are_told_apart():
    batch = {**zoo.inputs("t5"), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    batch["attention_mask"][:, 5:] = 0
    short = {**zoo.inputs("t5"), "input_ids": zoo.inputs("t5")["input_ids"][:, :5]}
    assert_same(scales("t5", short), scales("t5", batch))
