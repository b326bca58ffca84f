"""Tokens per second at batch 1 of compressed models against bf16: `python -m benchmarks.generate [--model NAME] [--json FILE]`.

A model with random weights is built from a configuration (Llama-3-8B, or SmolLM2 with 135 M parameters), its weights quantized
and packed by `compress`. "graph": one decoding step over a static cache is captured in a CUDA graph and replayed
(attention mask, position and next token are computed inside). "generate": transformers' own loop, no graph. The head stays bf16.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import modelopt.torch.quantization as mtq

MODELS: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}
WEIGHTS = {
    "bf16": "",
    "INT4 g128": "i4[128]*f32",
    "INT8": "i8[1,...]*f32",
    "FP8": "e4m3[...]*f32",
    "NVFP4": "e2m1[16]~*e4m3[...]*f32",
}
CACHE = 256


def build(name: str) -> torch.nn.Module:
    """Return a model with random weights in bfloat16 on the GPU."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(LlamaConfig(max_position_embeddings=2048, **MODELS[name])).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def graph_tokens(model: Any, steps: int) -> float:
    """Return tokens per second of a captured decoding step, from position 16 on."""
    cache = StaticCache(config=model.config, max_cache_len=CACHE)
    prompt = torch.randint(0, 1000, (1, 16), device="cuda")
    token, at, columns = prompt[:, -1:].clone(), torch.full((1, 1), 16, device="cuda"), torch.arange(CACHE, device="cuda")

    def step() -> None:
        mask = (columns <= at)[None, None]
        out = model(token, past_key_values=cache, position_ids=at, attention_mask=mask, use_cache=True)
        token.copy_(out.logits[:, -1].argmax(-1, keepdim=True))
        at.add_(1)

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream), torch.no_grad():
        model(prompt, past_key_values=cache, position_ids=torch.arange(16, device="cuda")[None], use_cache=True)
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            step()
        graph.replay()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            graph.replay()
        torch.cuda.synchronize()
    return steps / (time.perf_counter() - begin)


def loop_tokens(model: Any, steps: int) -> float:
    """Return tokens per second of `model.generate`."""
    prompt = torch.randint(0, 1000, (1, 16), device="cuda")
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    model.generate(prompt, max_new_tokens=4, min_new_tokens=4, **options)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    model.generate(prompt, max_new_tokens=steps, min_new_tokens=steps, **options)
    torch.cuda.synchronize()
    return steps / (time.perf_counter() - begin)


def measure(name: str, scheme: str, steps: int) -> dict[str, Any]:
    """Return one record: tokens per second, memory, and seconds to quantize and pack."""
    model = build(name)
    begin = time.perf_counter()
    if WEIGHTS[scheme]:
        weights = {"*weight_quantizer": {"format": WEIGHTS[scheme]}, "*lm_head*": {"enable": False}}
        mtq.quantize(model, {"quant_cfg": weights, "algorithm": "max"})
        mtq.compress(model)
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    gc.collect()
    torch.cuda.empty_cache()
    record = {"model": name, "scheme": scheme, "GiB": torch.cuda.memory_allocated() / 2**30, "quantize_s": seconds}
    record["graph"] = graph_tokens(model, steps)
    record["generate"] = loop_tokens(model, min(steps, 32))
    return record


def main() -> None:
    """Measure, print one line for each scheme, and write JSON."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", action="append", choices=sorted(MODELS))
    options.add_argument("--scheme", action="append", choices=list(WEIGHTS))
    options.add_argument("--steps", type=int, default=128)
    options.add_argument("--json", default="")
    chosen = options.parse_args()
    records: list[dict[str, Any]] = []
    for name in chosen.model or MODELS:
        for scheme in chosen.scheme or WEIGHTS:
            record = measure(name, scheme, chosen.steps)
            records.append(record)
            base = next((r for r in records if r["model"] == name and r["scheme"] == "bf16"), record)
            ratio = record["graph"] / base["graph"]
            print(
                f"{name:14}{scheme:12}{record['GiB']:7.2f} GiB   graph {record['graph']:8.1f} tokens/s ({ratio:.2f}x)"
                f"   generate {record['generate']:7.1f}   packed in {record['quantize_s']:.1f} s",
                flush=True,
            )
            gc.collect()
            torch.cuda.empty_cache()
    if chosen.json:
        os.makedirs(os.path.dirname(chosen.json) or ".", exist_ok=True)
        with open(chosen.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "records": records}, file, indent=1)


if __name__ == "__main__":
    main()
