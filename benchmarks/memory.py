"""What quantizing and exporting need beside the model: peak resident memory over the loaded model, against the stated bound.

    python -m benchmarks.memory

The bound is the largest layer plus 10 % of the model. Each case runs in a process of its own: a model with one Linear of
8192 x 8192 among smaller ones is built, one forward pass is made, and the high-water mark of what follows is read.
"""

from __future__ import annotations

import json
import subprocess
import sys

CASE = """
import json, re, tempfile, torch, torch.nn as nn
torch.set_num_threads(1)
import modelopt.torch.quantization as mtq
from modelopt.torch import kernels
def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
def reset():
    open("/proc/self/clear_refs", "w").write("5")
dtype = torch.DTYPE
model = nn.Sequential(nn.Linear(8192, 8192), nn.Linear(8192, 1024), nn.Linear(1024, 1024)).to(dtype).eval()
x = torch.randn(4, 8192, dtype=dtype)
warm = mtq.quantize(nn.Sequential(nn.Linear(256, 256)).to(dtype), FORMAT, forward_loop=[x[:, :256]])   # imports and thread pools
with torch.no_grad():
    model(x)
reset()
before = status("VmRSS")
mtq.quantize(model, FORMAT, forward_loop=[x])
size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
largest = max(p.numel() * p.element_size() for p in model.parameters()) / 2**20
print(json.dumps([status("VmHWM") - before, largest + 0.1 * size, size]))
"""
CASES = {
    "INT8 per channel, static inputs": "mtq.INT8_DEFAULT_CFG",
    "FP8": "mtq.FP8_DEFAULT_CFG",
    "INT4 block 128": "mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "INT4 with zero point": '{"quant_cfg": {"*weight_quantizer": {"format": "u4[64]*f32+u4"}}, "algorithm": "max"}',
    "NVFP4": "mtq.NVFP4_DEFAULT_CFG",
    "NVFP4, scales by squared error": "mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG",
    "MXFP8": "mtq.MXFP8_DEFAULT_CFG",
}


def measure(config: str, dtype: str) -> tuple[float, float, float]:
    """Return (peak MB over the model, bound in MB, model in MB)."""
    code = CASE.replace("FORMAT", config).replace("DTYPE", dtype)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(run.stderr)
    extra, bound, size = json.loads(run.stdout.splitlines()[-1])
    return extra, bound, size


def main() -> None:
    print("| quantize | dtype | model, MiB | peak beside it, MiB | bound, MiB |\n|---|---|---|---|---|")
    for label, config in CASES.items():
        for dtype in ("float32", "bfloat16"):
            extra, bound, size = measure(config, dtype)
            print(f"| {label} | {dtype} | {size:.0f} | {extra:.0f} | {bound:.0f} |", flush=True)


if __name__ == "__main__":
    main()
