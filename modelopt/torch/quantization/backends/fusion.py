"""Fuse linear layers with the activation between them, where the graph shows them and the GEMM registry has a kernel.

    fuse(model)  ->  Fusions(model, fused, refused):  second(act(first(x)) [* up(x)])  becomes one call

For inference, as the last step: fused layers are called together, so that hooks on them are not. The layers stay where they were,
with their names, weights and quantizers; where an input needs a gradient, they are called one by one.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from modelopt.core.errors import ConfigError
from modelopt.torch.kernels.fused_mlp.reference import activate
from modelopt.torch.quantization.backends.gemm_registry import Chain, Kernel, find_chain
from modelopt.torch.quantization.backends.graph_match import Match, find_chains
from modelopt.torch.quantization.backends.packed_gemm import only_rounds
from modelopt.torch.quantization.nn.modules.quant_linear import QuantLinear
from modelopt.torch.quantization.nn.modules.quant_module import QuantModule


@dataclass(frozen=True)
class Layers:
    """The modules of a chain: `first`, `up` (its output is multiplied by the activation) or None, `second`."""

    first: Any
    up: Any
    second: Any
    activation: str

    @property
    def modules(self) -> tuple[Any, ...]:
        """The modules in the order in which they run."""
        return (self.first, self.second) if self.up is None else (self.first, self.up, self.second)

    def apart(self, x: Tensor) -> Tensor:
        """Call the modules one by one."""
        h = activate(self.first(x), self.activation)
        y: Tensor = self.second(h if self.up is None else h * self.up(x))
        return y


@dataclass(frozen=True)
class Fusion:
    """Layers that are one call now."""

    names: tuple[str, ...]
    activation: str
    kernel: str


@dataclass(frozen=True)
class Fusions:
    """What `fuse` did: the model to use from now on, what was fused, and what looked like it and was not, with the reason."""

    model: nn.Module
    fused: tuple[Fusion, ...]
    refused: tuple[tuple[tuple[str, ...], str], ...]

    def __str__(self) -> str:
        lines = [f"fused    {' + '.join(f.names)} ({f.activation}) by {f.kernel}" for f in self.fused]
        return "\n".join(lines + [f"not      {' + '.join(names)}: {reason}" for names, reason in self.refused])


class FusedLayers(nn.Module):
    """One call of a chain's kernel. The layers belong to the model around it, not to this module."""

    def __init__(self, layers: Layers, kernel: Kernel) -> None:
        super().__init__()
        self.chain = (layers, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N2]."""
        layers, kernel = self.chain
        if torch.is_grad_enabled() and x.requires_grad:
            return layers.apart(x)
        return kernel(x, layers)


class _Tracer(fx.Tracer):
    """Quantized modules are leaves, as those of torch are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, QuantModule) or super().is_leaf_module(m, module_qualified_name)


def fuse(model: nn.Module, graph: fx.Graph | None = None) -> Fusions:
    """Fuse what the graph of the model shows, and return the model with what was fused and what was not, and why.

    Args:
        model: a compressed model in evaluation mode. A GraphModule is rewritten in place; in any other, each module that holds
            two linear layers or more is traced by itself and, where something in it was fused, replaced by its GraphModule
            under the same name. Use `Fusions.model`: it is another object where the model itself was such a module.
        graph: a graph of the whole `model` that calls its modules, if there is one; it is not changed.

    Raises ConfigError for a model in training mode.

    >>> fuse(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).eval()).refused
    ((('0', '2'), '0 is not quantized'),)
    """
    if model.training:
        raise ConfigError("Fused layers are for inference, and the model is in training mode. Call model.eval() first.")
    if graph is not None:
        model = _with_graph(model, graph)
    if isinstance(model, fx.GraphModule):
        fused, refused = _rewrite(model, "")
        return Fusions(model, tuple(fused), tuple(refused))
    done: list[Fusion] = []
    missed: list[tuple[tuple[str, ...], str]] = []
    root: nn.Module = model
    for name, module in list(_holders(model)):
        traced = _trace(module)
        if isinstance(traced, str):
            missed.append(((name or type(module).__name__,), traced))
            continue
        fused, refused = _rewrite(traced, f"{name}." if name else "")
        done, missed = done + fused, missed + refused
        if fused and not name:
            root = traced
        elif fused:
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent)._modules[child] = traced
    return Fusions(root, tuple(done), tuple(missed))


def _holders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that hold two linear layers or more themselves, by name."""
    for name, module in model.named_modules():
        inside = any(isinstance(model.get_submodule(p), fx.GraphModule) for p in _parents(name))
        if sum(isinstance(m, nn.Linear) for m in module.children()) >= 2 and not inside:
            yield name, module


def _parents(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def _trace(module: nn.Module) -> fx.GraphModule | str:
    """Return the module as a GraphModule with all that it holds, or why there is none."""
    if isinstance(module, fx.GraphModule):
        return module
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return "it has no forward of its own"
    if "forward" in module.__dict__ or _hooks(module):
        return "its calls are intercepted (hooks, or a forward of its own)"
    given = inspect.signature(type(module).forward).parameters.values()
    if any(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in given):
        return "its forward has optional arguments, for which a trace would hold one choice"
    try:
        graph = _Tracer().trace(module)
    except (fx.proxy.TraceError, TypeError, ValueError, AttributeError, RuntimeError, KeyError, IndexError, AssertionError) as e:
        return f"it cannot be traced: {type(e).__name__}: {str(e)[:100]}"
    return _with_graph(module, graph)


def _with_graph(module: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Return a GraphModule that holds the children, tensors and plain attributes of `module` and runs a copy of `graph`."""
    traced = fx.GraphModule(module, copy.deepcopy(graph), type(module).__name__)
    for own, theirs in ((traced._modules, module._modules), (traced._parameters, module._parameters)):
        own.update(theirs)  # type: ignore[arg-type]
    traced._buffers.update(module._buffers)
    traced._non_persistent_buffers_set |= module._non_persistent_buffers_set
    for name, value in module.__dict__.items():
        if not name.startswith("_"):
            traced.__dict__.setdefault(name, value)
    return traced.eval()


def _rewrite(traced: fx.GraphModule, prefix: str) -> tuple[list[Fusion], list[tuple[tuple[str, ...], str]]]:
    """Replace what can be fused in a GraphModule; names are given with `prefix`."""
    modules = dict(traced.named_modules(remove_duplicate=False))
    found, missed = find_chains(traced.graph, modules)
    done: list[Fusion] = []
    refused = [(tuple(prefix + n for n in miss.names), miss.reason) for miss in missed]
    for match in found:
        names = tuple(prefix + n for n in match.names)
        up = None if match.up is None else modules[match.up]
        layers = Layers(modules[match.first], up, modules[match.second], match.activation)
        reason, kernel = _kernel_for(layers, names, [modules[str(n.target)] for n in match.nodes if n.op == "call_module"])
        if kernel is None:
            refused.append((names, reason))
            continue
        _replace(traced, match, FusedLayers(layers, kernel))
        done.append(Fusion(names, match.activation, getattr(kernel, "__name__", type(kernel).__name__)))
    if done:
        traced.recompile()
    return done, refused


def _replace(traced: fx.GraphModule, match: Match, fused: FusedLayers) -> None:
    number = sum(isinstance(m, FusedLayers) for m in traced.children())
    traced.add_module(f"fused_{number}", fused.eval())
    last = match.nodes[-1]
    with traced.graph.inserting_before(last):
        new = traced.graph.call_module(f"fused_{number}", (match.source,))
    new.meta = dict(last.meta)
    last.replace_all_uses_with(new)
    for node in reversed(match.nodes):
        traced.graph.erase_node(node)


def _kernel_for(layers: Layers, names: tuple[str, ...], called: list[nn.Module]) -> tuple[str, Kernel | None]:
    """Return ("", kernel), or (why there is none, None)."""
    for name, module in zip(names, layers.modules, strict=True):
        reason = _unready(module)
        if reason:
            return f"{name} {reason}", None
    if any(_hooks(m) for m in called):
        return "hooks watch these layers", None
    if layers.up is not None and not _same_input(layers.first, layers.up):
        return f"{names[0]} and {names[1]} quantize their input differently", None
    weights = {m.weight_packed.format for m in layers.modules}
    found = Chain(
        layers.activation,
        "no" if layers.up is None else "yes",
        layers.first.input_quantizer.op_arguments()[0],
        " and ".join(sorted(weights)) if len(weights) > 1 else weights.pop(),
        layers.second.input_quantizer.op_arguments()[0],
        str(layers.first.weight_packed.dtype).removeprefix("torch."),
    )
    kernel = find_chain(found)
    return ("", kernel) if kernel is not None else (f"no kernel is registered for {found}", None)


def _unready(module: Any) -> str:
    """Return why the module cannot be part of a fused call, or ""."""
    if not isinstance(module, QuantLinear):
        return "is not quantized"
    if "forward" in module.__dict__:
        return "has a forward of its own"
    if "weight_packed" not in module._modules:
        if not module.weight_quantizer.is_enabled:
            return "has no quantized weight"
        return "holds values, not codes: compress the model first"
    if module.output_quantizer.is_enabled:
        return "quantizes its output"
    if not only_rounds(module.input_quantizer):
        return "does not quantize its input, or does more than that"
    fmt = module.input_quantizer.format
    if not fmt.dynamic and module.input_quantizer.amax is None:
        return "was not calibrated"
    return ""


def _same_input(a: Any, b: Any) -> bool:
    one, other = a.input_quantizer.op_arguments(), b.input_quantizer.op_arguments()
    tops = [(x, y) for x, y in zip(one[1:], other[1:], strict=True) if x is not None or y is not None]
    return one[0] == other[0] and all(x is not None and y is not None and torch.equal(x, y) for x, y in tops)


def _hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
