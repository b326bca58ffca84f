"""`modelopt::hadamard`: the normalized Walsh-Hadamard transform of the last dimension, whole or in blocks.

    y = H (d x) / sqrt(n)          inverse: x = d (H^T y) / sqrt(n)          d: signs, or 1;  n: the size of a block

Schema: hadamard(Tensor x, int size, Tensor? signs=None, bool inverse=False) -> Tensor
        rotated_fake_quantize(Tensor x, int size, str format, Tensor? amax, Tensor? global_amax, Tensor? amin) -> Tensor
        rotated_quantize(Tensor x, int size, str format, Tensor? amax, Tensor? global_amax, Tensor? amin) -> Tensor[]

The transform spreads outliers over a block before it is quantized. H is orthogonal up to its scale, so the gradient is the
inverse applied to the gradient of the output. The rotated ops equal `hadamard`, then `fake_quantize` or `quantize`, in one pass.
Sources: QuaRot (2404.00456), SpinQuant (2405.16406).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modelopt.core.errors import FormatError, ShapeError
from modelopt.numerics import Format, parse
from modelopt.torch.kernels.choice import fast_kernel, forced
from modelopt.torch.kernels.fake_quantize import _run as run_fake_quantize
from modelopt.torch.kernels.hadamard import cuda, fused, reference
from modelopt.torch.kernels.hadamard.matrices import factors
from modelopt.torch.kernels.library import autograd, define, notation
from modelopt.torch.kernels.quantize import _fake as fake_parts
from modelopt.torch.kernels.quantize import _run as run_quantize


def hadamard(x: Tensor, size: int | None = None, signs: Tensor | None = None, *, inverse: bool = False) -> Tensor:
    """Return the normalized Walsh-Hadamard transform of the last dimension of `x`, in its dtype.

    Args:
        x: a floating tensor [..., width].
        size: transform blocks of so many elements (2^k, 12 2^k, 20 2^k or 28 2^k up to 32768); None is the width.
        signs: [size] of +-1, multiplied into `x` before the transform (after the inverse). No gradient flows to it.
        inverse: undo the transform.

    Raises ShapeError if `size` is not such a number or does not divide the width.

    >>> hadamard(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    tensor([[ 5., -1., -2.,  0.]])
    """
    return torch.ops.modelopt.hadamard(x, _size(x, size), signs, inverse)


def rotated_fake_quantize(
    x: Tensor,
    size: int,
    fmt: Format | str,
    amax: Tensor | None = None,
    global_amax: Tensor | None = None,
    amin: Tensor | None = None,
) -> Tensor:
    """Return `fake_quantize(hadamard(x, size), fmt, ...)`, in one pass where that can be. The gradient passes straight through.

    >>> rotated_fake_quantize(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 4, "e2m1[32]~*e8m0")
    tensor([[ 4., -1., -2.,  0.]])
    """
    return torch.ops.modelopt.rotated_fake_quantize(x, _size(x, size), notation(fmt), amax, global_amax, amin)


def rotated_quantize(
    x: Tensor,
    size: int,
    fmt: Format | str,
    amax: Tensor | None = None,
    global_amax: Tensor | None = None,
    amin: Tensor | None = None,
) -> list[Tensor]:
    """Return `quantize(hadamard(x, size), fmt, ...)`, in one pass where that can be."""
    return torch.ops.modelopt.rotated_quantize(x, _size(x, size), notation(fmt), amax, global_amax, amin)


def _size(x: Tensor, size: int | None) -> int:
    width = x.shape[-1] if x.dim() else 0
    size = width if size is None else size
    if not x.is_floating_point():
        raise FormatError(f"Only floating-point tensors can be transformed, got {x.dtype}.")
    factors(size)
    if width % size:
        raise ShapeError(f"Blocks of {size} do not divide the last dimension of a tensor of {tuple(x.shape)}.")
    return size


def _run(x: Tensor, size: int, signs: Tensor | None = None, inverse: bool = False) -> Tensor:
    if signs is not None and signs.numel() != size:
        raise ShapeError(f"Blocks of {size} need as many signs, got {tuple(signs.shape)}.")
    if x.is_cuda and not forced() and cuda.why_not(x, size) is None:
        return cuda.hadamard(x, size, signs, inverse)
    kernel = fast_kernel("hadamard", x, size)
    return (kernel or reference).hadamard(x, size, signs, inverse)


def _fake(x: Tensor, size: int, signs: Tensor | None = None, inverse: bool = False) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.size, signs, ctx.inverse = inputs
    ctx.save_for_backward(signs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (signs,) = ctx.saved_tensors
    return torch.ops.modelopt.hadamard(grad, ctx.size, signs, not ctx.inverse), None, None, None


def _short(x: Tensor, fmt: Format, op: str) -> Any:
    """Return the Triton kernel of `op` where it can transform too: for long blocks it takes minutes to compile."""
    last = x.shape[-1] if x.dim() else 1
    return fast_kernel(op, x, fmt) if fmt.why_not(x.shape) is None and min(fmt.block.sizes(x.shape)[-1], last) <= 1024 else None


def _run_rotated(
    x: Tensor,
    size: int,
    format: str,
    amax: Tensor | None = None,
    global_amax: Tensor | None = None,
    amin: Tensor | None = None,
) -> Tensor:
    fmt = parse(format)
    done = fused.rotated(x, size, fmt, amax, global_amax, amin, codes=False)
    if done is not None:
        return done[0]
    kernel = _short(x, fmt, "fake_quantize")
    out = None if kernel is None else kernel.rotated(x, size, fmt, amax, global_amax, amin)
    return run_fake_quantize(_run(x, size), format, amax, global_amax, amin) if out is None else out


def _fake_rotated(
    x: Tensor,
    size: int,
    format: str,
    amax: Tensor | None = None,
    global_amax: Tensor | None = None,
    amin: Tensor | None = None,
) -> Tensor:
    return x.new_empty(x.shape)


def _setup_rotated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.size = inputs[1]


def _backward_rotated(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.modelopt.hadamard(grad, ctx.size, None, True), None, None, None, None, None


def _run_codes(
    x: Tensor,
    size: int,
    format: str,
    amax: Tensor | None = None,
    global_amax: Tensor | None = None,
    amin: Tensor | None = None,
) -> list[Tensor]:
    fmt = parse(format)
    done = fused.rotated(x, size, fmt, amax, global_amax, amin, codes=True)
    if done is not None:
        return done
    kernel = _short(x, fmt, "quantize")
    out = None if kernel is None else kernel.rotated(x, size, fmt, amax, global_amax, amin)
    return run_quantize(_run(x, size), format, amax, global_amax, amin) if out is None else out


def _fake_codes(
    x: Tensor,
    size: int,
    format: str,
    amax: Tensor | None = None,
    global_amax: Tensor | None = None,
    amin: Tensor | None = None,
) -> list[Tensor]:
    return fake_parts(x, format, amax, global_amax, amin)


_RANGES = "Tensor? amax=None, Tensor? global_amax=None, Tensor? amin=None"
define("hadamard(Tensor x, int size, Tensor? signs=None, bool inverse=False) -> Tensor", _run, _fake)
define(f"rotated_fake_quantize(Tensor x, int size, str format, {_RANGES}) -> Tensor", _run_rotated, _fake_rotated)
define(f"rotated_quantize(Tensor x, int size, str format, {_RANGES}) -> Tensor[]", _run_codes, _fake_codes)
autograd("hadamard", _backward, _setup_context)
autograd("rotated_fake_quantize", _backward_rotated, _setup_rotated)
