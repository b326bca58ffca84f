"""Run a model over calibration data: no gradients, masks published, the first inputs and shared inputs remembered.

The shapes and types of the first forward's arguments are kept on the model (`input_spec`), so that it can be exported as a
program later without being asked for an example.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from modelopt.core.logging import Progress, null_progress
from modelopt.torch.calibration.data import ForwardLoop, TokenMask, as_forward_loop, token_mask
from modelopt.torch.trace.sharing import watch_inputs

SPEC_KEY = "_modelopt_input_spec"


def run_forward(
    model: nn.Module,
    forward_loop: ForwardLoop,
    progress: Progress = null_progress,
    on_start: Callable[[TokenMask], None] | None = None,
) -> int:
    """Run `forward_loop` on `model` without gradients and return how many times the model's forward ran.

    `on_start` receives the token masks that observers may ask during the run.
    """
    count = 0
    is_loop = callable(forward_loop)

    def counted(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        if is_loop:
            progress(count, None, "calibrating")

    loop = as_forward_loop(forward_loop, progress)
    handle = model.register_forward_pre_hook(counted, with_kwargs=True)
    try:
        with torch.no_grad(), token_mask(model) as tokens, recorded_inputs(model), watch_inputs(model):
            if on_start is not None:
                on_start(tokens)
            loop(model)
    finally:
        handle.remove()
    return count


@contextlib.contextmanager
def recorded_inputs(model: nn.Module) -> Iterator[None]:
    """Keep the specification of the first forward's arguments on the model."""

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if SPEC_KEY not in module.__dict__:
            module.__dict__[SPEC_KEY] = {"args": [_spec(a) for a in args], "kwargs": {k: _spec(v) for k, v in kwargs.items()}}

    handle = model.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def input_spec(model: nn.Module) -> dict[str, Any] | None:
    """Return {"args": [...], "kwargs": {...}} of the first calibration forward, or None if there was none.

    A tensor is {"shape": [...], "dtype": "int64"}; other plain values stand as they are; anything else is its type's name
    under "unknown".
    """
    return model.__dict__.get(SPEC_KEY)


def _spec(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [_spec(v) for v in value]
    return {"unknown": type(value).__name__}
