"""How many architectures axis inference prunes exactly: half of every family removed, judged by the oracle.

python -m benchmarks.trace_coverage --list zoo|further|all [--only PATTERN] [--jobs 1] [--json FILE [--resume]] [--limit S]
python -m benchmarks.trace_coverage --report FILE [FILE ...] [--markdown docs/trace_coverage.md]       tables of results
python -m benchmarks.trace_coverage --time [--json FILE]                                               full-size models

Every model runs in a process of its own with a limit of CPU seconds. Its families are found on a real forward pass, a seeded half
of each is dropped (no dimension is emptied), sizes that the model's own code cannot follow are given back, a copy is cut, and
`verify_pruning` compares it with the masked dense model in float64 and permutes every family.

    exact | differs (it runs, another function) | refused (nothing changed, with the reason) | noop | timeout | crash:<stage>

timm, torchvision and diffusers are optional (benchmarks/zoo/README.md): models whose packages are missing are skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fnmatch
import importlib
import json
import multiprocessing as mp
import os
import random
import resource
import subprocess
import sys
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from benchmarks.zoo import BUILDERS, Example, build, missing, names
from modelopt.core.errors import ModelOptError

RATIO = 0.5
SHOWN = 8


def choose(axes: Any, ratio: float = RATIO) -> set[int]:
    """Return the atoms to drop: `ratio` of each family, at random by the family's name, with no dimension emptied."""
    drop: set[int] = set()
    for family in axes.families:
        number = int(family.size * ratio)
        drop |= set(random.Random(zlib.crc32(family.name.encode())).sample(list(family.atoms), min(number, family.size - 1)))
    for _ in range(50):
        empty = [
            (name, dim) for name, kept in axes.kept(drop).items() for dim, k in enumerate(kept) if k is not None and not len(k)
        ]
        if not empty:
            break
        for name, dim in empty:  # give back the family whose atoms reach this dimension
            reach = {int(a) for a in axes.axis_atoms(axes.parameters[name][dim])}
            drop -= min(({a for a in f.atoms if a in reach} for f in axes.families), key=lambda s: (not s & drop, len(s)))
    return drop


def num_entries(model: torch.nn.Module) -> int:
    """Return the number of parameters; tied ones count once."""
    return sum(p.numel() for p in model.parameters())


class Stage:
    """The running stage and the CPU seconds of those that are over."""

    def __init__(self) -> None:
        self.name, self.seconds = "build", {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.name, start = name, time.process_time()
        yield
        self.seconds[name] = round(time.process_time() - start, 3)


def judge(kind: str, name: str, row: dict[str, Any], stage: Stage) -> None:
    """Build one model, prune it and fill its row."""
    with stage("build"):
        example = build(kind, name)
        with torch.no_grad():
            example.model(*example.args, **copy.deepcopy(example.kwargs))
    judge_example(example, row, stage)


def judge_example(example: Example, row: dict[str, Any], stage: Stage) -> None:
    """Prune a model and fill its row."""
    from modelopt.torch.prune.verify import verify_pruning
    from modelopt.torch.trace.axes import infer_axes

    row["params"] = num_entries(example.model)
    with stage("graph"):
        row["root_graph"], row["graph_note"] = root_graph(example)
    with stage("trace"):
        axes = infer_axes(example.model, example.args, example.kwargs)
        families = axes.families
    row["families"] = len(families)
    row["unknown_ops"] = dict(axes.unknown_ops)
    row["frozen"] = dict(Counter(f"{f.op}: {f.reason}" for f in axes.frozen).most_common(SHOWN))
    with stage("choose"):
        drop = choose(axes)
    with stage("relax"):
        row["asked"] = len(drop)
        drop, reasons = axes.relax(drop)
        row["dropped"], row["given_back"] = len(drop), [str(r) for r in reasons[:SHOWN]]
    with stage("apply"):
        pruned = copy.deepcopy(example.model)
        axes.apply(pruned, drop)
    row["removed"] = round(1 - num_entries(pruned) / row["params"], 4)
    with stage("verify"):
        inputs = (example.args, example.kwargs)
        report = verify_pruning(example.model, pruned, families, dummy_input=inputs, kept=axes.kept(drop))
    row |= {"error": report.error, "permutation_error": report.permutation_error, "where": report.where, "detail": report.message}
    row["oracle_unknown"] = dict(report.unknown_ops)
    row["status"] = "noop" if not row["removed"] else "exact" if report.exact else "differs"
    if report.error == float("inf") and "does not run" in report.message:
        row["status"] = "crash:forward"


def root_graph(example: Example) -> tuple[bool, str]:
    """Return whether the whole model has one graph, and how it was made or why there is none."""
    from modelopt.torch import trace

    graphs = trace.GraphCollection().recursive_trace(example.model, dummy_input=(example.args, example.kwargs))
    if graphs.is_failed(example.model):
        return False, str(graphs.failure_msg(example.model))[:300]
    return graphs[example.model] is not None, ""


def child(kind: str, name: str, limit: int, pipe: Any) -> None:
    """The process of one model."""
    start = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (start + limit, start + limit + 5))
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    row: dict[str, Any] = {"status": "crash"}
    stage = Stage()
    try:
        judge(kind, name, row, stage)
    except ModelOptError as error:
        row |= {"status": "refused" if stage.name in ("relax", "apply") else f"crash:{stage.name}", "detail": located(error)}
    except Exception as error:  # noqa: BLE001  whatever a foreign model or the code under test raises is the result
        row |= {"status": f"crash:{stage.name}", "detail": located(error)}
    row["cpu"] = stage.seconds
    pipe.send(row)


def located(error: BaseException) -> str:
    """Return an error with the innermost line outside torch."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename.replace("modelopt/torch", "modelopt")] or frames
    text = " ".join(str(error).split())[:400]
    return f"{type(error).__name__}: {text} @ {os.path.basename(own[-1].filename)}:{own[-1].lineno}: {own[-1].line}"


def run(models: list[tuple[str, str]], limit: int, jobs: int, done: Any) -> None:
    """Run every model in its own process, `jobs` at a time; `done(kind, name, row)` gets each result."""
    context = mp.get_context("fork")
    waiting, running = list(models), []
    while waiting or running:
        while waiting and len(running) < jobs:
            kind, name = waiting.pop(0)
            here, there = context.Pipe(False)
            process = context.Process(target=child, args=(kind, name, limit, there), daemon=True)
            process.start()
            there.close()
            running.append((kind, name, process, here, time.time()))
        for item in list(running):
            kind, name, process, here, begun = item
            if here.poll(0.05):
                try:
                    row = here.recv()
                except EOFError:
                    process.join()
                    row = {
                        "status": "timeout" if process.exitcode in (-24, -9) else "crash:killed",
                        "detail": f"exit {process.exitcode}",
                    }
            elif time.time() - begun > 10 * limit:
                row = {"status": "timeout", "detail": "wall time"}
            else:
                continue
            process.kill()
            process.join()
            running.remove(item)
            done(kind, name, row)


def preload(models: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Import the frameworks once, before the forks, and return the models whose packages are here."""
    usable = []
    for kind in dict.fromkeys(k for k, _ in models):
        absent = missing(kind)
        if absent:
            number = sum(k == kind for k, _ in models)
            print(
                f"skipped: {number} models of {kind}, which need {', '.join(absent)}: see benchmarks/zoo/README.md",
                file=sys.stderr,
            )
            continue
        importlib.import_module(f"benchmarks.zoo.{BUILDERS[kind]}")
        usable += [m for m in models if m[0] == kind]
    warm = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
    judge_example(Example(warm, (torch.zeros(1, 2),)), {}, Stage())  # whatever is imported late is imported here
    return usable


def versions() -> dict[str, str]:
    """Return the versions of the packages that the models come from."""
    from importlib import metadata

    found = {}
    for package in ("torch", "transformers", "timm", "torchvision", "diffusers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", default="zoo", choices=["zoo", "further", "all", "plain"])
    parser.add_argument("--only", default="*", help="wildcard on kind/name, e.g. 'hf/*llama*'")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=int, default=90, help="CPU seconds per model")
    parser.add_argument("--json", type=Path, help="write the results here; rows of the same models that it holds are replaced")
    parser.add_argument("--resume", action="store_true", help="leave out the models that the JSON file holds")
    parser.add_argument("--report", type=Path, nargs="+", help="do not run: tables of these result files")
    parser.add_argument("--markdown", type=Path, help="write the tables here instead of printing them")
    parser.add_argument("--time", action="store_true", help="cost on full-size models instead")
    args = parser.parse_args(argv)
    from benchmarks import trace_report, trace_time

    if args.report:
        text = trace_report.markdown(args.report)
        args.markdown.write_text(text) if args.markdown else print(text)
        return
    if args.time:
        trace_time.main(args.json)
        return
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    models = plain() if args.list == "plain" else names(args.list)
    models = preload([m for m in models if fnmatch.fnmatch("/".join(m), args.only)])
    rows: dict[str, Any] = {}
    if args.json and args.json.exists():
        rows = json.loads(args.json.read_text())["rows"]

    if args.resume:
        models = [m for m in models if "/".join(m) not in rows]

    commit = tree()

    def done(kind: str, name: str, row: dict[str, Any]) -> None:
        rows[f"{kind}/{name}"] = row | {"tree": commit}
        seconds = row.get("cpu", {})
        print(f"{kind}/{name:40s} {row['status']:14s} removed {row.get('removed', 0):6.1%} trace {seconds.get('trace', 0):.2f}s "
              f"{'' if row['status'] == 'exact' else row.get('detail', '')}", flush=True)  # fmt: skip
        if args.json:
            head = {"command": f"python -m benchmarks.trace_coverage --list {args.list}", "versions": versions()}
            args.json.write_text(json.dumps(head | {"rows": rows}, indent=1))

    run(models, args.limit, args.jobs, done)
    print(trace_report.table({k: v for k, v in rows.items() if tuple(k.split("/", 1)) in set(models)}))


def tree() -> str:
    """Return the commit that is checked out, or nothing outside a repository."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def plain() -> list[tuple[str, str]]:
    """Return the models that need torch alone."""
    from benchmarks.zoo.plain_models import MODELS

    return [("plain", name) for name in MODELS]


if __name__ == "__main__":
    main()
