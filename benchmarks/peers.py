"""Other libraries on the shapes of `benchmarks.linear`: `python -m benchmarks.peers [--nvidia-modelopt DIR] [--json FILE]`.

torchao and gemlite are measured where they can be imported, each in its fastest layout for the format, without `torch.compile`,
in CUDA graphs, with copies of the weight in turn; quantizing the input is included. gemlite tunes itself at the first call of
every shape, for seconds, which are not in the figures. nvidia-modelopt has this library's import name, so a process of its own
measures it: DIR is where it is installed (`pip install --no-deps --target DIR nvidia-modelopt`, and what it imports).
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import measure

SHAPES = ((14336, 4096), (4096, 14336))
ROWS = (1, 16, 64, 1024)
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, ImportError, AssertionError, LookupError)  # of other libraries
Layer = Callable[[Tensor], Tensor]


def torchao_cases() -> dict[str, Callable[[Tensor], Layer]]:
    """Return case -> (weight -> layer) of torchao."""
    q = importlib.import_module("torchao.quantization")

    def layer(config: Callable[[], Any], weight: Tensor) -> Layer:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
        q.quantize_(linear, config())
        return linear

    configs: dict[str, Callable[[], Any]] = {
        "INT4 g128": lambda: q.Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"),
        "INT8": lambda: q.Int8WeightOnlyConfig(),
        "FP8 x FP8 per channel and token": lambda: q.Float8DynamicActivationFloat8WeightConfig(granularity=q.PerRow()),
        "INT8 x INT8 per channel and token": lambda: q.Int8DynamicActivationInt8WeightConfig(),
    }
    return {f"torchao, {name}": functools.partial(layer, config) for name, config in configs.items()}


def gemlite_cases() -> dict[str, Callable[[Tensor], Layer]]:
    """Return case -> (weight -> layer) of gemlite."""
    helper = importlib.import_module("gemlite.helper")

    def grouped(weight: Tensor) -> Layer:
        blocks = weight.float().reshape(-1, 128)
        scales = (blocks.abs().amax(1, keepdim=True) / 7).to(weight.dtype)
        codes = ((blocks / scales.float()).round().clamp(-8, 7) + 8).to(torch.uint8).reshape(weight.shape)
        return helper.A16Wn(device="cuda", dtype=weight.dtype).from_weights(codes, scales, torch.full_like(scales, 8), 4, 128)

    def by_row(kind: str, weight: Tensor) -> Layer:
        return getattr(helper, kind)(device="cuda", dtype=weight.dtype).from_weights(weight.clone())

    kinds = {
        "INT8": "A16W8_INT8",
        "FP8 x FP8 per channel and token": "A8W8_fp8_dynamic",
        "INT8 x INT8 per channel and token": "A8W8_int8_dynamic",
    }
    return {"gemlite, INT4 g128": grouped, **{f"gemlite, {n}": functools.partial(by_row, k) for n, k in kinds.items()}}


PEERS = {"torchao": torchao_cases, "gemlite": gemlite_cases}


def rows_of(
    shapes: tuple[tuple[int, int], ...],
    rows: tuple[int, ...],
    only: tuple[str, ...] = (),
    keep: Callable[[list[dict[str, Any]]], None] = lambda records: None,
) -> list[dict[str, Any]]:
    """Measure every peer that can be imported; a case that fails has the reason instead of a time. `keep` takes what is there."""
    found: list[dict[str, Any]] = []
    random = torch.Generator("cuda").manual_seed(0)  # not the default one, which a capture that fails leaves unusable
    draw = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16, generator=random)
    for peer, cases_of in PEERS.items():
        if importlib.util.find_spec(peer) is None:
            print(f"{peer} cannot be imported")
            continue
        try:
            cases = cases_of()
        except FAILURES as error:
            print(f"{peer} cannot be imported: {error}")
            continue
        for n, k in shapes:
            dense = [draw(n, k) * 0.02 for _ in range(4)]
            inputs = {m: draw(m, k) for m in rows}
            base = {
                m: measure([functools.partial(F.linear, x, w) for w in dense], 12 if m > 64 else 24) for m, x in inputs.items()
            }
            for name, make in cases.items():
                if only and not any(part in name for part in only):
                    continue
                found += _case(name, make, dense, inputs, base)
                keep(found)
    return found


def _case(
    name: str, make: Callable[[Tensor], Layer], dense: list[Tensor], inputs: dict[int, Tensor], base: dict[int, float]
) -> list[dict[str, Any]]:
    (n, k), found = dense[0].shape, []
    for m, x in inputs.items():
        record: dict[str, Any] = {"case": name, "N": n, "K": k, "M": m, "bf16": base[m]}
        try:
            layers = [make(w) for w in dense]
            with torch.no_grad():
                difference = (layers[0](x).float() - F.linear(x, dense[0]).float()).norm() / F.linear(x, dense[0]).float().norm()
                us = measure([functools.partial(layer, x) for layer in layers], len(layers) * (1 if m > 64 else 4))
            record |= {"us": us, "ratio": base[m] / us, "difference": difference.item()}
        except FAILURES as error:
            record["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        print(record, flush=True)
        found.append(record)
    return found


def nvidia_modelopt(directory: str, size: int, formats: list[str]) -> list[dict[str, Any]]:
    """Measure nvidia-modelopt, installed in `directory`, in a process whose path has it and not this library."""
    script = pathlib.Path(__file__).with_name("peer_modelopt.py")
    with tempfile.TemporaryDirectory() as elsewhere:
        out = os.path.join(elsewhere, "out.json")
        paths = [os.path.abspath(directory), *(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)]
        here = pathlib.Path(__file__).resolve().parent.parent
        kept = [p for p in paths if pathlib.Path(p).resolve() != here]
        command = [sys.executable, "-P", str(script), out, str(size), *formats]  # -P: the script's folder shadows nothing
        ended = subprocess.run(command, cwd=elsewhere, env={**os.environ, "PYTHONPATH": os.pathsep.join(kept)}, check=False)
        found: list[dict[str, Any]] = []
        if os.path.exists(out):
            with open(out) as file:
                found = json.load(file)
        if ended.returncode:
            found.append({"case": "nvidia-modelopt", "failed": f"its process ended with {ended.returncode}"})
            print(found[-1])
        return found


def main() -> None:
    """Measure, print the records, and write them as JSON."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--nvidia-modelopt", default="", metavar="DIR", help="where nvidia-modelopt is installed")
    options.add_argument("--size", type=int, default=16384, help="rows and columns of its tensor")
    options.add_argument("--format", action="append", help="only these formats of it (it compiles for a minute for most)")
    options.add_argument("--rows", type=int, action="append", help="only these numbers of rows")
    options.add_argument("--case", action="append", help="only these cases (a part of the name)")
    options.add_argument("--json", default="", help="where to write the records")
    chosen = options.parse_args()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")

    def write(records: list[dict[str, Any]]) -> None:
        if chosen.json:
            with open(chosen.json, "w") as file:
                json.dump(
                    {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "records": records}, file, indent=1
                )

    records = rows_of(SHAPES, tuple(chosen.rows or ROWS), tuple(chosen.case or ()), write)
    if chosen.nvidia_modelopt:
        records += nvidia_modelopt(chosen.nvidia_modelopt, chosen.size, chosen.format or [])
    write(records)


if __name__ == "__main__":
    main()
