"""What the inputs did not reach: experts that no token was sent to. Their dimensions must follow those of experts that ran.

An idle member of a ModuleList or ModuleDict is run on what its twin (same class, same shapes) got, and its outputs are made equal
to the twin's. A module that ran without its stacked weights (experts in one tensor) is not known well enough: what it reads and
returns is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from modelopt.torch.trace.axes import algebra
from modelopt.torch.trace.axes.record import Recorder
from modelopt.torch.trace.axes.rules.registry import MODULE_RULES, tensors

NOT_REACHED = "stacked weights of this module were not reached on these inputs"
UNLIKE = "an idle module could not be run on what its twin got"


def reach_idle(model: nn.Module, recorder: Recorder, run: Callable[[], Any], errors: tuple[type[Exception], ...]) -> None:
    """After a run of the model: label what did not run. Runs the model once more only if there are idle twins."""
    twins = idle_twins(model, recorder.ran)
    if twins:
        calls, ops = len(recorder.calls), len(recorder.ops or ())

        def probe(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            for twin in twins.pop(id(module), ()):
                _probe(recorder, twin, args, kwargs, output, errors)

        recorder.on_leave = probe
        try:
            run()
        finally:
            recorder.on_leave = None
        del recorder.calls[calls:]
        if recorder.ops is not None:
            del recorder.ops[ops:]
    _keep_unreached(model, recorder)


def idle_twins(model: nn.Module, ran: set[int]) -> dict[int, list[nn.Module]]:
    """id of a module that ran -> the idle modules that stand at its place in other members of the same list."""
    out: dict[int, list[nn.Module]] = {}
    for parent in model.modules():
        if not isinstance(parent, (nn.ModuleList, nn.ModuleDict)):
            continue
        first: dict[Any, nn.Module] = {}
        idle: list[tuple[Any, nn.Module]] = []
        for child in parent.children():
            key = (type(child), tuple((n, tuple(p.shape)) for n, p in child.named_parameters()))
            if any(id(m) in ran for m in child.modules()):
                first.setdefault(key, child)
            elif key[1]:
                idle.append((key, child))
        for key, child in idle:
            if key in first:
                for name in _entries(first[key], ran):
                    out.setdefault(id(first[key].get_submodule(name)), []).append(child.get_submodule(name))
    return out


def _entries(module: nn.Module, ran: set[int]) -> list[str]:
    """The outermost modules in here that ran, by name."""
    found: list[str] = []
    for name, part in module.named_modules():
        if id(part) in ran and not any(name.startswith(f"{f}.") or not f for f in found):
            found.append(name)
    return found


def _probe(recorder: Recorder, twin: nn.Module, args: Any, kwargs: Any, output: Any, errors: tuple[type[Exception], ...]) -> None:
    mine = list(tensors(output))
    try:
        theirs = list(tensors(twin(*args, **kwargs)))
    except errors:
        theirs = []
    if [t.shape for t in mine] == [t.shape for t in theirs]:
        for a, b in zip(mine, theirs, strict=True):
            for x, y in zip(recorder.axes(a), recorder.axes(b), strict=True):
                algebra.unify(recorder.store, x, y)
        return
    for tensor in [*mine, *tensors(args), *tensors(kwargs)]:
        for axis in recorder.axes(tensor):
            recorder.store.freeze(axis, UNLIKE)


def _keep_unreached(model: nn.Module, recorder: Recorder) -> None:
    names = {n for n, m in model.named_modules() if id(m) in recorder.ran and _unreached(m, recorder)}
    for call in recorder.calls:
        if call.name in names:
            for ref in (*call.inputs, *call.outputs):
                for axis in ref.axes:
                    recorder.store.freeze(axis, NOT_REACHED)


def _unreached(module: nn.Module, recorder: Recorder) -> bool:
    """Whether a weight of three or more dimensions of this module took no part in the run."""
    if MODULE_RULES.match(module) is not None:
        return False
    own = [p for p in module.parameters(recurse=False) if p.is_floating_point() and sum(n > 1 for n in p.shape) > 2]
    return any(id(p) in recorder.parameter_names and id(p) not in recorder.reached for p in own)


def seeded(model: nn.Module, args: Any, kwargs: Any) -> Callable[[], Any]:
    """The model's forward pass as a function, with the same random numbers each time."""

    def run() -> Any:
        torch.manual_seed(0)
        return model(*args, **kwargs)

    return run
