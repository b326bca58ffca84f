"""Symbols: the sizes of a module that may change, and which of them must change together.

    free        nobody decides for it: it stands for a family of dimensions, and may be searched
    dynamic     follows its parent, or the concatenation of several parents
    constant    must keep its size

A symbol that the module's input must match is INCOMING, one that its output shows is OUTGOING, one that stays inside is NONE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from modelopt.core.errors import UnknownNameError, did_you_mean
from modelopt.core.registry import TypeRegistry
from modelopt.torch.trace.symbol import CLType, Slots, Symbol
from modelopt.torch.trace.tracer import RobustTracer

__all__ = ["CLType", "Slots", "SymInfo", "SymMap", "Symbol"]

Rule = Callable[[Any], "SymInfo"]


class SymInfo:
    """The symbols of one module by name.

    `is_shape_preserving`: the output has the elastic dimension of the input, whatever that is (activations, norms, pooling).
    """

    def __init__(self, is_shape_preserving: bool = False, **symbols: Symbol) -> None:
        self.is_shape_preserving = is_shape_preserving
        self.symbols: dict[str, Symbol] = symbols

    def __getitem__(self, name: str) -> Symbol:
        if name not in self.symbols:
            raise UnknownNameError(f'There is no symbol "{name}" here.{did_you_mean(name, self.symbols)}')
        return self.symbols[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.symbols)

    def __len__(self) -> int:
        return len(self.symbols)

    def __repr__(self) -> str:
        return f"SymInfo({', '.join(f'{n}={s}' for n, s in self.symbols.items())})"

    def named_symbols(self, module: Any = None) -> Iterator[tuple[str, Symbol]]:
        """Yield (name, symbol); the argument, this module's own name, may be given for symmetry with `SymMap`."""
        yield from self.symbols.items()

    def named_in_symbols(self, module: Any = None) -> Iterator[tuple[str, Symbol]]:
        """Yield those that the module's input must match."""
        yield from ((n, s) for n, s in self.symbols.items() if s.is_incoming)

    def named_out_symbols(self, module: Any = None) -> Iterator[tuple[str, Symbol]]:
        """Yield those that the module's output shows."""
        yield from ((n, s) for n, s in self.symbols.items() if s.is_outgoing)

    def named_dangling_symbols(self, module: Any = None) -> Iterator[tuple[str, Symbol]]:
        """Yield those that are free and seen by other modules."""
        yield from ((n, s) for n, s in self.symbols.items() if s.is_dangling)


class SymMap:
    """The symbols of every module of a model, made by the rules that are registered for module types.

    >>> sym_map = SymMap(nn.Sequential(nn.Linear(4, 8), nn.ReLU()))
    >>> [name for name, symbol in sym_map.named_symbols()]
    ['0.in_features', '0.out_features']
    """

    _rules: TypeRegistry[Rule] = TypeRegistry("symbol rule")

    def __init__(self, model: nn.Module) -> None:
        import modelopt.torch.trace.modules.nn  # noqa: F401  (registers the rules of torch's own modules)
        from modelopt.torch.trace.inputs import PLUGINS

        PLUGINS.load_for(model.modules())
        self.model = model
        self._names = dict(model.named_modules())
        self._info: dict[nn.Module, SymInfo] = {}
        for module in model.modules():
            rule = self.rule_for(module)
            if rule is not None:
                self._info[module] = rule(module)

    @classmethod
    def register(cls, module_type: type | str | list[type | str], is_explicit_leaf: bool = True) -> Callable[[Rule], Rule]:
        """Register a rule, `module -> SymInfo`, for one module type or several (decorator).

        Subclasses that keep the type's forward are served too. With `is_explicit_leaf`, torch.fx never traces into such modules.
        Raises ConfigError if a type has a rule already.

        >>> class Scale(nn.Module): ...
        >>> @SymMap.register(Scale)
        ... def scale(module):
        ...     return SymInfo(is_shape_preserving=True)
        >>> SymMap.unregister(Scale)
        """

        def decorate(rule: Rule) -> Rule:
            cls._rules.register(module_type, rule)
            for one in module_type if isinstance(module_type, list) else [module_type]:
                if is_explicit_leaf and isinstance(one, type) and not RobustTracer.is_registered_leaf(one):
                    RobustTracer.register_leaf(one)
            return rule

        return decorate

    @classmethod
    def unregister(cls, module_type: type) -> None:
        """Take `register` back, the leaf included. Raises UnknownNameError for a type without a rule."""
        cls._rules.unregister(module_type)
        if RobustTracer.is_registered_leaf(module_type):
            RobustTracer.unregister_leaf(module_type)

    @classmethod
    def rule_for(cls, module: nn.Module) -> Rule | None:
        """Return the rule of the nearest registered class whose forward the module keeps."""

        def keeps_forward(own: Any, base: Any) -> bool:
            return own.forward is base.forward

        return cls._rules.match(module, keeps_forward)

    def _module(self, module: nn.Module | str) -> nn.Module:
        if isinstance(module, str):
            if module not in self._names:
                raise UnknownNameError(f'There is no submodule "{module}".{did_you_mean(module, self._names)}')
            return self._names[module]
        return module

    def get_sym_info(self, module: nn.Module | str) -> SymInfo | None:
        """Return the symbols of one module (or of its dotted name); None if no rule knows it."""
        return self._info.get(self._module(module))

    def add_sym_info(self, module: nn.Module | str, info: SymInfo) -> None:
        """Set the symbols of one module, replacing what a rule made."""
        self._info[self._module(module)] = info

    def get_symbol(self, module: nn.Module | str, name: str) -> Symbol:
        """Return one symbol. Raises UnknownNameError, with the nearest name."""
        info = self.get_sym_info(module)
        if info is None:
            raise UnknownNameError(f"{module} has no symbols.")
        return info[name]

    def is_shape_preserving(self, module: nn.Module | str) -> bool:
        """Return whether the output of a module has the elastic dimension of its input."""
        info = self.get_sym_info(module)
        return info is not None and info.is_shape_preserving

    def named_modules(self) -> Iterator[tuple[str, SymInfo]]:
        """Yield (dotted name, symbols) of every module that has symbols."""
        for name, module in self._names.items():
            info = self._info.get(module)
            if info is not None and len(info):
                yield name, info

    def _named(self, module: nn.Module | str | None, which: str) -> Iterator[tuple[str, Symbol]]:
        if module is not None:
            info = self.get_sym_info(module)
            yield from getattr(info, which)() if info is not None else ()
            return
        for name, info in self.named_modules():
            yield from ((f"{name}.{key}" if name else key, symbol) for key, symbol in getattr(info, which)())

    def named_symbols(self, module: nn.Module | str | None = None) -> Iterator[tuple[str, Symbol]]:
        """Yield (name, symbol) of one module, or with dotted names of all modules."""
        yield from self._named(module, "named_symbols")

    def named_in_symbols(self, module: nn.Module | str | None = None) -> Iterator[tuple[str, Symbol]]:
        """Yield the symbols that inputs must match."""
        yield from self._named(module, "named_in_symbols")

    def named_out_symbols(self, module: nn.Module | str | None = None) -> Iterator[tuple[str, Symbol]]:
        """Yield the symbols that outputs show."""
        yield from self._named(module, "named_out_symbols")

    def named_dangling_symbols(self, module: nn.Module | str | None = None) -> Iterator[tuple[str, Symbol]]:
        """Yield the symbols that are free and seen by other modules: one for each family of dimensions."""
        yield from self._named(module, "named_dangling_symbols")

    def __getitem__(self, module: nn.Module | str) -> SymInfo:
        info = self.get_sym_info(module)
        if info is None:
            raise UnknownNameError(f"{module} has no symbols.")
        return info

    def __contains__(self, module: nn.Module | str) -> bool:
        return self.get_sym_info(module) is not None
