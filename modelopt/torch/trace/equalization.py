"""Equalization: channels that one layer can hand on larger if the next reads them smaller, and the function stays the same.

    y = W2 f(W1 x + b1) = (W2 S^-1) f(S W1 x + S b1)         for f with f(s x) = s f(x), s > 0, and S diagonal

Between producer and consumers stand only operations that keep a positive factor: ReLU, pooling, products with other tensors, the
values in attention. Nagel et al., arXiv 1906.04721; SmoothQuant (arXiv 2211.10438) and AWQ (arXiv 2306.00978) use the same pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelopt.core.errors import ShapeError
from modelopt.torch.trace.flow import Slot, follow
from modelopt.torch.utils import unwrap_model


@dataclass(frozen=True, eq=False)
class EqualizationPair:
    """Parameter dimensions to multiply (`producers`) and to divide (`consumers`) by the same positive factors.

    Each maps (parameter name, dimension) to the number of the factor of every index, -1 where an index must stay as it is.
    `size` is the number of factors. The name `parameter[3]` is slice 3 of a stacked parameter.
    """

    producers: dict[Slot, Tensor]
    consumers: dict[Slot, Tensor]
    size: int

    @property
    def name(self) -> str:
        """A name for people: `mlp.up_proj.weight -> mlp.down_proj.weight`."""
        makes, reads = (list(dict.fromkeys(n for n, _ in slots)) for slots in (self.producers, self.consumers))
        return f"{', '.join(makes)} -> {', '.join(reads)}"

    def apply(self, model: nn.Module, factors: Tensor) -> None:
        """Multiply and divide the parameters of `model`, in place, by positive `factors` [size]. Raises ShapeError."""
        if tuple(factors.shape) != (self.size,) or not bool((factors > 0).all()):
            raise ShapeError(f"{self.name} takes {self.size} positive factors; given were {tuple(factors.shape)}.")
        parameters: dict[str, Tensor] = dict(unwrap_model(model).named_parameters())
        padded = torch.cat([factors, factors.new_ones(1)])
        with torch.no_grad():
            for slots, values in ((self.producers, padded), (self.consumers, 1 / padded)):
                for (name, dim), numbers in slots.items():
                    whole, _, index = name.partition("[")
                    tensor = parameters[whole]
                    if index:
                        tensor, dim = tensor[int(index[:-1])], dim - 1
                    shape = [-1 if d == dim else 1 for d in range(tensor.dim())]
                    tensor.mul_(values[numbers].to(tensor.device, tensor.dtype).reshape(shape))


def equalization_pairs(model: nn.Module, dummy_input: Any = None) -> tuple[EqualizationPair, ...]:
    """Return all pairs of a model in order of execution, found in one forward pass; the model is not changed.

    Args:
        model: any module, on any device, "meta" included.
        dummy_input: inputs (tensor, tuple, dict or `(args, kwargs)`); None guesses them.

    Raises TraceError if the model does not run.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [(pair.name, pair.size) for pair in equalization_pairs(model)]
    [('0.weight, 0.bias -> 2.weight', 8)]
    """
    found = []
    for made, read in follow(model, dummy_input).parts():
        numbers = sorted({n for table in (made, read) for t in table.values() for n in t.tolist() if n >= 0})
        order = {n: i for i, n in enumerate(numbers)} | {-1: -1}
        short = [{slot: torch.tensor([order[n] for n in t.tolist()]) for slot, t in table.items()} for table in (made, read)]
        found.append(EqualizationPair(short[0], short[1], len(numbers)))
    return tuple(found)
