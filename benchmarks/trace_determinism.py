"""The same families whatever the hash seed and the order in which modules and parameters were registered.

python -m benchmarks.trace_determinism [--list plain|zoo|further|all] [--only PATTERN]

Each model is analysed in fresh processes: twice with different values of PYTHONHASHSEED, and once with the registration order of
every module shuffled (containers that run their children in order are left alone). Every family is compared, slot by slot.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import random
import subprocess
import sys

import torch
from torch import nn

from benchmarks.zoo import build, missing, names

DEFAULT = ["mlp", "residual", "attention", "mha", "lstm"]
ORDERED = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList)


def shuffle(model: nn.Module, seed: int = 1) -> None:
    """Shuffle the order of registration in place."""
    rng = random.Random(seed)
    for module in list(model.modules()):
        if isinstance(module, ORDERED):
            continue
        for table in (module._modules, module._parameters, module._buffers):
            items = list(table.items())
            rng.shuffle(items)
            table.clear()
            table.update(items)


def fingerprint(kind: str, name: str, shuffled: bool) -> str:
    """Return the digest of all families of a model."""
    from modelopt.torch.trace.axes import infer_axes

    example = build(kind, name)
    if shuffled:
        shuffle(example.model)
    axes = infer_axes(example.model, example.args, example.kwargs)
    rows = [
        [f.name, f.kind, f.size, f.soft, [[s.parameter, s.dim, [list(map(int, p)) for p in s.positions]] for s in f.slots]]
        for f in axes.families
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def child(models: list[list[str]], shuffled: bool) -> None:
    """Print the digests of several models as JSON."""
    torch.set_num_threads(1)
    print(json.dumps({f"{kind}/{name}": fingerprint(kind, name, shuffled) for kind, name in models}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", default="plain", choices=["plain", "zoo", "further", "all"])
    parser.add_argument("--only", default="*")
    args = parser.parse_args()
    models = [("plain", n) for n in DEFAULT] if args.list == "plain" else names(args.list)
    models = [m for m in models if fnmatch.fnmatch("/".join(m), args.only) and not missing(m[0])]
    digests = []
    for seed, shuffled in (("0", False), ("12345", False), ("7", True)):
        code = f"from benchmarks.trace_determinism import child; child({[list(m) for m in models]!r}, {shuffled})"
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        digests.append(json.loads(done.stdout.strip().splitlines()[-1]))
    same = {name: len({d[name] for d in digests}) == 1 for name in digests[0]}
    for name, equal in same.items():
        print(f"{name:40s} {'same' if equal else 'DIFFERENT: ' + ' '.join(d[name] for d in digests)}")
    print(f"{sum(same.values())} of {len(same)} models: the same families under two hash seeds and a shuffled registration order")


if __name__ == "__main__":
    main()
