"""How much longer calibration takes than the forward passes it needs, on a language model and the CPU.

    python -m benchmarks.calibration [--model DIR] [--layers 2] [--batches 4] [--tokens 512] [--threads 2] [--repeat 3]

Without --model: a Llama of SmolLM2-135M's widths (hidden 576, intermediate 1536, 9 heads, 3 for keys) with few layers and random
weights. Prints a table and returns 1 if some preset costs more than --limit (1.5) times the plain forwards.
The cost of a preset is the whole `quantize` (conversion, forwards, weight scales); "observe" is the calibration of the
activations alone. Best of --repeat runs, alternating with the plain forwards so that both see the same machine.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import modelopt.torch.quantization as mtq
from modelopt.core.plugins import require
from modelopt.torch.quantization import model_calib
from modelopt.torch.quantization.algorithms.base import Job, observe

PRESETS = ("INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG")


def build(directory: str | None, layers: int) -> nn.Module:
    """Return the model in evaluation mode, float32."""
    transformers = require("transformers", "hf")
    if directory:
        return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def seconds(work: Callable[[], Any]) -> float:
    """Return how long `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(model: nn.Module, batches: list[Tensor], preset: str, repeat: int) -> tuple[float, float, float]:
    """Return the best seconds of (plain forwards, whole quantize, observing alone)."""
    config = mtq.QuantizeConfig.parse(getattr(mtq, preset))

    @torch.no_grad()
    def run(m: nn.Module) -> None:
        for batch in batches:
            m(batch)

    plain, whole, alone = [], [], []
    for _ in range(repeat):
        copied = copy.deepcopy(model)
        plain.append(seconds(lambda: run(model)))
        whole.append(seconds(lambda m=copied: mtq.quantize(m, config, run)))
        alone.append(seconds(lambda m=copied: observe(m, Job(run))))
        model_calib.require_calibrated(copied)
    return min(plain), min(whole), min(alone)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--model")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--limit", type=float, default=1.5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model = build(options.model, options.layers)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    torch.manual_seed(1)
    batches = [torch.randint(0, vocabulary, (1, options.tokens)) for _ in range(options.batches)]
    print(f"{'preset':20} {'forward s':>10} {'quantize s':>11} {'ratio':>6} {'observe s':>10} {'ratio':>6}")
    worst = 0.0
    for preset in PRESETS:
        plain, whole, alone = measure(model, batches, preset, options.repeat)
        worst = max(worst, whole / plain)
        print(f"{preset:20} {plain:10.3f} {whole:11.3f} {whole / plain:6.2f} {alone:10.3f} {alone / plain:6.2f}")
    return int(worst > options.limit)


if __name__ == "__main__":
    sys.exit(main())
