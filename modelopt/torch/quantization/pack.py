"""Hold quantized weights as packed codes, or write the quantized values back into the weights.

pack_weights  W -> codes (bits each) + scales: memory falls to about bits / 16 of bf16; a forward dequantizes, bit-equal, or
              a kernel multiplies the codes; the matrices of fused experts are packed one by one and stacked
fold_weight   W -> weight_quantizer(W), and the quantizer is switched off: the same values at full size, no work per forward
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from modelopt.core.config import Config
from modelopt.core.errors import CheckpointError, ModeError
from modelopt.core.logging import warn
from modelopt.core.match import Rules, nearest_names
from modelopt.torch import kernels
from modelopt.torch.opt.surgery import walk
from modelopt.torch.quantization.nn.modules import PackedExperts, PackedTensor, QuantizedTensor, QuantModule, leaf_quantizers


class CompressConfig(Config):
    """Patterns over module names to whether their weights are packed; the last match wins, "default" is the weakest."""

    compress: dict[str, bool] = {"default": True}
    quant_gemm: bool = False


def pack_weights(model: nn.Module, config: CompressConfig) -> list[str]:
    """Pack every enabled weight that `config` allows and return their names."""
    rules = Rules.of(config.compress.items())
    names = [name for name, _ in _quant_modules(model)]
    for pattern in rules.unmatched(names):
        near = nearest_names(pattern, names)
        hint = f" Nearest: {', '.join(near)}." if near else ""
        warn(f'The pattern "{pattern}" matches no quantized module of this model.{hint}')
    for name, module in _quant_modules(model):  # before anything is packed
        for items in _by_parameter(module) if rules.resolve(name) else ():
            if items[0].name in module.packable and _alike(items):
                _require_plain(name, items)
    packed: list[str] = []
    kept: list[str] = []
    for name, module in list(_quant_modules(model)):
        for items in _by_parameter(module) if rules.resolve(name) else ():
            names = [f"{name}.{item.name}" + ("" if item.expert is None else f"[{item.expert}]") for item in items]
            if items[0].name in module.packable and _alike(items):
                _pack(module, items)
                packed += names
            else:
                kept += [
                    f"{n} ({type(module).__name__})" for n, i in zip(names, items, strict=True) if i.weight_quantizer.is_enabled
                ]
    if not packed and not kept:
        raise ModeError("There is no weight to pack: none has an enabled quantizer and is allowed by a pattern. Quantize first.")
    if kept:
        shown = ", ".join(kept[:6]) + (f", and {len(kept) - 6} more" if len(kept) > 6 else "")
        warn(f"{len(kept)} weights stay fake-quantized, because their modules cannot hold packed codes yet: {shown}.")
    return packed


def _quant_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in walk(model) if isinstance(module, QuantModule))


def _by_parameter(module: QuantModule) -> list[list[QuantizedTensor]]:
    """Return what is not packed yet and has an enabled quantizer, the experts of one parameter together."""
    found: dict[str, list[QuantizedTensor]] = {}
    for item in module.quantized_tensors():
        if item.packed is None:
            found.setdefault(item.name, []).append(item)
    return [items for items in found.values() if any(i.weight_quantizer.is_enabled for i in items)]


def _alike(items: list[QuantizedTensor]) -> bool:
    """Whether the experts of a parameter can share one format; a single weight always can."""
    lasts = [[q for q in leaf_quantizers(i.weight_quantizer) if q.enabled][-1:] for i in items]
    return all(lasts) and len({str(q[0].format) for q in lasts}) == 1


@torch.no_grad()
def _pack(module: nn.Module, items: list[QuantizedTensor]) -> None:
    holders = [_packed(item) for item in items]
    name, stored = items[0].name, module._parameters[items[0].name]
    assert stored is not None
    one = items[0].expert is None
    holder = holders[0] if one else PackedExperts.of(holders, items[0].transposed, stored.shape)
    del module._parameters[name]
    module.add_module(f"{name}_packed", holder)


def _require_plain(module_name: str, items: list[QuantizedTensor]) -> None:
    for item in items:
        last = [q for q in leaf_quantizers(item.weight_quantizer) if q.enabled][-1]
        if last.rotation is not None or last.bias_value is not None or last.pre_quant_scale is not None or last.format is None:
            name = f"{module_name}.{item.name}" + ("" if item.expert is None else f"[{item.expert}]")
            raise ModeError(
                f"{name} is rotated, shifted or scaled before quantization, so its codes alone do not give its values back."
            )


def _packed(item: QuantizedTensor) -> PackedTensor:
    *first, last = [q for q in leaf_quantizers(item.weight_quantizer) if q.enabled]
    weight = item.tensor.detach()
    for quantizer in first:
        weight = quantizer(weight)
    parts = kernels.quantize(weight.contiguous(), *last.op_arguments())
    return PackedTensor(parts, str(last.format), weight.shape, weight.dtype, item.transposed)


def restore_packed(model: nn.Module, described: dict[str, Any]) -> None:
    """Put empty packed weights where `described` (name -> PackedTensor.describe()) says. Raises CheckpointError."""
    for name, data in described.items():
        parent_name, _, leaf = name.rpartition(".")
        weight_name = leaf.removesuffix("_packed")
        try:
            parent = model.get_submodule(parent_name)
        except AttributeError as error:
            raise CheckpointError(f'The saved state has a packed weight in "{parent_name}", which this model has not.') from error
        weight, earlier = parent._parameters.get(weight_name), parent._modules.get(leaf)
        if isinstance(earlier, PackedTensor) and earlier.describe() == data:  # each step describes all that was packed before it
            continue
        holder = PackedTensor.from_description(data, None if weight is None else weight.device)
        if weight is None or tuple(weight.shape) != holder.stored_shape:
            shown = "none" if weight is None else f"one of shape {list(weight.shape)}"
            wanted = list(holder.stored_shape)
            raise CheckpointError(f"{parent_name} should have a weight {weight_name} of shape {wanted}, and has {shown}.")
        del parent._parameters[weight_name]
        parent.add_module(leaf, holder)


@torch.no_grad()
def fold_weight(model: nn.Module, keep_attrs: bool = False) -> nn.Module:
    """Write the fake-quantized values into the weights and switch the weight quantizers off, in place; return the model.

    A weight that several modules share is written only if all of them quantize it to the same values; else the module gets a
    copy of its own, so that the others compute what they did. `keep_attrs` keeps the quantizers' ranges (else dropped).

        fold_weight(quantize(model, "int8-wo"))
    """
    owners = _owners(model)
    for _, module in list(_quant_modules(model)):
        for item in list(module.quantized_tensors()):
            if item.weight_quantizer.is_enabled and item.packed is None:
                value = item.weight_quantizer(item.tensor)
                _write(module, item, value, owners)
                item.weight_quantizer.disable()
                if not keep_attrs:
                    item.weight_quantizer.reset_amax()
    return model


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for _, module in walk(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, name))
    return found


def _write(module: Any, item: QuantizedTensor, value: Tensor, owners: dict[int, list[tuple[nn.Module, str]]]) -> None:
    parameter = module._parameters[item.name]
    others = [(m, n) for m, n in owners.get(id(parameter), []) if m is not module]
    if not others or all(_sees(m, n, value) for m, n in others):
        item.tensor.copy_(value)
        return
    own = parameter.detach().clone()
    own_parameter = nn.Parameter(own, requires_grad=parameter.requires_grad)
    setattr(module, item.name, own_parameter)
    owners[id(parameter)] = others
    for fresh in module.quantized_tensors():
        if fresh.name == item.name and fresh.expert == item.expert:
            fresh.tensor.copy_(value)


def _sees(module: Any, name: str, value: Tensor) -> bool:
    """Whether `module` computes with exactly `value` for its weight `name`, through its own quantizer, or after folding."""
    if not isinstance(module, QuantModule):
        return torch.equal(getattr(module, name), value)
    for item in module.quantized_tensors():
        if item.name == name and item.tensor.shape == value.shape:
            return torch.equal(item.weight_quantizer(item.tensor), value)
    return torch.equal(getattr(module, name), value)
