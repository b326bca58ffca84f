"""Elementwise ops: aligned dimensions of all operands are the same dimension. `torch.Tag.pointwise` names most of them."""

from __future__ import annotations

from modelopt.torch.trace.axes.rules.registry import Axes, Call, broadcast, register_rule

ACTIVATIONS = {f"aten::{name}{end}" for end in ("", "_") for name in
               ("relu", "gelu", "silu", "sigmoid", "tanh", "elu", "leaky_relu", "hardtanh", "hardswish", "mish", "softplus",
                "erf", "_prelu_kernel", "log_sigmoid_forward", "celu", "selu")}  # fmt: skip


@register_rule(
    "aten::add", "aten::sub", "aten::mul", "aten::div", "aten::where", "aten::clamp", "aten::pow", "aten::rsub", "aten::lerp",
    "aten::addcmul", "aten::addcdiv", "aten::masked_fill", "aten::copy", "aten::polar", "aten::complex", "aten::isin",
    "aten::xlogy", "aten::max.other", "aten::min.other", "aten::rrelu_with_noise", "aten::_prelu_kernel",
    "aten::log_sigmoid_forward",
    "aten::hardswish", "aten::threshold", "aten::prelu", "aten::floor_divide", "aten::_masked_scale", "aten::alpha_dropout",
    "aten::_add_relu", "aten::real", "aten::imag", "aten::heaviside",
    "aten::bernoulli", "aten::dropout", "aten::native_dropout", "aten::isclose",
)  # fmt: skip
def elementwise(call: Call) -> Axes | None:
    outputs = call.outputs()
    if not outputs:
        return None
    operands = call.inputs()
    axes = broadcast(call, operands, outputs[0])
    if axes and axes[-1] is not None:
        if call.name.startswith("aten::add") and len(operands) == 2:
            if operands[0].shape == operands[1].shape and not any(call.static(t) for t in operands):
                call.role("residual", axes[-1])
        elif call.name in ACTIVATIONS:
            call.role("activated", axes[-1])
    for other in outputs[1:]:
        call.set(other, axes if other.dim() == len(axes) else [None] * other.dim())
    return axes


@register_rule(
    "aten::alias", "aten::detach", "aten::clone", "aten::contiguous", "aten::_to_copy", "aten::lift_fresh", "aten::lift",
    "aten::_conj", "aten::_neg_view", "aten::resolve_conj", "aten::resolve_neg", "aten::fill", "aten::zero", "aten::positive",
    "aten::tril", "aten::triu", "aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::empty_like", "aten::rand_like",
    "aten::randn_like", "aten::randint_like", "aten::nan_to_num", "aten::normal", "aten::uniform", "aten::random",
    "aten::exponential", "aten::cauchy", "aten::geometric", "aten::log_normal", "aten::pin_memory",
    "aten::conj", "aten::_to_dense", "aten::to_dense", "aten::view.dtype", "aten::_reshape_alias_like",
)  # fmt: skip
def same(call: Call) -> Axes:
    """One operand, one result of its shape. tril and triu cut by position: their last two dimensions are kept."""
    source = call.inputs()[0] if call.inputs() else call.outputs()[0]
    axes = call.axes(source)
    if call.name.startswith(("aten::tril", "aten::triu")):
        call.freeze_all(axes[-2:], "values are cut by their position")
    if call.name == "aten::view" and axes and source.shape != call.out.shape:
        call.freeze(axes[-1], "the last dimension is read as another dtype")
        return [*axes[:-1], None]
    return axes


@register_rule("aten::cumsum", "aten::cumprod", "aten::logcumsumexp", "aten::cummax", "aten::cummin", "aten::_cummax_helper")
def scan(call: Call) -> Axes:
    axes = call.axes(call.args[0])
    call.freeze(axes[call.arg(1, "dim")], "a running sum over this dimension")
    for other in call.outputs()[1:]:
        call.set(other, axes)
    return axes


@register_rule("aten::view_as_complex")
def view_as_complex(call: Call) -> Axes:
    axes = call.axes(call.args[0])
    call.freeze(axes[-1], "real and imaginary part")
    return axes[:-1]


@register_rule("aten::view_as_real")
def view_as_real(call: Call) -> Axes:
    return [*call.axes(call.args[0]), None]


@register_rule("aten::glu")
def glu(call: Call) -> Axes:
    """The first half times the sigmoid of the second: both halves are one dimension."""
    axes = list(call.axes(call.args[0]))
    dim = call.arg(1, "dim", -1) % len(axes)
    half = call.args[0].shape[dim] // 2
    side, axes[dim] = call.factor(axes[dim], (2, half))
    call.freeze(side, "the two halves of a gated unit")
    return axes
