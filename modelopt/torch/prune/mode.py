"""The steps of structured pruning, as modes.

structured  config: StructuredConfig    state: {"structure": shapes and repaired attributes, "report": what was removed}
fastnas     config: FastNASConfig       state: the same; NVIDIA's name, a search by measured sensitivity
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from modelopt.core.config import Config
from modelopt.core.errors import CheckpointError
from modelopt.torch.opt.mode import Mode
from modelopt.torch.prune.algorithms.fastnas import plan_fastnas
from modelopt.torch.prune.config import FastNASConfig, StructuredConfig
from modelopt.torch.prune.depth import remove_units
from modelopt.torch.prune.importance import Data
from modelopt.torch.prune.pruning import Plan, Task, carry_out, plan_structured
from modelopt.torch.trace.axes.apply import reapply

_DATA = ("forward_loop", "data_loader", "loss_func", "num_batches")


class StructuredMode(Mode):
    """Remove whole slices of the model, by share or by a limit on its cost."""

    name = "structured"
    Config: ClassVar[type[Config]] = StructuredConfig
    repeatable = True
    rewrites = True
    done: dict[str, Any]

    def apply(self, model: nn.Module, config: Any, dummy_input: Any = None, **runtime: Any) -> nn.Module:
        """Prune in place. On any failure the model is what it was."""
        data = Data(seed=config.seed, **{k: runtime[k] for k in _DATA if k in runtime})
        task = Task.of(model, config, dummy_input, data)
        report, structure = carry_out(task, self.plan(task, runtime))
        self.done = {"structure": structure, "report": report}
        return model

    def plan(self, task: Task, runtime: dict[str, Any]) -> Plan:
        """Decide what goes."""
        return plan_structured(task)

    def state(self, model: nn.Module, config: Any) -> dict[str, Any]:
        """Return what was done when the step was applied; later steps do not change it."""
        return self.done

    def restore(self, model: nn.Module, config: Any, state: dict[str, Any]) -> nn.Module:
        """Give a freshly built model the pruned shapes and attributes; its tensors are loaded afterwards."""
        structure = state.get("structure")
        if not isinstance(structure, dict) or set(structure) != {"axes", "layers"}:
            raise CheckpointError('The state of a pruning must hold "structure": {"axes": {...}, "layers": {...}}.')
        layers = structure["layers"]
        if not isinstance(layers, dict) or not all(
            isinstance(kept, list) and all(type(i) is int for i in kept) for kept in layers.values()
        ):
            raise CheckpointError(f'"layers" must hold lists of the blocks that stay; seen: {layers!r:.80}.')
        remove_units(model, layers)
        reapply(model, structure["axes"])
        self.done = state
        return model


class FastNASMode(StructuredMode):
    """Remove channels as far as the measured sensitivity of each family allows, to meet constraints."""

    name = "fastnas"
    Config: ClassVar[type[Config]] = FastNASConfig

    def plan(self, task: Task, runtime: dict[str, Any]) -> Plan:
        """Measure, then search."""
        return plan_fastnas(task, runtime.get("score_func"), runtime.get("checkpoint"))
