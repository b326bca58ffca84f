"""Where the entries of a pruned model come from: every float entry of the dense model has one number, over all of its tensors.

    number = offset of its tensor + flat index        (in the order of named_parameters, named_buffers; tied ones once)

A pruner is followed in one of two ways: it prunes a copy whose entries *are* their numbers, which survive slicing, reordering and
renaming; or it says which indices of each dimension it kept. float64 holds the numbers exactly up to 2^53.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelopt.core.errors import ConfigError

Kept = Mapping[str, Sequence[Any] | None]


class OriginError(ConfigError):
    """A pruned model whose entries are not those of the dense model."""


def named_floats(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the float parameters and buffers, with every name of a tied one."""
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        if tensor.is_floating_point() or tensor.is_complex():
            yield name, tensor


def float64_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy on the CPU in float64 and eval mode, plain tensor attributes included (8 bytes per parameter)."""
    model = copy.deepcopy(model).cpu().double().eval().requires_grad_(False)
    for module in model.modules():
        config = module.__dict__.get("config")
        if hasattr(config, "_experts_implementation"):  # transformers: grouped products have no float64
            config._experts_implementation = "eager"
        for key, value in list(module.__dict__.items()):
            if isinstance(value, Tensor):
                module.__dict__[key] = value.detach().cpu().double() if value.is_floating_point() else value.cpu()
    return model


@dataclass(frozen=True)
class Origins:
    """The numbering of the float entries of one dense model (a float64 copy, whose values may change later)."""

    tensors: tuple[Tensor, ...]
    names: tuple[str, ...]
    offsets: Tensor
    index: Mapping[str, int]

    @classmethod
    def of(cls, model: nn.Module) -> Origins:
        tensors: list[Tensor] = []
        names, index, seen = [], {}, {}
        for name, tensor in named_floats(model):
            if id(tensor) not in seen:
                seen[id(tensor)] = len(tensors)
                tensors.append(tensor)
                names.append(name)
            index[name] = seen[id(tensor)]
        sizes = torch.tensor([0] + [t.numel() for t in tensors], dtype=torch.int64)
        return cls(tuple(tensors), tuple(names), sizes.cumsum(0), index)

    @torch.no_grad()
    def tag(self, model: nn.Module) -> None:
        """Replace every float entry of `model`, a copy of the dense model, by its number."""
        for name, tensor in named_floats(model):
            k = self.index[name]
            start = int(self.offsets[k])
            tensor.data = torch.arange(start, start + tensor.numel(), dtype=torch.float64).reshape(tensor.shape).to(tensor.dtype)

    def read(self, pruned: nn.Module) -> dict[str, Tensor]:
        """Return the numbers of the entries of each tensor of a pruned tagged model.

        Raises OriginError where an entry is no number of the dense model: the pruner computed with the values.
        """
        found = {}
        for name, tensor in named_floats(pruned):
            values = tensor.detach().real.double() if tensor.is_complex() else tensor.detach().double()
            numbers = values.round().long()
            if numbers.numel() and (
                bool((numbers != values).any()) or int(numbers.min()) < 0 or int(numbers.max()) >= self.total
            ):
                raise OriginError(
                    f"{name} of the pruned model holds entries that are none of the dense model: it was computed, not cut."
                )
            found[name] = numbers
        return found

    def from_kept(self, pruned: nn.Module, kept: Kept) -> dict[str, Tensor]:
        """Return the same from the kept indices of each dimension (None: all of it; a name that is absent: whole).

        Raises OriginError for names and shapes that do not fit.
        """
        found = {}
        for name, tensor in named_floats(pruned):
            if name not in self.index:
                raise OriginError(f"{name} of the pruned model is not a tensor of the dense model.")
            k = self.index[name]
            source = self.tensors[k]
            numbers = torch.arange(source.numel()).reshape(source.shape) + self.offsets[k]
            for dim, indices in enumerate(kept.get(name) or ()):
                if indices is not None:
                    numbers = numbers.index_select(dim, torch.as_tensor(indices, dtype=torch.int64).reshape(-1))
            if numbers.shape != tensor.shape:
                raise OriginError(
                    f"{name} of the pruned model is {tuple(tensor.shape)}; "
                    f"the kept indices leave {tuple(numbers.shape)} of {tuple(source.shape)}."
                )
            found[name] = numbers
        return found

    @property
    def total(self) -> int:
        return int(self.offsets[-1])

    def gather(self, numbers: Tensor) -> Tensor:
        """Return the values of the dense model with these numbers."""
        flat = numbers.reshape(-1)
        if flat.numel():
            first, last = (int(torch.searchsorted(self.offsets, n, right=True)) - 1 for n in flat.aminmax())
            if first == last:  # the rule: a tensor is a part of one tensor
                return self.tensors[first].reshape(-1)[flat - self.offsets[first]].reshape(numbers.shape)
        which = torch.bucketize(flat, self.offsets, right=True) - 1
        out = torch.empty(flat.shape, dtype=torch.float64)
        for k in which.unique().tolist():
            of_k, tensor = which == k, self.tensors[k]
            out = out.to(tensor.dtype) if tensor.is_complex() else out
            out[of_k] = tensor.reshape(-1)[flat[of_k] - self.offsets[k]]
        return out.reshape(numbers.shape)

    @torch.no_grad()
    def fill(self, pruned: nn.Module, numbers: Mapping[str, Tensor]) -> None:
        """Put the dense model's values into a pruned model; tensors that were tied stay tied."""
        for name, tensor in named_floats(pruned):
            tensor.data = self.gather(numbers[name])

    def contradictions(self, pruned: nn.Module, numbers: Mapping[str, Tensor]) -> str | None:
        """Return what is wrong with the ties: one tensor of the dense model that was cut differently under its names."""
        shared: dict[int, str] = {}
        for name in numbers:
            k = self.index.get(name)
            other = None if k is None else shared.setdefault(k, name)
            if other is not None and not torch.equal(numbers[other], numbers[name]):
                return f"{other} and {name} are one tensor of the dense model, but different entries of it were kept."
        return None

    def dead(self, numbers: Mapping[str, Tensor]) -> list[Tensor | None]:
        """Return for each tensor of the dense model the mask of the entries that the pruned model lacks (None: it has all)."""
        alive = torch.zeros(self.total, dtype=torch.bool)
        for values in numbers.values():
            alive[values.reshape(-1)] = True
        masks: list[Tensor | None] = []
        for k, tensor in enumerate(self.tensors):
            mask = ~alive[self.offsets[k] : self.offsets[k + 1]].reshape(tensor.shape)
            masks.append(mask if bool(mask.any()) else None)
        return masks


@torch.no_grad()
def perturb(model: nn.Module, seed: int, strength: float = 1.0) -> None:
    """Add noise to every parameter and running statistic, so that no value initialized to 0 or 1 hides a wrong channel."""
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    parameters = {id(p) for p in model.parameters()}
    for name, tensor in named_floats(model):
        statistic = name.endswith(("running_mean", "running_var"))
        if id(tensor) in seen or not (id(tensor) in parameters or statistic) or tensor.is_complex():
            continue
        seen.add(id(tensor))
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
        fan_in = max(1, tensor.numel() // max(1, tensor.shape[0])) if tensor.dim() > 1 else 1
        scale = 0.3 * fan_in**-0.5 if tensor.dim() > 1 else 0.05
        noise = noise.abs() if name.endswith("running_var") else noise
        tensor.data = torch.add(tensor.data, noise, alpha=strength * scale)
