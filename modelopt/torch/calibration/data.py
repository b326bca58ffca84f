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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelopt.core.errors import CalibrationError
from modelopt.core.logging import Progress, null_progress

ForwardLoop = Callable[[nn.Module], Any] | Iterable[Any]
MASK_NAMES = ("attention_mask", "decoder_attention_mask", "encoder_attention_mask")
STREAM_NAMES = ("input_ids", "inputs_embeds", "input_features", "input_values", "pixel_values")
MEMORY_NAMES = ("key_value_states", "encoder_hidden_states")


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


@dataclass(frozen=True)
class _Frame:
    """What a module in progress knows: its own mask [B, T], that of its memory [B, S] (None: all real), and the memory's address.

    `reads_memory`: the module is a cross attention, whose keys and values are made of the memory.
    """

    mask: Tensor | None = None
    memory_mask: Tensor | None = None
    memory: tuple[int, tuple[int, ...]] | None = None
    reads_memory: bool = False


class TokenMask:
    """The frames of the forwards in progress, innermost last."""

    def __init__(self) -> None:
        self.stack: list[_Frame] = []
        self.selected: list[Tensor | None] = []
        self.keys = 0

    def for_tensor(self, x: Tensor, heads_first: bool = False) -> Tensor | None:
        """Return a bool tensor that broadcasts to `x` (True: a real token), or None where nothing is known or masked.

        `heads_first`: `x` [B, H, T, ...] comes from inside an attention.
        """
        if self.selected:
            rows = self.selected[-1]
            return None if rows is None or x.dim() == 0 or rows.numel() != x.shape[0] else _lead(rows, x)
        if not self.stack:
            return None
        frame = self.stack[-1]
        of_memory = (frame.reads_memory and self.keys > 0) or frame.memory == _address(x)
        mask = frame.memory_mask if of_memory else frame.mask
        found = None if mask is None else _place(mask, x, heads_first)
        return None if found is None or bool(found.all()) else found

    def tokens(self, rows: int) -> Tensor | None:
        """Return the current mask flattened to [B*T] bool if it has that many tokens, else None."""
        mask = self.stack[-1].mask if self.stack else None
        return None if mask is None or mask.numel() != rows else mask.flatten()


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
def key_tokens() -> Iterator[None]:
    """Say that tensors seen inside are keys or values: in a cross attention they hold the tokens of its memory."""
    if not _ACTIVE:
        yield
        return
    active = _ACTIVE[-1]
    active.keys += 1
    try:
        yield
    finally:
        active.keys -= 1


@contextlib.contextmanager
def token_mask(model: nn.Module) -> Iterator[TokenMask]:
    """Watch the attention masks of `model`'s forwards: hooks on every module whose forward takes one; removed at the end."""
    state = TokenMask()
    handles: list[Any] = []
    for module in model.modules():
        names = _parameter_names(type(module))
        if module is model or any(n in names for n in (*MASK_NAMES, *MEMORY_NAMES)):
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
    begins_stream = any(n in names for n in STREAM_NAMES)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        outer = state.stack[-1] if state.stack else _Frame()
        masks = {n: _as_mask(given.get(n)) for n in MASK_NAMES}
        memory = next((given[n] for n in MEMORY_NAMES if isinstance(given.get(n), Tensor)), None)
        if "decoder_attention_mask" in names:  # an encoder-decoder: what it computes itself are the decoder's tokens
            mask, memory_mask = masks["decoder_attention_mask"], masks["attention_mask"]
        else:
            mask, memory_mask = masks["attention_mask"], masks["encoder_attention_mask"]
            if mask is None and not (begins_stream and given.get("attention_mask") is None):
                mask = outer.mask
            if memory_mask is None and not begins_stream:
                memory_mask = outer.memory_mask
        crosses = memory is not None and ("key_value_states" in names or "CrossAttention" in type(module).__name__)
        address = outer.memory if memory is None else _address(memory)
        state.stack.append(_Frame(mask, memory_mask, address, crosses))

    return hook


def _as_mask(value: Any) -> Tensor | None:
    return value != 0 if isinstance(value, Tensor) and value.dim() == 2 and value.shape[0] > 0 else None


def _address(x: Tensor) -> tuple[int, tuple[int, ...]]:
    return x.data_ptr(), tuple(x.shape)


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
