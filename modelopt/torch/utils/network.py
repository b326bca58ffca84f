"""Questions about a network: where it lives, how large it is, what it is wrapped in, and what sits under a dotted name."""

from __future__ import annotations

import torch
from torch import nn

from modelopt.core.errors import UnknownNameError, did_you_mean


def get_module_device(module: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer, or the CPU for a module that has none.

    >>> get_module_device(nn.Linear(2, 2))
    device(type='cpu')
    """
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def is_parallel(model: nn.Module) -> bool:
    """Return whether the model is wrapped for data parallelism (its own module sits under `.module`)."""
    return isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model inside `DataParallel`, `DistributedDataParallel` and `torch.compile` wrappers, however nested.

    The wrapper of `torch.compile` is known by its `_orig_mod`, so that dynamo is not imported to name its class.

    >>> inner = nn.Linear(2, 2)
    >>> unwrap_model(nn.DataParallel(inner)) is inner
    True
    """
    while True:
        if is_parallel(model):
            model = model._modules["module"]  # type: ignore[assignment]
        elif type(model).__name__ == "OptimizedModule" and isinstance(model._modules.get("_orig_mod"), nn.Module):
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            return model


def num_parameters(model: nn.Module, trainable_only: bool = False) -> int:
    """Return the number of parameters; a tied parameter counts once.

    >>> num_parameters(nn.Linear(3, 2))
    8
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def get_submodule(model: nn.Module, name: str) -> nn.Module:
    """Return the submodule with the dotted `name` ("" is the model itself), through `_modules` only.

    Raises UnknownNameError, with the nearest name. Unlike `nn.Module.get_submodule`, no other attribute is ever touched,
    so a name that was read from a file can be passed.
    """
    module = model
    for part in name.split(".") if name else ():
        child = module._modules.get(part)
        if child is None:
            known = [n for n, _ in model.named_modules(remove_duplicate=False) if n]
            raise UnknownNameError(f'There is no submodule "{name}" in {type(model).__name__}.{did_you_mean(name, known)}')
        module = child
    return module


def set_submodule(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` under the dotted `name`, which must exist. Other names of a shared module keep the old one.

    Raises UnknownNameError for a name that is not there, the empty name included.
    """
    get_submodule(model, name)
    parent, _, leaf = name.rpartition(".")
    if not leaf:
        raise UnknownNameError("The model itself cannot be replaced within itself. Name a submodule.")
    get_submodule(model, parent)._modules[leaf] = new
