"""Calibration data: what a forward loop may be, and which tokens of a batch are real.

A forward loop is a callable `loop(model)`, or an iterable of batches: dict -> model(**b), tuple or list -> model(*b),
anything else -> model(b).

`token_mask(model)` publishes, during each forward, the 2-D attention mask [B, T] that the innermost module received. An
observed tensor finds its tokens in it by shape: [B, T, ...], [B*T, ...] or, between heads, [B, H, T, ...]. Tensors that hold
a selection of tokens (a routed expert) are covered by `select_tokens(index, num_tokens)`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modelopt.core.errors import CalibrationError
from modelopt.core.logging import Progress, null_progress

ForwardLoop = Callable[[nn.Module], Any] | Iterable[Any]
MASK_NAMES = ("attention_mask", "decoder_attention_mask", "encoder_attention_mask")


def as_forward_loop(loop: ForwardLoop, progress: Progress = null_progress) -> Callable[[nn.Module], None]:
    """Return a callable that runs the model over the data of `loop`. Raises CalibrationError if it is neither form.

    Example:
        >>> as_forward_loop([torch.zeros(1, 2)])(nn.Linear(2, 2))
    """
    if isinstance(loop, str | bytes | Mapping | Tensor):
        raise CalibrationError(
            f"forward_loop is a {type(loop).__name__}; it must be a callable taking the model, or an iterable of batches. "
            "Put a single batch into a list."
        )
    if callable(loop) and not isinstance(loop, nn.Module):
        return loop
    if not isinstance(loop, Iterable):
        raise CalibrationError(f"forward_loop is a {type(loop).__name__}; it must be a callable or an iterable of batches.")
    batches = loop

    def run(model: nn.Module) -> None:
        total = len(batches) if hasattr(batches, "__len__") else None
        device = next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
        for i, batch in enumerate(batches):
            feed(model, _to(batch, device))
            progress(i + 1, total, "calibrating")

    return run


def feed(model: nn.Module, batch: Any) -> Any:
    """Call the model on one batch: a mapping by name, a tuple or list by position, anything else as the only argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch if device.type == "meta" else batch.to(device)
    if isinstance(batch, Mapping):
        return {k: _to(v, device) for k, v in batch.items()}
    if isinstance(batch, tuple | list):
        return [_to(v, device) for v in batch]
    return batch


class TokenMask:
    """The masks of the forward in progress, innermost last. None on the stack: all tokens of that module are real."""

    def __init__(self) -> None:
        self.stack: list[list[Tensor]] = []
        self.selected: list[Tensor | None] = []

    def for_tensor(self, x: Tensor, heads_first: bool = False) -> Tensor | None:
        """Return a bool tensor that broadcasts to `x` (True: a real token), or None where nothing is known or masked.

        `heads_first`: `x` [B, H, T, ...] comes from inside an attention.
        """
        if self.selected:
            rows = self.selected[-1]
            return None if rows is None or x.dim() == 0 or rows.numel() != x.shape[0] else _lead(rows, x)
        for mask in self.stack[-1] if self.stack else ():
            found = _place(mask, x, heads_first)
            if found is not None:
                return None if bool(found.all()) else found
        return None

    def tokens(self, rows: int) -> Tensor | None:
        """Return the current mask flattened to [B*T] bool if it has that many tokens, else None."""
        for mask in self.stack[-1] if self.stack else ():
            if mask.numel() == rows:
                return mask.flatten()
        return None


_ACTIVE: list[TokenMask] = []


@contextlib.contextmanager
def select_tokens(index: Tensor, num_tokens: int) -> Iterator[None]:
    """Say that tensors of shape [len(index), ...] seen inside hold the tokens `index` (int64) of `num_tokens` = B*T.

    For modules that gather tokens, such as routed experts. Costs nothing when no calibration runs.
    """
    if not _ACTIVE:
        yield
        return
    active = _ACTIVE[-1]
    rows = active.tokens(num_tokens)
    active.selected.append(None if rows is None else rows[index.to(rows.device)])
    try:
        yield
    finally:
        active.selected.pop()


@contextlib.contextmanager
def token_mask(model: nn.Module) -> Iterator[TokenMask]:
    """Watch the attention masks of `model`'s forwards: hooks on every module whose forward takes one; removed at the end."""
    state = TokenMask()
    handles: list[Any] = []
    for module in model.modules():
        names = _parameter_names(type(module))
        if module is model or any(n in names for n in MASK_NAMES):
            handles.append(module.register_forward_pre_hook(_enter(state, names), with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(_leave(state), always_call=True))
    _ACTIVE.append(state)
    try:
        yield state
    finally:
        _ACTIVE.remove(state)
        for handle in handles:
            handle.remove()


def _enter(state: TokenMask, names: tuple[str, ...]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        found = [given[n] for n in MASK_NAMES if isinstance(given.get(n), Tensor) and given[n].dim() == 2]
        masks = [m != 0 for m in found if m.shape[0] > 0]
        state.stack.append(masks or (state.stack[-1] if state.stack else []))

    return hook


def _leave(state: TokenMask) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if state.stack:
            state.stack.pop()

    return hook


def _parameter_names(cls: type[nn.Module]) -> tuple[str, ...]:
    try:
        parameters = list(inspect.signature(cls.forward).parameters)
    except (TypeError, ValueError):
        return ()
    return tuple(parameters[1:])


def _place(mask: Tensor, x: Tensor, heads_first: bool) -> Tensor | None:
    """Find [B, T] of `mask` in the shape of `x`; a mask longer than T (a cache) is read from its end."""
    batch, tokens = mask.shape
    mask = mask.to(x.device)
    if heads_first and x.dim() >= 4:
        if x.shape[0] == batch and x.shape[2] <= tokens:
            part = mask[:, tokens - x.shape[2] :]
            return part.reshape(batch, 1, x.shape[2], *[1] * (x.dim() - 3))
        return None
    if x.dim() >= 2 and x.shape[0] == batch * tokens:
        return _lead(mask.flatten(), x)
    if x.dim() >= 3 and x.shape[:2] == mask.shape:
        return _lead(mask, x)
    return None


def _lead(mask: Tensor, x: Tensor) -> Tensor:
    return mask.to(x.device).reshape(*mask.shape, *[1] * (x.dim() - mask.dim()))
