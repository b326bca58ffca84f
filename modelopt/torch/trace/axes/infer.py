"""`infer_axes`: one forward pass of a model, every dimension of every parameter labelled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from modelopt.torch.trace.axes.families import Axes, make_axes
from modelopt.torch.trace.axes.provenance import Provenance
from modelopt.torch.trace.axes.record import Recorder


def infer_axes(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    lift: frozenset[str] = frozenset(),
    record_ops: bool = False,
) -> Axes:
    """Run `model(*args, **kwargs)` once and find which slices of which parameters must be removed together.

    The model runs in eval mode without gradients on its own device (meta included) and is left as it was: training flags, RNG
    state, buffers. `lift` names soft reasons to ignore: "qk" (the width of q.k), "experts" (router rows).

        >>> axes = infer_axes(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), (torch.zeros(1, 8),))
        >>> [(f.name, f.size) for f in axes.families]
        [('0.bias.0', 16)]
    """
    recorder = Recorder(model, lift=lift, record_ops=record_ops)
    try:
        with evaluating(model), torch.no_grad(), recorder, Provenance(model, recorder) as provenance:
            output = model(*args, **(kwargs or {}))
        recorder.freeze_outputs(output)
        axes = make_axes(recorder, output)
        axes.provenance = provenance
        return axes
    finally:
        recorder.close()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and a private random state; both are restored, and so is every attribute that the forward pass sets."""
    modules = list(model.modules())
    before = [(m, dict(m.__dict__), {k: dict(m.__dict__[k]) for k in _TABLES}) for m in modules]
    devices = sorted({t.device.index or 0 for t in model.parameters() if t.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        model.eval()
        try:
            yield
        finally:
            for module, attributes, tables in before:
                _restore(module.__dict__, attributes)
                for name, table in tables.items():
                    _restore(module.__dict__[name], table)


_TABLES = ("_parameters", "_buffers", "_modules")


def _restore(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Make a dict what it was, touching nothing where nothing has changed."""
    if len(now) == len(before) and all(k in now and now[k] is v for k, v in before.items()):
        return
    now.clear()
    now.update(before)
