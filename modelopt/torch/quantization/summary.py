"""What is quantized, as text and as numbers.

    coverage = quantized bytes / (bytes of Linear and expert weights - bytes that a rule excludes)

Bytes are those of the weights before quantization. A blanket rule ("*", "default") excludes nothing: what it leaves off counts
as left. A tensor that several modules share counts once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from modelopt.core.logging import warn
from modelopt.core.match import DEFAULT
from modelopt.torch.opt.mode import history
from modelopt.torch.opt.surgery import original_class, walk
from modelopt.torch.quantization.config import QuantizeConfig
from modelopt.torch.quantization.conversion import class_names, load_plugins, named_quantizers, rule_name
from modelopt.torch.quantization.nn.modules import QuantModule, QuantModuleRegistry
from modelopt.torch.quantization.rules import QuantizerRule, Target, applies

BLANKET = (DEFAULT, "*", "*weight_quantizer", "*_quantizer", "*quantizer")
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)


@dataclass(frozen=True)
class Weight:
    """A Linear or expert weight: its name, its bytes, and why it is not quantized ("" if it is)."""

    name: str
    nbytes: int
    reason: str = ""


@dataclass(frozen=True)
class Coverage:
    """Which Linear and expert weights are quantized, which were left, and which a rule excludes."""

    quantized: tuple[Weight, ...]
    left: tuple[Weight, ...]
    excluded: tuple[Weight, ...]

    @property
    def quantized_bytes(self) -> int:
        """Bytes of the quantized weights (before quantization)."""
        return sum(w.nbytes for w in self.quantized)

    @property
    def total_bytes(self) -> int:
        """Bytes of all Linear and expert weights that no rule excludes."""
        return self.quantized_bytes + sum(w.nbytes for w in self.left)

    @property
    def share(self) -> float:
        """Quantized bytes over total bytes; 1.0 where there is nothing to quantize."""
        return self.quantized_bytes / self.total_bytes if self.total_bytes else 1.0

    def __str__(self) -> str:
        lines = [f"coverage {self.share:.1%}: {self.quantized_bytes} of {self.total_bytes} bytes of Linear and expert weights"]
        lines += [f"  left      {w.name} ({w.nbytes} bytes): {w.reason}" for w in self.left]
        lines += [f"  excluded  {w.name} ({w.nbytes} bytes): {w.reason}" for w in self.excluded]
        return "\n".join(lines)


def coverage(model: nn.Module, threshold: float = 0.9) -> Coverage:
    """Return which Linear and expert weights of `model` are quantized; below `threshold` warn, and list what was left.

    >>> coverage(nn.Sequential(nn.Linear(4, 4)), threshold=0.0).share
    0.0
    """
    rules = _rules(model)
    groups: dict[str, list[Weight]] = {"quantized": [], "left": [], "excluded": []}
    seen: set[int] = set()
    for name, tensor, quantizer, classes, reason in _weights(model):
        key = tensor.data_ptr() if tensor.device.type != "meta" and tensor.numel() else id(tensor)
        if key in seen:
            continue
        seen.add(key)
        if quantizer is not None and quantizer[1]:
            groups["quantized"].append(Weight(name, tensor.nbytes))
            continue
        target = rule_name(quantizer[0] if quantizer else f"{name}_quantizer")
        excluding = _excluding(rules, target, classes)
        if excluding:
            groups["excluded"].append(Weight(name, tensor.nbytes, f'rule "{excluding}"'))
        else:
            groups["left"].append(Weight(name, tensor.nbytes, reason))
    result = Coverage(*(tuple(groups[k]) for k in ("quantized", "left", "excluded")))
    if result.share < threshold:
        left = sorted(result.left, key=lambda w: -w.nbytes)
        shown = "; ".join(f"{w.name} ({w.reason})" for w in left[:8]) + (f"; and {len(left) - 8} more" if len(left) > 8 else "")
        warn(f"Only {result.share:.1%} of the Linear and expert weight bytes are quantized. Left: {shown}.")
    return result


def _rules(model: nn.Module) -> tuple[QuantizerRule, ...]:
    steps = [s for s in history(model) if s.mode == "quantize"]
    return QuantizeConfig.parse(steps[-1].config).rules if steps else ()


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor, tuple[str, bool] | None, tuple[str, ...], str]]:
    """Yield (name, tensor, (quantizer name, enabled) or None, class names, why it may be left) of Linear and expert weights."""
    kept = load_plugins(model)
    for name, module in walk(model):
        prefix = f"{name}." if name else ""
        classes = class_names(original_class(module))
        if isinstance(module, QuantModule):
            if module.counts_in_coverage:
                for quantizer, weight, tensor, expert in module.weights_of(module):
                    full = prefix + weight + ("" if expert is None else f"[{expert}]")
                    enabled = bool(module.get_submodule(quantizer).is_enabled)
                    yield full, tensor, (prefix + quantizer, enabled), classes, "its quantizer is off"
            continue
        for weight, tensor in module._parameters.items():
            if tensor is None or not tensor.is_floating_point() or isinstance(module, _CONVOLUTIONS):
                continue
            kind = type(module).__name__
            if isinstance(module, nn.Linear) and weight == "weight":
                plain = (
                    "not quantized"
                    if type(module) in QuantModuleRegistry
                    else f"{kind} has a forward of its own and no quantized class"
                )
                reason = kept.get(module, plain)
                yield prefix + weight, tensor, None, classes, reason
            elif tensor.dim() >= 3 or (weight == "weight" and tensor.dim() == 2 and not isinstance(module, nn.Embedding)):
                yield prefix + weight, tensor, None, classes, f"{kind} has no quantized class"


def _excluding(rules: tuple[QuantizerRule, ...], name: str, classes: tuple[str, ...]) -> str | None:
    """Return the pattern of the rule that switches `name` off, or None where none does, or only a blanket one."""
    target = Target(name, name.rsplit(".", 1)[-1], classes)
    last = None
    for rule in sorted(rules, key=lambda r: r.pattern != DEFAULT):
        if (rule.cfgs is not None or rule.enable is not None) and applies(rule, target):
            last = rule
    if last is None or last.enable is not False or (last.pattern in BLANKET and last.parent_class is None):
        return None
    return last.pattern if last.parent_class is None else f"{last.parent_class}: {last.pattern}"


def quant_summary(model: nn.Module) -> str:
    """Return one line for each quantizer of `model`, a count, and the coverage."""
    lines, enabled, count = [], 0, 0
    for name, quantizer in named_quantizers(model):
        count += 1
        enabled += bool(quantizer.is_enabled)
        members = list(quantizer) if isinstance(quantizer, nn.Sequential) else [quantizer]
        lines.append(f"{name:<60} " + " -> ".join(q.extra_repr() for q in members))
    lines.append(f"{count} quantizers, {enabled} enabled")
    lines.append(str(coverage(model, threshold=0.0)))
    return "\n".join(lines)


def print_quant_summary(model: nn.Module, output_dir: str | Path | None = None) -> None:
    """Print `quant_summary(model)`, or write it to `output_dir/quant_summary.txt`."""
    text = quant_summary(model)
    if output_dir is None:
        print(text)  # noqa: T201 - what this function is for
        return
    directory = Path(output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "quant_summary.txt").write_text(text + "\n", encoding="utf-8")
