"""From an ordinary model to one with quantizers, and from rules to what each quantizer does.

plan(model)                     every module that has a quantized class, with the names of its quantizers; changes nothing
replace_quant_module(model)     the classes change, the quantizers come in, all of them disabled
set_quantizer_by_cfg(model, c)  each quantizer gets what the strongest rule says (rules.py)
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from modelopt.core.errors import ConfigError, ModelOptError
from modelopt.core.match import matches
from modelopt.core.plugins import PluginTable
from modelopt.torch.opt.surgery import convert_class, original_class, revert_class, walk
from modelopt.torch.quantization.config import QuantizeConfig, QuantizerAttributeConfig
from modelopt.torch.quantization.nn.modules import QuantModule, QuantModuleRegistry, SequentialQuantizer, TensorQuantizer
from modelopt.torch.quantization.nn.modules.quant_module import Quantizer, quantized_class
from modelopt.torch.quantization.quantizer_state import apply_structure, structure_of
from modelopt.torch.quantization.rules import QuantizerRule, resolve_rules, warn_unmatched

PLUGINS = PluginTable({"transformers": "modelopt.torch.quantization.plugins.transformers"})

Filter = str | Callable[[str], bool]


@dataclass(frozen=True)
class PlannedModule:
    """A module that can be quantized: its name, itself, the behaviour registered for it, and its quantizers' attribute paths."""

    name: str
    module: nn.Module
    base: type[QuantModule]
    quantizers: tuple[str, ...]

    def full_name(self, quantizer: str) -> str:
        """Return the dotted name of a quantizer in the model."""
        return f"{self.name}.{quantizer}" if self.name else quantizer

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names by which a rule may call the module: `nn.Linear`, and in full, with those of its bases."""
        return class_names(original_class(self.module))


@functools.cache
def class_names(cls: type) -> tuple[str, ...]:
    """Return the names of a class and its bases, as rules spell them."""
    names: list[str] = []
    for base in cls.__mro__:
        if base in (nn.Module, object) or issubclass(base, QuantModule):
            continue
        if base.__module__.startswith("torch.nn.modules."):
            names.append(f"nn.{base.__name__}")
        names.append(f"{base.__module__}.{base.__qualname__}")
    return tuple(names)


def load_plugins(model: nn.Module) -> dict[nn.Module, str]:
    """Import the plugins of the frameworks that define classes of `model`, and let each look at the model.

    Returns the modules that must stay as they are, with the reason.
    """
    kept: dict[nn.Module, str] = {}
    for plugin in PLUGINS.load_for(model.modules()):
        kept.update(plugin.prepare(model))
    return kept


def plan(model: nn.Module) -> list[PlannedModule]:
    """Return every quantizable module of `model`, once each, converted already or not. Nothing is changed.

    >>> [p.full_name(q) for p in plan(nn.Sequential(nn.Linear(2, 2))) for q in p.quantizers]
    ['0.input_quantizer', '0.weight_quantizer', '0.output_quantizer']
    """
    kept = load_plugins(model)
    found = []
    for name, module in walk(model):
        if module in kept:
            continue
        if isinstance(module, QuantModule):
            found.append(PlannedModule(name, module, type(module), module.quantizers_of(module)))
            continue
        base = QuantModuleRegistry.quantized(original_class(module))
        if base is not None:
            found.append(PlannedModule(name, module, base, base.quantizers_of(module)))
    return found


def rule_name(name: str) -> str:
    """Return the name that rules see: a member of a list (`x_quantizers.3`) goes by the singular (`x_quantizer`)."""
    return re.sub(r"quantizers\.\d+$", "quantizer", name)


def decide(planned: Iterable[PlannedModule], config: QuantizeConfig) -> dict[str, tuple[Any, bool | None]]:
    """Return what the rules of `config` say for each quantizer: full name -> (attributes or None, enable or None)."""
    targets = [
        (rule_name(p.full_name(q)), rule_name(q).rsplit(".", 1)[-1], p.classes, p.full_name(q))
        for p in planned
        for q in p.quantizers
    ]
    resolved = resolve_rules(config.rules, [(name, kind, classes) for name, kind, classes, _ in targets])
    return {full: resolved[name] for name, _, _, full in targets}


def replace_quant_module(model: nn.Module) -> nn.Module:
    """Give every quantizable module its quantized class and its (disabled) quantizers, in place; return the model.

    Raises ModeError, with the model as it was, where a module was patched so that its new forward would not be reached.
    """
    done: list[nn.Module] = []
    try:
        for p in plan(model):
            if not isinstance(p.module, QuantModule):
                module = convert_class(p.module, quantized_class(p.base, type(p.module)))
                done.append(module)
                module.setup_quantizers()
    except BaseException:
        for module in done:
            _revert(module)
        raise
    return model


def revert_quant_module(model: nn.Module) -> nn.Module:
    """Take the quantizers and the quantized classes away again, in place; return the model."""
    for _, module in list(walk(model)):
        if isinstance(module, QuantModule) and original_class(module) is not type(module):
            _revert(module)
    return model


def _revert(module: Any) -> None:
    module.remove_quantizers()
    revert_class(module)


def register(original_cls: type[nn.Module], quantized_cls: type[nn.Module]) -> None:
    """Quantize modules of `original_cls` as `quantized_cls`, from the next conversion on; an earlier registration is replaced.

    `quantized_cls` is a `QuantModule`, or any subclass of `original_cls` with a method `_setup` that makes its quantizers.

        class QuantNorm(MyNorm):
            def _setup(self): self.input_quantizer = TensorQuantizer()
            def forward(self, x): return super().forward(self.input_quantizer(x))
        mtq.register(MyNorm, QuantNorm)
    """
    if not issubclass(quantized_cls, QuantModule):
        quantized_cls = _adapted(original_cls, quantized_cls)
    if QuantModuleRegistry.exact(original_cls):
        QuantModuleRegistry.unregister(original_cls)
    QuantModuleRegistry.register(original_cls, quantized_cls)


def unregister(original_cls: type[nn.Module]) -> None:
    """Leave modules of `original_cls` alone from the next conversion on. Raises UnknownNameError if it was never registered."""
    QuantModuleRegistry.unregister(original_cls)


def _adapted(original_cls: type[nn.Module], quantized_cls: type[nn.Module]) -> type[QuantModule]:
    if not issubclass(quantized_cls, original_cls) or not callable(getattr(quantized_cls, "_setup", None)):
        raise ConfigError(
            f"{quantized_cls.__name__} must be a QuantModule, or a subclass of {original_cls.__name__} "
            "with a method _setup(self) that makes its quantizers."
        )

    def quantizers_of(cls: type, module: nn.Module) -> tuple[str, ...]:
        if isinstance(module, cls):
            return tuple(n for n, m in module._modules.items() if isinstance(m, TensorQuantizer | SequentialQuantizer))
        probe = cls.__new__(cls)  # a look at what _setup would add, on a shallow double of the module
        probe.__dict__.update({**module.__dict__, "_modules": dict(module._modules)})
        probe._setup()
        return tuple(n for n in probe._modules if n not in module._modules)

    def weights_of(cls: Any, module: nn.Module) -> Iterator[Any]:
        if "weight_quantizer" in cls.quantizers_of(module) and getattr(module, "weight", None) is not None:
            yield "weight_quantizer", "weight", module.weight, None

    body = {
        "original_class": original_cls,
        "__module__": quantized_cls.__module__,
        "quantizers_of": classmethod(quantizers_of),
        "weights_of": classmethod(weights_of),
        "setup_quantizers": lambda self: self._setup(),
    }
    return type(quantized_cls.__name__, (quantized_cls, QuantModule), body)


def named_quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Yield (name, quantizer) of every quantizer of `model`, once each; a sequence is one."""
    inside: set[int] = set()
    for name, module in walk(model):
        if id(module) in inside:
            continue
        if isinstance(module, SequentialQuantizer):
            inside.update(id(child) for child in module)
            yield name, module
        elif isinstance(module, TensorQuantizer):
            yield name, module


def configure(model: nn.Module, decisions: dict[str, tuple[Any, bool | None]]) -> None:
    """Apply what `decide` returned to the quantizers of a converted model."""
    for name, (cfgs, enable) in decisions.items():
        if cfgs is not None:
            set_quantizer(model, name, cfgs)
        quantizer = model.get_submodule(name)
        if enable is False:
            quantizer.disable()  # type: ignore[operator]
        elif enable:
            _enable(name, quantizer)


def _enable(name: str, quantizer: Any) -> None:
    try:
        quantizer.enable()
    except ModelOptError as error:
        raise ConfigError(f"{name} is to be enabled, but no rule says how it quantizes: {error}") from error


def set_quantizer(model: nn.Module, name: str, cfgs: tuple[QuantizerAttributeConfig, ...]) -> None:
    """Configure the quantizer called `name`; one of several configurations becomes a `SequentialQuantizer`."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    current = parent._modules[leaf]
    if len(cfgs) == 1 and isinstance(current, TensorQuantizer):
        current.set_from_cfg(cfgs[0])
    else:
        made = [TensorQuantizer(cfg) for cfg in cfgs]
        parent._modules[leaf] = made[0] if len(made) == 1 else SequentialQuantizer(*made)


def set_quantizer_by_cfg(model: nn.Module, config: Any) -> None:
    """Apply rules to the quantizers of a model that `quantize` or `replace_quant_module` converted.

    `config`: a `QuantizeConfig`, or its `quant_cfg` in any dialect. Quantizers that no rule matches stay as they are.
    Patterns that match nothing warn, with the nearest names.

        set_quantizer_by_cfg(model, [{"quantizer_name": "*lm_head*", "enable": False}])
    """
    whole = isinstance(config, QuantizeConfig) or (isinstance(config, dict) and "quant_cfg" in config)
    parsed = QuantizeConfig.parse(config if whole else {"quant_cfg": config})
    planned = [p for p in plan(model) if isinstance(p.module, QuantModule)]
    decisions = decide(planned, parsed)
    warn_unmatched(parsed.rules, [rule_name(name) for name in decisions])
    configure(model, decisions)


@contextlib.contextmanager
def set_quantizer_by_cfg_context(model: nn.Module, config: Any) -> Iterator[None]:
    """Apply rules inside a `with` block; formats, switches and statistics are what they were afterwards."""
    with preserve_quantizers(model):
        set_quantizer_by_cfg(model, config)
        yield


@contextlib.contextmanager
def preserve_quantizers(model: nn.Module) -> Iterator[None]:
    """Bring every quantizer back to its present state at the end of a `with` block."""
    kept = structure_of(model)
    buffers = {name: dict(q.named_buffers()) for name, q in named_quantizers(model)}
    try:
        yield
    finally:
        apply_structure(model, kept)
        for name, values in buffers.items():
            for key, value in values.items():
                path, _, leaf = f"{name}.{key}".rpartition(".")
                setattr(model.get_submodule(path), leaf, value)


def _selected(model: nn.Module, where: Filter, parent_class: type[nn.Module] | None) -> list[str]:
    picked, names = [], []
    for name, _ in named_quantizers(model):
        seen = rule_name(name)
        names.append(seen)
        if not (matches(seen, where) if isinstance(where, str) else where(seen)):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        if parent_class is None or isinstance(parent, parent_class):
            picked.append(name)
    if isinstance(where, str) and not picked:
        warn_unmatched([QuantizerRule(where, None, None, None)], names)
    return picked


def set_quantizer_attributes_full(
    model: nn.Module, where: Filter, attributes: Any, parent_class: type[nn.Module] | None = None
) -> None:
    """Replace all attributes of the selected quantizers; a list of attributes makes sequences.

    set_quantizer_attributes_full(model, "*weight_quantizer", {"num_bits": 4, "block_sizes": {-1: 64}})
    """
    listed = attributes if isinstance(attributes, list | tuple) else [attributes]
    cfgs = tuple(QuantizerAttributeConfig.parse(a, "quantizer attributes") for a in listed)
    for name in _selected(model, where, parent_class):
        set_quantizer(model, name, cfgs)


def set_quantizer_attributes_partial(
    model: nn.Module, where: Filter, attributes: dict[str, Any], parent_class: type[nn.Module] | None = None
) -> None:
    """Change some attributes of the selected quantizers and keep the others. `{"enable": False}` alone keeps the statistics.

    set_quantizer_attributes_partial(model, "*input_quantizer", {"enable": False})
    """
    for name in _selected(model, where, parent_class):
        quantizer: Any = model.get_submodule(name)
        if set(attributes) == {"enable"}:
            _enable(name, quantizer) if attributes["enable"] else quantizer.disable()
            continue
        for leaf in quantizer if isinstance(quantizer, SequentialQuantizer) else [quantizer]:
            kept = {} if leaf.config is None else leaf.config.to_json()
            leaf.set_from_cfg({**kept, "enable": leaf.enabled, **attributes})


def set_quantizer_attribute(model: nn.Module, where: Filter, attribute: Any, parent_class: type[nn.Module] | None = None) -> None:
    """Change attributes of the selected quantizers: a list replaces them all, a mapping changes those it names."""
    change = set_quantizer_attributes_full if isinstance(attribute, list | tuple) else set_quantizer_attributes_partial
    change(model, where, attribute, parent_class)
