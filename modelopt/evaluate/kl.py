"""KL divergence of a candidate to the original, in nats per token: what optimization did to a language model's predictions.

    KL = mean over all positions t of  sum_v p_t(v) (log p_t(v) - log q_t(v)),     p original, q candidate, v the whole vocabulary

Log-softmax and sums are float32. The standard error is that of the mean of the n per-window means, s / sqrt(n). Perplexity
is exp(mean negative log-likelihood) of the next token, over all positions of a window but the last.

    reference = Reference(original, windows)                                        # the original runs once
    rows = [reference.compare(candidate) for candidate in candidates]               # and each candidate once

Source: Kullback and Leibler, "On Information and Sufficiency" (1951); the measure is that of llama.cpp's perplexity tool.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from modelopt.core.errors import ModeError, ShapeError
from modelopt.core.logging import Progress, null_progress
from modelopt.evaluate.logits import Model, Split, beside, check_windows, evaluating, logit_chunks, split, targets_of
from modelopt.evaluate.perplexity import exp_mean, token_nll

SAME = 0.02  # nats per token by which a run of the same original may differ (bfloat16, atomic sums)


@dataclass(frozen=True)
class Comparison:
    """A candidate against the original on the same tokens. KL in nats per token; agreement as a share of 1."""

    kl: float
    kl_standard_error: float | None
    kl_p99: float
    top1_agreement: float
    perplexity: float
    original_perplexity: float
    num_tokens: int
    num_windows: int
    seconds: float
    kl_per_window: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON data."""
        return {**dataclasses.asdict(self), "kl_per_window": list(self.kl_per_window)}


class _Scores(NamedTuple):
    """One batch: float32 [t] each, in the order of the flattened batch; `same` is whether the largest logits agree."""

    kl: Tensor
    same: Tensor
    nll: Tensor
    original_nll: Tensor


class Reference:
    """What is needed of the original to compare many candidates with it, computed once.

    windows: int64 [n, l]. Of a model made of a body and a head, the last hidden states and a copy of the head are kept
    (n l d values and the head's weight): the original may then be changed or freed. Any other model or callable is
    run again at each comparison; ModeError if it answers otherwise than at first.
    """

    def __init__(self, original: Model, windows: Tensor, *, batch_size: int = 1, progress: Progress = null_progress) -> None:
        check_windows(windows)
        self.windows = windows
        self.batch_size = batch_size
        self._hidden: list[Tensor] = []
        self._nll: list[Tensor] = []
        with evaluating(original):
            parts = split(original, beside(original, windows))
            for _, batch in self._batches(progress, "original"):
                ids = beside(original, batch)
                if parts is not None:
                    self._hidden.append(parts.hidden(ids))
                    chunks = parts.chunks(self._hidden[-1])
                else:
                    chunks = logit_chunks(original, ids, None)
                self._nll.append(token_nll(chunks, ids))
        # What answers for the original from here on: a copy of its head for the kept hidden states, or itself.
        self._head = dataclasses.replace(parts, body=nn.Identity(), head=copy.deepcopy(parts.head)) if parts else None
        self._original = None if parts else original

    @property
    def perplexity(self) -> float:
        """Perplexity of the original."""
        return exp_mean(torch.cat([_inner(nll, self.windows) for nll in self._nll]))

    def compare(self, candidate: Model, *, progress: Progress = null_progress, what: str = "compare") -> Comparison:
        """Run `candidate` over the same windows. Raises ShapeError for another vocabulary, CalibrationError for NaN logits."""
        start = time.perf_counter()
        rows: list[_Scores] = []
        with evaluating(candidate):
            parts = split(candidate, beside(candidate, self.windows))
            for done, batch in self._batches(progress, what):
                ids = beside(candidate, batch)
                rows.append(_score(self._logits(done, batch), logit_chunks(candidate, ids, parts), ids))
                self._check_unchanged(done, rows[-1].original_nll)
        return self._summary(rows, time.perf_counter() - start)

    def _batches(self, progress: Progress, what: str) -> Iterator[tuple[int, Tensor]]:
        for i, batch in enumerate(self.windows.split(self.batch_size)):
            progress(i * self.batch_size, len(self.windows), what)
            yield i, batch
        progress(len(self.windows), len(self.windows), what)

    def _logits(self, index: int, batch: Tensor) -> Iterator[Tensor]:
        if self._original is not None:
            return logit_chunks(self._original, beside(self._original, batch), None)
        return cast(Split, self._head).chunks(self._hidden[index])

    def _check_unchanged(self, index: int, nll: Tensor) -> None:
        change = float((nll - self._nll[index].to(nll.device)).abs().mean())
        if not change <= SAME:
            raise ModeError(
                f"The original changed since the reference was taken (its next-token loss by {change:.3g} nats on average). "
                "Give Reference a copy of the original, taken before it is quantized in place."
            )

    def _summary(self, rows: list[_Scores], seconds: float) -> Comparison:
        n = len(self.windows)
        kl = torch.cat([r.kl for r in rows])
        means = kl.view(n, -1).mean(1, dtype=torch.float64)
        return Comparison(
            kl=float(means.mean()),
            kl_standard_error=float(means.std() / math.sqrt(n)) if n > 1 else None,
            kl_p99=float(kl.kthvalue(math.ceil(0.99 * kl.numel()))[0]),
            top1_agreement=float(torch.cat([r.same for r in rows]).double().mean()),
            perplexity=exp_mean(torch.cat([_inner(r.nll, self.windows) for r in rows])),
            original_perplexity=self.perplexity,
            num_tokens=kl.numel(),
            num_windows=n,
            seconds=seconds,
            kl_per_window=tuple(means.tolist()),
        )


def compare(
    original: Model, candidate: Model, windows: Tensor, *, batch_size: int = 1, progress: Progress = null_progress
) -> Comparison:
    """Compare two causal language models on token windows, int64 [n, l]. For several candidates use `Reference`.

    >>> compare(original, quantized, token_windows(tokenizer, load_texts("pydoc", "evaluation"), 8, 512)).kl    # doctest: +SKIP
    0.0371
    """
    return Reference(original, windows, batch_size=batch_size, progress=progress).compare(candidate, progress=progress)


def _inner(values: Tensor, windows: Tensor) -> Tensor:
    """Drop the last position of each window from flattened values: it has no next token."""
    return values.view(-1, windows.shape[1])[:, :-1]


def _score(original: Iterator[Tensor], candidate: Iterator[Tensor], ids: Tensor) -> _Scores:
    """Compare two streams of logits chunks [t, v] over the tokens of one batch ids [b, l]."""
    targets, at, found = targets_of(ids)[:, None], 0, []
    for p, q in zip(original, candidate, strict=True):
        p = p.to(q.device)
        if p.shape != q.shape:
            raise ShapeError(f"The original has {p.shape[-1]} tokens in its vocabulary, the candidate {q.shape[-1]}.")
        target = targets[at : at + len(p)]
        at += len(p)
        same = p.argmax(-1) == q.argmax(-1)
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        nll, original_nll = -q.gather(-1, target)[:, 0], -p.gather(-1, target)[:, 0]
        difference = torch.sub(p, q, out=q)
        if bool(torch.isneginf(p.amin())):
            difference.masked_fill_(torch.isneginf(p), 0.0)  # 0 log 0 = 0
        found.append(_Scores(difference.mul_(p.exp_()).sum(-1), same, nll, original_nll))
    return _Scores(*(torch.cat(column) for column in zip(*found, strict=True)))
