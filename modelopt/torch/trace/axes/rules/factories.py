"""Tensors that the code makes. Constant ones have a fresh dimension for each size; what counts positions is never pruned."""

from __future__ import annotations

from modelopt.torch.trace.axes.rules.registry import Axes, Call, register_rule

LARGEST = 1 << 20


@register_rule(
    "aten::zeros", "aten::ones", "aten::full", "aten::empty", "aten::rand", "aten::randn", "aten::new_zeros", "aten::new_ones",
    "aten::new_full", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided", "aten::randint",
    "aten::empty_permuted",
)  # fmt: skip
def constant(call: Call) -> Axes:
    return [call.store.fresh(n) if 1 < n <= LARGEST else None for n in call.out.shape]


@register_rule(
    "aten::arange", "aten::scalar_tensor", "aten::eye", "aten::linspace", "aten::logspace", "aten::tril_indices",
    "aten::triu_indices", "aten::is_same_size", "aten::hann_window", "aten::randperm", "aten::sym_size", "aten::range",
    "aten::_efficientzerotensor", "aten::bartlett_window", "aten::hamming_window", "aten::sym_numel", "aten::sym_stride",
    "aten::is_complex", "aten::is_floating_point", "aten::_has_compatible_shallow_copy_type",
)  # fmt: skip
def positions(call: Call) -> None:
    for out in call.outputs():
        call.set(out, [None] * out.dim())
