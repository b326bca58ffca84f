"""Inputs to run a model with: the forms in which a user may give them, and a guess where he gives none.

    tensor | (a, b) | {"x": a} | ((a, b), {"mask": m}) | (a, b, {"mask": m})   ->   (args, kwargs)

A guess comes from the model's own description (the plugins read the configs of transformers, diffusers and timm) or from its
first layer. Several guesses may be plausible: the first one that the model runs on is taken.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modelopt.core.errors import TraceError
from modelopt.core.plugins import PluginTable
from modelopt.torch.trace.meta import RealIntegers
from modelopt.torch.utils import get_module_device, unwrap_model

if TYPE_CHECKING:
    from modelopt.torch.trace.axes import Axes

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

PLUGINS = PluginTable(
    {
        "transformers": "modelopt.torch.trace.plugins.transformers",
        "diffusers": "modelopt.torch.trace.plugins.diffusers",
        "timm": "modelopt.torch.trace.plugins.timm",
        "torchvision": "modelopt.torch.trace.plugins.torchvision",
        "megatron": "modelopt.torch.trace.plugins.megatron",
    }
)
HOW = "Pass dummy_input: a tensor, a tuple of arguments, a dict of keyword arguments, or (args, kwargs)."
# What the code of a model raises when it meets inputs, proxies or devices that it was not written for.
MODEL_ERRORS = (
    TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError, ArithmeticError, NameError, StopIteration,
)  # fmt: skip
SIDES = (32, 28, 224, 64, 299, 128, 96, 16, 8)  # of an image whose size only a later Linear knows


def normalize_inputs(dummy_input: Any) -> Inputs:
    """Bring any of the accepted forms to `(args, kwargs)`.

    Raises TraceError for something that is none of them.

    >>> normalize_inputs({"x": 1})
    ((), {'x': 1})
    >>> normalize_inputs((1, {"mask": 2}))
    ((1,), {'mask': 2})
    """
    if isinstance(dummy_input, Mapping):
        return (), {str(k): v for k, v in dummy_input.items()}
    if isinstance(dummy_input, tuple | list):
        given = tuple(dummy_input)
        if given and isinstance(given[-1], Mapping):
            kwargs = {str(k): v for k, v in given[-1].items()}
            rest = given[:-1]
            inner = len(rest) == 1 and isinstance(rest[0], tuple | list)
            return (tuple(rest[0]) if inner else rest), kwargs
        return given, {}
    if isinstance(dummy_input, Tensor):
        return (dummy_input,), {}
    raise TraceError(f"The inputs are a {type(dummy_input).__name__}. {HOW}")


def resolve_inputs(model: nn.Module, dummy_input: Any = None) -> Inputs:
    """Return `(args, kwargs)` that the model takes: those given, or the first guess that it runs on.

    Raises TraceError if nothing can be guessed, or if the model runs on none of the guesses (its own error is in the message).

    >>> args, kwargs = resolve_inputs(nn.Sequential(nn.Linear(4, 2)))
    >>> args[0].shape
    torch.Size([2, 4])
    """
    if dummy_input is not None:
        return normalize_inputs(dummy_input)
    guesses = candidate_inputs(model)
    first = next(guesses, None)
    if first is None:
        raise TraceError(f"No inputs can be guessed for a {type(model).__name__}{signature(model)}. {HOW}")
    second = next(guesses, None)
    if second is None:
        return first
    failures: list[tuple[Inputs, Exception]] = []
    for guess in (first, second, *guesses):
        try:
            with quiet_run(model), without_weights(model):
                model(*guess[0], **guess[1])
        except MODEL_ERRORS as error:
            failures.append((guess, error))
        else:
            return guess
    guess, first_error = failures[0]
    raise failure(
        model, guess, first_error, f"None of {len(failures)} guessed inputs suits it; the first: ", f" {HOW}"
    ) from first_error


def run(model: nn.Module, inputs: Inputs, context: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Any:
    """Run the forward pass once, in eval mode, without gradients, leaving modes and random numbers as they were.

    Raises TraceError with the model's own error and what was passed.
    """
    try:
        with quiet_run(model), context(), without_weights(model):
            return model(*inputs[0], **inputs[1])
    except TraceError:
        raise
    except MODEL_ERRORS as error:
        raise failure(model, inputs, error) from error


def infer(model: nn.Module, dummy_input: Any = None, **options: Any) -> Axes:
    """Return `infer_axes` of a model on these inputs (guessed if None). A model that fails raises TraceError."""
    from modelopt.torch.trace.axes import infer_axes

    model = unwrap_model(model)
    inputs = resolve_inputs(model, dummy_input)
    try:
        with unchanged(model):
            return infer_axes(model, *inputs, **options)
    except TraceError:
        raise
    except MODEL_ERRORS as error:
        raise failure(model, inputs, error) from error


@contextmanager
def quiet_run(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; attributes of modules, training flags and random state are put back at the end."""
    device = get_module_device(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad(), unchanged(model):
        for module in model.modules():
            if module.training:
                module.training = False
        yield


def without_weights(model: nn.Module) -> AbstractContextManager[Any]:
    """Return what lets a model run whose weights are on the meta device; nothing special for others. Enter it last."""
    return RealIntegers() if any(p.is_meta for p in model.parameters()) else nullcontext()


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put the attributes and buffers of every module back at the end: some forwards keep tensors or counters on `self`."""
    before = [(m, dict(vars(m)), dict(m._buffers)) for m in model.modules()]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            now = vars(module)
            if len(now) != len(attributes) or any(now.get(k) is not v for k, v in attributes.items()):
                now.clear()
                now.update(attributes)
            module._buffers.update(buffers)


def failure(model: nn.Module, inputs: Inputs, error: Exception, before: str = "", after: str = "") -> TraceError:
    reason = " ".join(str(error).split())[:500] or "no message"
    return TraceError(
        f"{type(model).__name__} fails on these inputs. {before}{describe(inputs)}. "
        f"The model's own error: {type(error).__name__}: {reason}.{after}"
    )


def describe(inputs: Inputs) -> str:
    """Return the inputs in words: `input_ids=int64[1, 16], use_cache=False`."""
    shown = [_describe(a) for a in inputs[0]] + [f"{k}={_describe(v)}" for k, v in inputs[1].items()]
    return ", ".join(shown) or "no inputs"


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        device = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{device}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(map(_describe, value)) + ")"
    return repr(value) if isinstance(value, bool | int | float | str | None) else type(value).__name__


def signature(model: nn.Module) -> str:
    """Return the parameters of the model's forward that carry no default, as text: `(x, mask)`."""
    return "(" + ", ".join(required_parameters(model)) + ")"


def forward_parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """Return the parameters of `forward` by name; decorated and patched forwards are followed to the real one."""
    return dict(inspect.signature(model.forward).parameters)


def required_parameters(model: nn.Module) -> list[str]:
    """Return the names of the arguments that `forward` cannot do without (`*args` counts as one)."""
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    found = forward_parameters(model).items()
    return [n for n, p in found if p.default is p.empty and p.kind not in kinds]


def candidate_inputs(model: nn.Module) -> Iterator[Inputs]:
    """Yield plausible inputs, the likeliest first: of the framework's description, else of the first layer."""
    model = unwrap_model(model)
    plugins = PLUGINS.load_for([model])
    for plugin in plugins:
        guess = getattr(plugin, "candidate_inputs", None)
        if guess is not None:
            guesses = list(guess(model))
            if guesses:
                yield from guesses
                return
    required = required_parameters(model)
    parameters = forward_parameters(model)
    count = max(1, len(required))
    if not parameters or any(parameters[n].annotation not in (inspect.Parameter.empty, Tensor, "Tensor", "torch.Tensor")
                             for n in required):  # fmt: skip
        return
    for tensor in _first_layer_inputs(model):
        yield tuple(tensor.clone() for _ in range(count)), {}


def random_input(model: nn.Module, *shape: int) -> Tensor:
    """Return normal noise of that shape, the same at every call, in the model's floating type on the model's device."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    device = get_module_device(model)
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return noise.to(dtype if dtype.itemsize > 1 else torch.float32).to(device)


def token_input(model: nn.Module, vocabulary: int, length: int = 16, first: int = 3, batch: int = 1) -> Tensor:
    """Return int64 token ids [batch, length], all different where the vocabulary is large enough, on the model's device."""
    low = first if vocabulary > first + 1 else 0
    ids = low + torch.arange(batch * length).reshape(batch, length) % max(1, vocabulary - low)
    device = get_module_device(model)
    return ids if device.type == "meta" else ids.to(device)


def _first_layer_inputs(model: nn.Module) -> Iterator[Tensor]:
    first = next((m for m in model.modules() if _is_first(m)), None)
    if isinstance(first, nn.modules.conv._ConvNd):
        rank, channels = len(first.kernel_size), first.in_channels
        if rank == 1:
            yield from (random_input(model, 1, channels, n) for n in (64, 16, 256, 1024))
        elif rank == 2:
            yield from (random_input(model, 1, channels, n, n) for n in SIDES)
        else:
            yield from (random_input(model, 1, channels, d, n, n) for d, n in ((8, 32), (16, 112), (16, 224), (4, 16)))
    elif isinstance(first, nn.Embedding):
        yield token_input(model, first.num_embeddings, min(16, first.num_embeddings))
    elif isinstance(first, nn.Linear):
        yield from (random_input(model, *shape, first.in_features) for shape in ((2,), (2, 8), (1, 4, 4)))
    elif isinstance(first, nn.RNNBase | nn.RNNCellBase):
        yield from (random_input(model, *shape, first.input_size) for shape in ((2, 8), (2,)))
    elif isinstance(first, nn.MultiheadAttention):
        yield random_input(model, 2, 8, first.embed_dim)
    elif isinstance(first, nn.LayerNorm | nn.RMSNorm):
        yield from (random_input(model, *shape, *first.normalized_shape) for shape in ((2, 8), (2,)))
    elif isinstance(first, nn.modules.batchnorm._BatchNorm):
        yield from (random_input(model, 2, first.num_features, *rest) for rest in ((16, 16), (16,), (), (4, 16, 16)))


def _is_first(module: nn.Module) -> bool:
    return isinstance(
        module,
        nn.modules.conv._ConvNd
        | nn.Embedding
        | nn.Linear
        | nn.RNNBase
        | nn.RNNCellBase
        | nn.MultiheadAttention
        | nn.LayerNorm
        | nn.RMSNorm
        | nn.modules.batchnorm._BatchNorm,
    )
