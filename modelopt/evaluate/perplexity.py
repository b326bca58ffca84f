"""Perplexity of a causal language model on token windows.

    exp( mean over windows and positions t < l of  -log p(token t+1 | tokens 1..t) )

Source: Jelinek et al., "Perplexity: a measure of the difficulty of speech recognition tasks" (1977).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt.core.logging import Progress, null_progress
from modelopt.evaluate.logits import Model, beside, check_windows, evaluating, logit_chunks, split, targets_of


@dataclass(frozen=True)
class Perplexity:
    """`nll` is the mean loss in nats per token, with the standard error of the mean of per-window means (None: one window)."""

    perplexity: float
    nll: float
    nll_standard_error: float | None
    num_tokens: int


def perplexity(model: Model, windows: Tensor, *, batch_size: int = 1, progress: Progress = null_progress) -> Perplexity:
    """Return the perplexity of `model` on windows, int64 [n, l]; each window is scored on l - 1 tokens.

    >>> perplexity(model, windows).perplexity                                                       # doctest: +SKIP
    37.03
    """
    check_windows(windows)
    n, length = windows.shape
    losses: list[Tensor] = []
    with evaluating(model):
        parts = split(model, beside(model, windows))
        for done, batch in enumerate(windows.split(batch_size)):
            progress(done * batch_size, n, "perplexity")
            ids = beside(model, batch)
            nll = token_nll(logit_chunks(model, ids, parts), ids)
            losses.append(nll.view(-1, length)[:, :-1].mean(1, dtype=torch.float64))
    progress(n, n, "perplexity")
    means = torch.cat(losses)
    error = float(means.std() / math.sqrt(n)) if n > 1 else None
    return Perplexity(exp_mean(means), float(means.mean()), error, n * (length - 1))


def token_nll(chunks: Iterable[Tensor], ids: Tensor) -> Tensor:
    """Return the loss [b l] in nats of the next token at each position of ids [b, l]; the last of each row is meaningless.

    chunks: float32 logits [t, v], b l of them in all, in the order of the flattened ids.
    """
    targets, at, found = targets_of(ids), 0, []
    for logits in chunks:
        found.append(logits.logsumexp(-1) - logits.gather(-1, targets[at : at + len(logits), None])[:, 0])
        at += len(logits)
    return torch.cat(found)


def exp_mean(nll: Tensor) -> float:
    """Return exp(mean(nll)), infinity where it overflows."""
    mean = float(nll.mean(dtype=torch.float64))
    return math.exp(mean) if mean < 700 else math.inf
