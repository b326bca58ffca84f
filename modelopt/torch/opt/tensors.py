"""The tensors of a model by name: which are tied, whether a file fits them, and putting the file's bits in place.

Names are those of `state_dict()`. Two names are tied when they hold the same memory with the same shape, stride and type.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modelopt.core.errors import CheckpointError
from modelopt.core.logging import logger
from modelopt.torch.opt.files import TensorInfo, TensorSource
from modelopt.torch.opt.surgery import walk

_SHOWN = 5


@dataclass(frozen=True)
class Slot:
    """A place in a module where a parameter or a persistent buffer lives."""

    module: nn.Module
    leaf: str

    @property
    def is_parameter(self) -> bool:
        """Whether the slot holds a parameter (else a buffer)."""
        return self.leaf in self.module._parameters

    @property
    def tensor(self) -> Tensor:
        """The tensor in the slot."""
        found: Tensor | None = self.module._parameters.get(self.leaf)
        found = self.module._buffers[self.leaf] if found is None else found
        if found is None:
            raise CheckpointError(f'The buffer "{self.leaf}" of a {type(self.module).__name__} is empty.')
        return found

    def put(self, tensor: Tensor) -> None:
        """Put a tensor in the slot, without any `__setattr__` of the module."""
        if self.is_parameter:
            keep = isinstance(tensor, nn.Parameter)
            self.module._parameters[self.leaf] = tensor if keep else nn.Parameter(tensor, requires_grad=False)  # type: ignore[assignment]
        else:
            self.module._buffers[self.leaf] = tensor


def slots(model: nn.Module) -> dict[str, Slot]:
    """Return every parameter and persistent buffer under every name it has."""
    found: dict[str, Slot] = {}
    for name, module in walk(model, duplicates=True):
        prefix = f"{name}." if name else ""
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(
                f'The module "{name}" ({type(module).__name__}) keeps extra state that is no tensor; it cannot be saved.'
            )
        filled = [n for n, p in module._parameters.items() if p is not None]
        filled += [n for n, b in module._buffers.items() if b is not None and n not in module._non_persistent_buffers_set]
        found.update((prefix + leaf, Slot(module, leaf)) for leaf in filled)
    return found


def empty_buffers(model: nn.Module) -> dict[str, Slot]:
    """Return the persistent buffers that are registered as None: a file may fill them."""
    found: dict[str, Slot] = {}
    for name, module in walk(model, duplicates=True):
        prefix = f"{name}." if name else ""
        leaves = [n for n, b in module._buffers.items() if b is None and n not in module._non_persistent_buffers_set]
        found.update((prefix + leaf, Slot(module, leaf)) for leaf in leaves)
    return found


def _memory(tensor: Tensor) -> tuple[object, ...]:
    if tensor.device.type == "meta" or not tensor.numel() or type(tensor) not in (Tensor, nn.Parameter):
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def gather(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (tensors by first name, other name -> first name). Tensors that overlap without being tied are copied apart."""
    first: dict[tuple[object, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    used: set[tuple[str, int]] = set()
    for name, slot in slots(model).items():
        tensor = slot.tensor.detach()
        owner = first.setdefault(_memory(slot.tensor), name)
        if owner != name:
            aliases[name] = owner
            continue
        storage = (str(tensor.device), tensor.untyped_storage().data_ptr() if tensor.device.type != "meta" else id(tensor))
        tensors[name] = tensor.clone() if storage in used and tensor.numel() else tensor
        used.add(storage)
    return tensors, aliases


def fill_empty_buffers(model: nn.Module, infos: Mapping[str, TensorInfo], device: torch.device | str) -> None:
    """Give each buffer that the structure leaves None, and for which there is a tensor, uninitialized memory of its kind."""
    for name, slot in empty_buffers(model).items():
        if name in infos:
            slot.module._buffers[slot.leaf] = torch.empty(infos[name].shape, dtype=infos[name].dtype, device=device)


def shadow(model: nn.Module) -> nn.Module | None:
    """Return a copy of the model on the meta device (no memory), or None where the model cannot be copied."""
    memo: dict[int, object] = {}
    for _, module in walk(model):
        for parameter in module._parameters.values():
            if parameter is not None:
                memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        for buffer in module._buffers.values():
            if buffer is not None:
                memo[id(buffer)] = buffer.detach().to("meta")
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        logger.debug("The model cannot be copied for a trial (%s); it is checked while it is changed.", error)
        return None


def plan(model: nn.Module, source: TensorSource, what: str) -> dict[str, list[str]]:
    """Return {name in the file: names in the model that it fills}. Raises CheckpointError if the file is of another model.

    Every tensor of the model must be filled and every tensor of the file used, with equal shapes. A name that the file lacks is
    filled by what the model ties it to. A buffer that is None in the model may be filled too.
    """
    have, optional = slots(model), empty_buffers(model)
    origin = {name: source.aliases.get(name, name) for name in [*source.infos, *source.aliases]}
    tied: dict[tuple[object, ...], str] = {}
    for name in have:
        if name in origin:
            tied.setdefault((id(have[name].tensor),), name)
    filled: dict[str, list[str]] = {}
    missing = []
    for name, slot in have.items():
        known = name if name in origin else tied.get((id(slot.tensor),))
        if known is None:
            missing.append(f"{name} {list(slot.tensor.shape)}")
        else:
            filled.setdefault(origin[known], []).append(name)
    for name in optional:
        if name in origin:
            filled.setdefault(origin[name], []).append(name)
    unexpected = [f"{n} {list(source.infos[o].shape)}" for n, o in origin.items() if n not in have and n not in optional]
    mismatched = [
        f"{n} (file {list(source.infos[o].shape)}, model {list(have[n].tensor.shape)})"
        for o, names in filled.items()
        for n in names
        if n in have and tuple(have[n].tensor.shape) != source.infos[o].shape
    ]
    problems = [
        f"{len(found)} {kind}: {', '.join(found[:_SHOWN])}{', ...' if len(found) > _SHOWN else ''}"
        for kind, found in (
            ("missing from the file", missing),
            ("unknown to the model", unexpected),
            ("of another shape", mismatched),
        )
        if found
    ]
    if problems:
        raise CheckpointError(
            f"{what} does not fit this {type(model).__name__}. Tensors {'; '.join(problems)}. "
            "Build the model with the configuration that it was saved with."
        )
    return filled


@torch.no_grad()
def load(model: nn.Module, source: TensorSource, filled: Mapping[str, list[str]]) -> None:
    """Fill the model by a `plan`, bit for bit: the type of the file wins, ties become those of the file, identities are kept."""
    device = _device(model)
    empty = empty_buffers(model)
    have = {**slots(model), **empty}
    claimed: set[tuple[object, ...]] = set()
    for origin, names in filled.items():
        value = source.get(origin)
        old = None if names[0] in empty else have[names[0]].tensor
        if old is None or _memory(old) in claimed:
            new = value.to(device) if old is None else value.to(old.device)
            if old is not None and have[names[0]].is_parameter:
                new = nn.Parameter(new, requires_grad=old.requires_grad and new.is_floating_point())
        else:
            new = _replace(old, value, device)
        claimed.add(_memory(new))
        for name in names:
            if name in empty or have[name].tensor is not new:
                have[name].put(new)


def _device(model: nn.Module) -> torch.device:
    for slot in slots(model).values():
        if slot.tensor.device.type != "meta":
            return slot.tensor.device
    return torch.device("cpu")


def _replace(old: Tensor, value: Tensor, device: torch.device) -> Tensor:
    if old.device.type != "meta" and not old.is_inference():
        if old.dtype == value.dtype:
            old.copy_(value)
            return old
        if value.is_floating_point() or not old.requires_grad:
            old.data = value.to(old.device)
            return old
    new = value.to(device if old.device.type == "meta" else old.device)
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, requires_grad=old.requires_grad and new.is_floating_point())
    return new
