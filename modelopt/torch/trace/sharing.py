"""Which layers read one and the same tensor: q, k and v; gate and up; the experts of a layer.

Taken from what ran, not from names: from a recorded forward pass (`shared_inputs`), or on the side while a model runs over its
calibration data (`watch_inputs`). Cross-attention shows why: its k and v read the encoder, its q does not.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from modelopt.core.errors import TraceError
from modelopt.torch.trace.record_graph import Recording, record

if TYPE_CHECKING:
    from modelopt.torch.trace.axes import Axes
    from modelopt.torch.trace.tracer import GraphCollection

Groups = tuple[tuple[str, ...], ...]
KEY = "_modelopt_shared_inputs"


def is_linear_like(module: nn.Module) -> bool:
    """Return whether a module multiplies its input by a matrix of its own: it has a 2-D floating `weight` and is no lookup."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and weight.is_floating_point() and not isinstance(module, nn.Embedding)


def shared_inputs(
    source: nn.Module | GraphCollection | Recording | Axes,
    dummy_input: Any = None,
    *,
    experts: bool = True,
    siblings: bool = False,
) -> Groups:
    """Return the groups (two members or more) of linear layers that read one tensor, as dotted names in order of execution.

    Args:
        source: a model (it runs once), its graphs, a recording, or the result of axis inference.
        dummy_input: inputs for a model; None guesses them.
        experts: layers that each read some rows of one tensor belong together too (needs a model, graphs or a recording).
        siblings: only layers of one parent module belong together: what engines fuse into one matrix product.

    >>> class Gated(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.gate, self.up, self.down = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)
    ...     def forward(self, x):
    ...         return self.down(self.gate(x) * self.up(x))
    >>> shared_inputs(Gated())
    (('gate', 'up'),)
    """
    if isinstance(source, nn.Module):
        from modelopt.torch.trace.inputs import resolve_inputs
        from modelopt.torch.utils import unwrap_model

        source = unwrap_model(source)
        source = record(source, resolve_inputs(source, dummy_input))
    recording = source if isinstance(source, Recording) else getattr(source, "recording", None)
    if recording is not None:
        if recording.error is not None:
            raise TraceError(f"Which layers share inputs is unknown: {recording.error}")
        calls = recording.calls
        read = [(c.name, (c.sources if experts else c.inputs)[0]) for c in calls if c.inputs and is_linear_like(c.module)]
        return group(read, siblings)
    axes: Any = source
    two = {n.removesuffix(".weight") for n, shape in axes.shapes.items() if n.endswith(".weight") and len(shape) == 2}
    ran = [c for c in axes.calls if c.name in two and c.inputs and c.inputs[0].dtype.is_floating_point]
    return group(((c.name, c.inputs[0].id) for c in ran), siblings)


def group(read: Iterable[tuple[str, int]], siblings: bool = False) -> Groups:
    """Return the groups of names among (name, tensor) pairs: names that read one tensor, directly or through another name.

    >>> group([("a", 1), ("b", 1), ("c", 2), ("b", 3), ("d", 3)])
    (('a', 'b', 'd'),)
    """
    leader: dict[str, str] = {}
    first: dict[tuple[int, str], str] = {}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    for name, tensor in read:
        leader.setdefault(name, name)
        other = first.setdefault((tensor, name.rpartition(".")[0] if siblings else ""), name)
        one, two = find(other), find(name)
        if one != two:
            leader[two] = one
    members: dict[str, list[str]] = {}
    for name in leader:
        members.setdefault(find(name), []).append(name)
    return tuple(tuple(m) for m in members.values() if len(m) > 1)


@contextmanager
def watch_inputs(model: nn.Module) -> Iterator[None]:
    """Note on the side, while `model` runs inside, which of its layers read one tensor; `seen_inputs(model)` answers afterwards.

    Costs a few microseconds for each layer. What earlier runs saw is replaced.
    """
    live: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
    read: dict[tuple[str, int], None] = {}
    numbers = 0

    def note(name: str, args: Any, kwargs: Any) -> None:
        nonlocal numbers
        tensor = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
        if tensor is None:
            return
        known = live.get(id(tensor))
        if known is None or known[0]() is not tensor or known[1] != tensor._version:
            numbers += 1
            known = live[id(tensor)] = (weakref.ref(tensor), tensor._version, numbers)
        read[name, known[2]] = None

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if is_linear_like(module):
                hook = module.register_forward_pre_hook(lambda m, a, k, name=name: note(name, a, k), with_kwargs=True)
                stack.callback(hook.remove)
        yield
    if read:
        model.__dict__[KEY] = (tuple(dict.fromkeys(name for name, _ in read)), group(read, siblings=True))


def seen_inputs(model: nn.Module) -> tuple[tuple[str, ...], Groups] | None:
    """Return what `watch_inputs` saw: the names of the layers that ran, and the groups of siblings that read one tensor."""
    return model.__dict__.get(KEY)
