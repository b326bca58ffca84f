"""Which rule wins for which quantizer.

The law: rules act in order and the last match wins; `"default"` is the weakest wherever it stands. A rule with attributes
replaces the attributes and enables (unless it says `enable: False`); a rule with only `enable` toggles. Switching *on* is
guarded twice:

* quantizers other than plain weight and input ones (outputs, attention matmuls, softmax) answer only to patterns that name
  their kind, so `"*lm_head*"` and `"default"` never switch an output quantizer on;
* modules that are rarely quantized (embeddings, norms, pooling, activations) answer only to a `parent_class`, or to a
  pattern whose literal text names the module itself.

Switching *off* needs no such care: `"*"` with `enable: False` turns everything off.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelopt.core.errors import did_you_mean
from modelopt.core.logging import warn
from modelopt.core.match import DEFAULT, matches, nearest_names

if TYPE_CHECKING:
    from modelopt.torch.quantization.attributes import QuantizerAttributeConfig

OPT_IN = re.compile(
    r"^(Quant)?(Embedding(Bag)?|(Sync)?BatchNorm(1d|2d|3d)?|InstanceNorm[123]d|LayerNorm|GroupNorm|\w*RMSNorm"
    r"|(Avg|Max|AdaptiveAvg|AdaptiveMax)Pool[123]d|LeakyReLU)$"
)
_QUANTIZER_TAIL = re.compile(r"[\w\[\]*?]*quantizer[\w*]*$")

Resolved = tuple["tuple[QuantizerAttributeConfig, ...] | None", "bool | None"]


@dataclass(frozen=True)
class QuantizerRule:
    """One rule. `cfgs` None: only `enable` acts; more than one: a `SequentialQuantizer`."""

    pattern: str
    parent_class: str | None
    cfgs: tuple[QuantizerAttributeConfig, ...] | None
    enable: bool | None

    @property
    def switches_on(self) -> bool:
        """Whether the rule can enable a quantizer."""
        return self.enable is not False and (self.cfgs is not None or self.enable is True)


@dataclass(frozen=True)
class Target:
    """A quantizer as rules see it: its full name, its kind (last part of the name), and the class names of its module."""

    name: str
    kind: str
    classes: tuple[str, ...]

    @property
    def plain(self) -> bool:
        """Whether it is an ordinary weight or input quantizer."""
        return ("weight_quantizer" in self.kind or "input_quantizer" in self.kind) and "bmm" not in self.kind

    @property
    def opt_in(self) -> bool:
        """Whether its module is of a type that is quantized only when asked for."""
        return any(OPT_IN.match(c.rsplit(".", 1)[-1]) for c in self.classes)


def _class_matches(target: Target, parent_class: str) -> bool:
    short = parent_class.rsplit(".", 1)[-1]
    return any(matches(c, parent_class) or matches(c.rsplit(".", 1)[-1], short) for c in target.classes)


def _names_kind(pattern: str, kind: str) -> bool:
    """Whether `pattern` speaks of this kind of quantizer."""
    for token, wanted in (("bmm", "bmm"), ("softmax", "softmax"), ("output_quantizer", "output_quantizer")):
        if token in kind:
            return wanted in pattern
    return kind.removesuffix("_quantizer") in pattern


def _names_module(pattern: str, name: str) -> bool:
    """Whether literal text of `pattern`, before its quantizer part, lies in the last component of the module's name."""
    parts = name.split(".")
    own = parts[-2] if len(parts) > 1 else ""
    chunks = (c.strip(".").rsplit(".", 1)[-1] for c in re.split(r"\*|\?|\[[^\]]*\]", _QUANTIZER_TAIL.sub("", pattern)))
    return any(c and c in own for c in chunks)


def applies(rule: QuantizerRule, target: Target) -> bool:
    """Return whether `rule` acts on `target`.

    Example:
        >>> rule = QuantizerRule("default", None, None, True)
        >>> applies(rule, Target("fc.output_quantizer", "output_quantizer", ("nn.Linear",)))
        False
    """
    if rule.pattern != DEFAULT and not matches(target.name, rule.pattern):
        return False
    if rule.parent_class is not None and not _class_matches(target, rule.parent_class):
        return False
    if not rule.switches_on:
        return True
    if not target.plain and (rule.pattern == DEFAULT or not _names_kind(rule.pattern, target.kind)):
        return False
    if target.opt_in and rule.parent_class is None:
        return rule.pattern != DEFAULT and _names_module(rule.pattern, target.name)
    return True


def resolve_rules(rules: Iterable[QuantizerRule], quantizers: Iterable[tuple[str, str, Iterable[str]]]) -> dict[str, Resolved]:
    """Decide every quantizer.

    Args:
        rules: in order; the last match wins.
        quantizers: (full name, kind, class names of the module) of each. Class names are spelled `nn.Linear`, `Linear` or
            dotted in full; those of the base classes may be given too.

    Returns:
        name -> (attributes or None where no rule gives any, enable or None where no rule says anything).

    Example:
        >>> resolve_rules([QuantizerRule("*", None, None, False)], [("fc.weight_quantizer", "weight_quantizer", ["nn.Linear"])])
        {'fc.weight_quantizer': (None, False)}
    """
    ordered = sorted(rules, key=lambda r: r.pattern != DEFAULT)  # stable: "default" first, then as written
    decided: dict[str, Resolved] = {}
    for name, kind, classes in quantizers:
        target = Target(name, kind, tuple(classes))
        cfgs: tuple[QuantizerAttributeConfig, ...] | None = None
        enable: bool | None = None
        for rule in ordered:
            if not applies(rule, target):
                continue
            if rule.cfgs is not None:
                cfgs, enable = rule.cfgs, rule.enable is not False
            elif rule.enable is not None:
                enable = rule.enable
        decided[name] = (cfgs, enable)
    return decided


def warn_unknown_classes(rules: Iterable[QuantizerRule], classes: Iterable[str], ignore: Iterable[str] = ()) -> list[str]:
    """Warn, with the nearest name, about every `parent_class` that is none of `classes` (of the model's modules); return them."""
    known = Target("", "", tuple(dict.fromkeys(classes)))
    wanted = dict.fromkeys(r.parent_class for r in rules if r.parent_class is not None and r.parent_class not in tuple(ignore))
    found = [parent for parent in wanted if not _class_matches(known, parent)]
    for parent in found:
        hint = did_you_mean(parent, known.classes)
        warn(f'The parent_class "{parent}" is that of no module with quantizers in this model.{hint}', stacklevel=4)
    return found


def unmatched_patterns(rules: Iterable[QuantizerRule], names: Iterable[str], ignore: Iterable[str] = ()) -> list[str]:
    """Return the patterns that match none of `names`, except `"default"`, those of `ignore` and those for a module class."""
    pool, skip = list(names), {DEFAULT, *ignore}
    wanted = dict.fromkeys(r.pattern for r in rules if r.pattern not in skip and r.parent_class is None)
    return [p for p in wanted if not any(matches(n, p) for n in pool)]


def warn_unmatched(rules: Iterable[QuantizerRule], names: Iterable[str], ignore: Iterable[str] = ()) -> list[str]:
    """Warn, with the nearest names, about every pattern that matches nothing; return those patterns."""
    pool, rules = list(names), list(rules)
    found = unmatched_patterns(rules, pool, ignore)
    for pattern in found:
        near = nearest_names(pattern, pool)
        hint = f" Nearest: {', '.join(near)}." if near else ""
        warn(f'The pattern "{pattern}" matches no quantizer of this model.{hint}', stacklevel=4)
    attention = [r.pattern for r in rules if r.cfgs and r.enable is not False and "bmm" in r.pattern]
    if attention and not any("bmm" in name for name in pool):
        warn(
            f'"{attention[0]}" asks for a quantized KV cache or attention, but no attention of this model can be quantized: '
            "none goes through the attention interface of transformers. It stays as it is.",
            stacklevel=4,
        )
    return found
