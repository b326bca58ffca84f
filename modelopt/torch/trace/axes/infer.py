"""`infer_axes`: one forward pass of a model, every dimension of every parameter labelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from modelopt.torch.trace.axes.families import Axes, make_axes
from modelopt.torch.trace.axes.pin import freeze_pinned
from modelopt.torch.trace.axes.probe import reach_idle, seeded
from modelopt.torch.trace.axes.provenance import Provenance
from modelopt.torch.trace.axes.record import Recorder
from modelopt.torch.trace.inputs import MODEL_ERRORS, quiet_run, without_weights


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
        with quiet_run(model), without_weights(model), recorder, Provenance(model, recorder) as provenance:
            run = seeded(model, args, kwargs or {})
            output = run()
            reach_idle(model, recorder, run, MODEL_ERRORS)
        recorder.freeze_outputs(output)
        freeze_pinned(recorder.store, provenance.equations)
        axes = make_axes(recorder, output)
        axes.provenance = provenance
        return axes
    finally:
        recorder.close()
