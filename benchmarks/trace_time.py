"""CPU seconds and peak memory of axis inference on full-size models, each in a fresh process (`trace_coverage --time`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TIMM = {"ResNet-50": "resnet50", "ViT-B/16": "vit_base_patch16_224", "DenseNet-121": "densenet121",
        "Swin-T": "swin_tiny_patch4_window7_224", "ConvNeXt-B": "convnext_base"}  # fmt: skip
SIZES = "hidden_size={}, intermediate_size={}, num_hidden_layers={}, num_attention_heads={}, num_key_value_heads=8, vocab_size={}"
LLAMA, MIXTRAL = f"LlamaConfig({SIZES})", f"MixtralConfig({SIZES})"
CONFIGS = {
    "Llama-3.1-8B, 32 layers, no weights": LLAMA.format(4096, 14336, 32, 32, 128256),
    "70B (Llama-3.1), 80 layers, no weights": LLAMA.format(8192, 28672, 80, 64, 128256),
    "Mixtral 8x22B, 56 layers, no weights": MIXTRAL.format(6144, 16384, 56, 48, 32768),
}
PROBE = """
import os, json, resource, time, warnings
warnings.filterwarnings("ignore")
os.environ["TIMM_FUSED_ATTN"] = "0"
import torch
torch.set_num_threads(1)
IMPORT
from modelopt.torch.trace.axes import infer_axes
with torch.device("DEVICE"):
    model = (BUILD).eval()
    inputs = INPUTS
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.process_time()
axes = infer_axes(model, *inputs)
families = len(axes.families)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([time.process_time() - start, peak / 1024, memory / 1024, families]))
"""


def measure(what: str, setup: str, create: str, inputs: str, device: str) -> dict[str, object]:
    """Run one model in a fresh process."""
    code = PROBE.replace("IMPORT", setup).replace("BUILD", create).replace("INPUTS", inputs).replace("DEVICE", device)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"model": what, "failed": done.stderr.strip().splitlines()[-1][:300]}
    seconds, peak, before, families = json.loads(done.stdout.strip().splitlines()[-1])
    return {"model": what, "cpu_s": round(seconds, 2), "peak_mb": round(peak), "before_mb": round(before), "families": families}


def main(path: Path | None = None) -> None:
    """Print the table, and write it as JSON."""
    guard = "from benchmarks.zoo.guard import declare_torchvision_ops\ndeclare_torchvision_ops()\n"
    rows = []
    print("| model | CPU s after imports | peak memory, MB | of it before the trace | families |\n|---|---|---|---|---|")
    jobs = [
        (k, guard + "import timm", f"timm.create_model({v!r})", "((torch.randn(1, 3, 224, 224),),)", "cpu")
        for k, v in TIMM.items()
    ]
    for what, config in CONFIGS.items():
        kind = config.split("Config")[0]
        setup = guard + f"from transformers import {kind}Config, {kind}ForCausalLM"
        create = f"{kind}ForCausalLM._from_config({config}, attn_implementation='eager')"
        jobs.append((what, setup, create, "((), dict(input_ids=torch.zeros(1, 8, dtype=torch.long), use_cache=False))", "meta"))
    for job in jobs:
        row = measure(*job)
        rows.append(row)
        print(
            "| "
            + " | ".join(str(row.get(k, "")) for k in ("model", "cpu_s", "peak_mb", "before_mb", "families"))
            + f" | {row.get('failed', '')}"
        )
    if path:
        path.write_text(json.dumps(rows, indent=1))
