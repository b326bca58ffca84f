"""Fake-quantized weights, kept between evaluation forwards within a budget for the whole process.

An entry is valid while everything that its value depends on is unchanged: address, shape, dtype, device and version counter of
the weight, a digest of its bits, and the same of the quantizer's statistics. The digest is what sees `.data` writes and writes
under inference mode, which move no version counter:

    words = the bits of the tensor as int64, in rows of 1024     digest = (sums of rows, sums of columns, the rest as it is)

Sums are exact modulo 2^64, and a change of one word, or a swap of two, always changes them. Nothing is cached while gradients are
needed, while a graph is being traced, compiled or captured, or beyond the budget. Entries live beside the modules, not in them:
they are in no state dict, a deep copy has none, and they die with their quantizer.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from modelopt.core.errors import ConfigError
from modelopt.torch.quantization.nn.modules.tensor_quantizer import (
    BUFFERS,
    SequentialQuantizer,
    TensorQuantizer,
    leaf_quantizers,
)

DEFAULT_BUDGET = 4 * 2**30
_COLUMNS = 1024


@dataclass
class _Entry:
    stamp: tuple[Any, ...]
    digests: list[Tensor]
    value: Tensor
    nbytes: int


class _Cache:
    def __init__(self) -> None:
        self.budget = DEFAULT_BUDGET
        self.entries: weakref.WeakKeyDictionary[nn.Module, _Entry] = weakref.WeakKeyDictionary()

    def used(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())


_cache = _Cache()


def set_weight_cache_budget(nbytes: int) -> None:
    """Bound the memory of cached fake-quantized weights, in bytes for the whole process; 0 turns the cache off.

    >>> set_weight_cache_budget(512 * 2**20)
    """
    if nbytes < 0:
        raise ConfigError(f"The budget of the weight cache is a number of bytes, at least 0; got {nbytes}.")
    _cache.budget = int(nbytes)
    if _cache.used() > _cache.budget:
        _cache.entries.clear()


def clear_weight_cache() -> None:
    """Drop every cached weight."""
    _cache.entries.clear()


def weight_cache_bytes() -> int:
    """Return the bytes that cached weights (and their digests) hold now."""
    return _cache.used()


def quantized_weight(quantizer: TensorQuantizer | SequentialQuantizer, weight: Tensor) -> Tensor:
    """Return `quantizer(weight)`, from the cache where that is certain to be the same."""
    if not quantizer.is_enabled or not _cacheable(quantizer, weight):
        return quantizer(weight)
    tensors = [weight, *_statistics(quantizer)]
    digests = [_digest(t) for t in tensors]
    if any(d is None for d in digests):
        return quantizer(weight)
    stamp = (_settings(quantizer), tuple(_stamp(t) for t in tensors))
    entry = _cache.entries.get(quantizer)
    if entry is not None:
        same = entry.stamp == stamp and all(torch.equal(a, b) for a, b in zip(entry.digests, digests, strict=True))
        if same:
            return entry.value
        del _cache.entries[quantizer]
    value = quantizer(weight)
    nbytes = value.nbytes + sum(d.nbytes for d in digests)
    if _cache.used() + nbytes <= _cache.budget:
        _cache.entries[quantizer] = _Entry(stamp, digests, value, nbytes)
    return value


def _cacheable(quantizer: nn.Module, weight: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _cache.budget == 0:
        return False
    if type(weight) not in (Tensor, nn.Parameter) or weight.device.type == "meta" or weight.numel() == 0:
        return False
    if torch.is_grad_enabled() and (weight.requires_grad or any(b.requires_grad for b in quantizer.parameters())):
        return False
    if _get_current_dispatch_mode() is not None or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if any(q.observer is not None for q in leaf_quantizers(quantizer)):
        return False
    if any(q._forward_hooks or q._forward_pre_hooks for q in quantizer.modules()):
        return False
    return not (weight.is_cuda and torch.cuda.is_current_stream_capturing())


def _statistics(quantizer: TensorQuantizer | SequentialQuantizer) -> list[Tensor]:
    found = [getattr(q, name) for q in leaf_quantizers(quantizer) for name in BUFFERS]
    return [t for t in found if t is not None]


def _settings(quantizer: TensorQuantizer | SequentialQuantizer) -> tuple[Any, ...]:
    return tuple(
        (q.enabled, q._format_text, q.rotation, tuple(getattr(q, name) is None for name in BUFFERS))
        for q in leaf_quantizers(quantizer)
    )


def _stamp(t: Tensor) -> tuple[Any, ...]:
    version = None if t.is_inference() else t._version
    return t.data_ptr(), tuple(t.shape), t.stride(), t.dtype, t.device, version


def _bits(t: Tensor) -> Tensor | None:
    """Return the bits of a dense tensor as flat uint8 without copying, or None where its memory has holes or overlaps."""
    t = t.detach()
    if not t.is_contiguous():
        order = sorted(range(t.dim()), key=lambda d: (-t.stride(d), -t.shape[d]))
        t = t.permute(order)
        if not t.is_contiguous():
            return None
    return t.reshape(-1).view(torch.uint8)


def _digest(t: Tensor) -> Tensor | None:
    raw = _bits(t)
    if raw is None or raw.storage_offset() % 8:  # holes, or a view that does not start on a word
        return None
    whole = raw.numel() // 8 * 8
    words, tail = raw[:whole].view(torch.int64), raw[whole:]
    rows = words.numel() // _COLUMNS
    body = words[: rows * _COLUMNS].view(rows, _COLUMNS)
    return torch.cat((body.sum(1), body.sum(0), words[rows * _COLUMNS :], tail.to(torch.int64)))
