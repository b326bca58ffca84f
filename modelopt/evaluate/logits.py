"""The logits of a causal language model, in chunks of tokens, so that those of a whole batch need not be held at once.

Where a model is a body followed by a head (`base_model` and `get_output_embeddings()`, as in transformers), only the last
hidden states [b, l, d] are kept and the head is applied to one chunk of tokens after another. That this gives the model's own
logits is checked on a few tokens first; a model that does more (a soft cap, a scale, a quantized head), and any callable,
is run whole, one batch at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelopt.core.errors import CalibrationError, ShapeError

CHUNK_BYTES = 48 * 1024 * 1024  # float32 logits of one chunk
PROBE_TOKENS = 8

Model = Callable[..., Any]


@dataclass(frozen=True)
class Split:
    """A model as body (tokens -> hidden states [b, l, d]) and head (hidden states -> logits over `vocabulary` tokens)."""

    body: nn.Module
    head: nn.Module
    vocabulary: int

    def hidden(self, ids: Tensor) -> Tensor:
        """Return the last hidden states [b, l, d] of ids [b, l], without building a key/value cache."""
        return output_tensor(self.body(ids, use_cache=False) if hasattr(self.body, "config") else self.body(ids))

    def chunks(self, hidden: Tensor) -> Iterator[Tensor]:
        """Yield float32 logits [t, v] of `hidden` [b, l, d], flattened row by row, chunk by chunk."""
        for part in hidden.flatten(0, -2).split(chunk_length(self.vocabulary)):
            yield finite(self.head(part).float())


def split(model: Model, ids: Tensor) -> Split | None:
    """Return the model as body and head if head(body(ids)) is what it computes, None otherwise. ids: int64 [b, l]."""
    body = getattr(model, "base_model", None)
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    if not isinstance(model, nn.Module) or not isinstance(body, nn.Module) or not isinstance(head, nn.Module) or body is model:
        return None
    if any(getattr(child, "is_enabled", True) for child in head.children()):
        return None  # an active quantizer of the head may look at the whole tensor: chunks would change its result
    probe = ids[:1, :PROBE_TOKENS]
    whole = output_tensor(model(probe))
    found = Split(body, head, whole.shape[-1])
    hidden = found.hidden(probe)
    if hidden.shape[-1] != getattr(head, "in_features", hidden.shape[-1]):
        return None
    logits = head(hidden)
    same = logits.shape == whole.shape and torch.allclose(logits.float(), whole.float(), rtol=1e-4, atol=1e-4)
    return found if same else None


def logit_chunks(model: Model, ids: Tensor, parts: Split | None) -> Iterator[Tensor]:
    """Yield float32 logits [t, v] of a batch ids [b, l] in chunks, flattened row by row. `parts` is from `split`."""
    if parts is not None:
        yield from parts.chunks(parts.hidden(ids))
        return
    logits = output_tensor(model(ids))
    if logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise ShapeError(f"For tokens {list(ids.shape)} the model returned {list(logits.shape)}; wanted {[*ids.shape, 'v']}.")
    for part in logits.flatten(0, 1).split(chunk_length(logits.shape[-1])):
        yield finite(part.float())


def targets_of(ids: Tensor) -> Tensor:
    """Return the next token of every position of ids [b, l], flattened; the last of each row is meaningless."""
    return ids.roll(-1, 1).flatten()


def chunk_length(vocabulary: int) -> int:
    """Return how many tokens' logits make one chunk."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def finite(logits: Tensor) -> Tensor:
    """Return logits [t, v] unchanged, or raise CalibrationError if one is NaN or plus infinity (minus infinity masks a token)."""
    top = logits.amax(-1)
    if not bool(torch.isfinite(top).all()):
        row = int((~torch.isfinite(top)).nonzero()[0])
        raise CalibrationError(
            f"The model's logits are not finite (largest of a row: {float(top[row])}). Look for NaN or overflow in its weights, "
            "scales or activations; a wider format or other calibration data helps."
        )
    return logits


def output_tensor(output: Any) -> Tensor:
    """Return the tensor in a model's output: `.logits`, `.last_hidden_state`, the first item of a tuple, or itself."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        value = output.get(name) if isinstance(output, dict) else getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(output, tuple | list) and output:
        return output_tensor(output[0])
    raise ShapeError(
        f"The model returned {type(output).__name__}; wanted a tensor, a tuple of tensors, or an output with logits."
    )


def check_windows(windows: Tensor) -> None:
    """Raise ShapeError unless `windows` are token ids [n, l] with at least two tokens each."""
    good = isinstance(windows, Tensor) and windows.dim() == 2 and not windows.is_floating_point()
    if not good or windows.shape[1] < 2 or not len(windows):
        seen = f"{list(windows.shape)} {windows.dtype}" if isinstance(windows, Tensor) else type(windows).__name__
        raise ShapeError(f"The windows are {seen}; wanted integer token ids [n, length], length >= 2, as from token_windows().")


def beside(model: Model, tensor: Tensor) -> Tensor:
    """Return `tensor` on the device of the model's first parameter."""
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return tensor if first is None else tensor.to(first.device)


@contextmanager
def evaluating(*models: Model) -> Iterator[None]:
    """Run models in evaluation mode without gradients, and give each of their modules its own mode back."""
    modes = [(m, m.training) for model in models if isinstance(model, nn.Module) for m in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
