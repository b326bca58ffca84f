"""A quantized model as one file: a `torch.export` program, in which every quantizer is one node.

`modelopt::fake_quantize` nodes need `import modelopt.torch.kernels` where the program is loaded.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelopt.core.errors import ExportError
from modelopt.torch.calibration.executor import input_spec
from modelopt.torch.utils.network import get_module_device


def export_torch_model(model: nn.Module, path: str | Path, example_inputs: Any = None) -> None:
    """Trace `model` with `torch.export` and save the program to `path`; `torch.export.load(path).module()` runs it.

    Args:
        model: any module; it is not changed.
        path: the file, by custom `.pt2`. An existing file is replaced, at the end and in one step.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of named ones. None takes the shapes and dtypes
            of the first call that calibration made. The first dimension of every tensor is dynamic where its size allows (>= 2).

    Raises ExportError without inputs, or where the model cannot be traced.

    >>> export_torch_model(model, "model.pt2", example_inputs=torch.zeros(2, 16))    # doctest: +SKIP
    """
    args, kwargs = _arguments(model, example_inputs)
    target = Path(path)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            program = _trace(model, args, kwargs)
    finally:
        model.train(was_training)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent or ".")
    os.close(descriptor)
    stage = Path(name)
    try:
        with stage.open("wb") as file:
            torch.export.save(program, file)
        stage.replace(target)
    except OSError as error:
        raise ExportError(f"{target} cannot be written: {error.strerror or error}.") from error
    finally:
        stage.unlink(missing_ok=True)


def _trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = [*args, *kwargs.values()]
    dynamic = any(isinstance(v, Tensor) and v.dim() and v.shape[0] >= 2 for v in names)
    shapes = (tuple(_dims(v) for v in args), {k: _dims(v) for k, v in kwargs.items()})
    failure: Exception | None = None
    for specification in (_combined(model, *shapes) if dynamic else None, None):
        try:
            return torch.export.export(model, args, kwargs, dynamic_shapes=specification, strict=False)
        except (RuntimeError, ValueError, TypeError, AssertionError, torch._dynamo.exc.TorchDynamoException) as error:
            failure = error
    raise ExportError(f"torch.export cannot trace this {type(model).__name__}: {str(failure).splitlines()[0]}") from failure


def _dims(value: Any) -> Any:
    return {0: torch.export.Dim.AUTO} if isinstance(value, Tensor) and value.dim() and value.shape[0] >= 2 else None


def _combined(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    import inspect

    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _arguments(model: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example is None:
        recorded = input_spec(model)
        if recorded is None:
            raise ExportError(
                "No input shapes were recorded at calibration. Pass example_inputs=, a tensor or a tuple of tensors."
            )
        device = get_module_device(model)
        kwargs = {k: _example(v, device) for k, v in recorded["kwargs"].items()}
        return tuple(_example(a, device) for a in recorded["args"]), kwargs
    if isinstance(example, dict):
        return (), dict(example)
    if isinstance(example, tuple | list):
        return tuple(example), {}
    return (example,), {}


def _example(value: Any, device: torch.device) -> Any:
    """Make an input of a recorded specification {"shape", "dtype"}; a list of them, or any other plain value, is itself."""
    if isinstance(value, list):
        return [_example(v, device) for v in value]
    if not isinstance(value, dict):
        return value
    if "unknown" in value:
        raise ExportError(f"Calibration passed a {value['unknown']}, of which no example can be made. Pass example_inputs=.")
    return torch.zeros(value["shape"], dtype=getattr(torch, value["dtype"]), device=device)
