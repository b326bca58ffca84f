"""Recurrent cells that run as one op: gate-major weights [G*H, I], [G*H, H] share the hidden dimension over gates.

Where torch lowers a cell to matrix products and pointwise ops, the general rules do the same.
"""

from __future__ import annotations

from modelopt.torch.trace.axes.labels import Axis
from modelopt.torch.trace.axes.rules.registry import Call, register_rule


def gates(call: Call, axis: Axis | None, count: int, hidden: int, state: Axis | None) -> None:
    """A gate-major dimension [count*hidden]: each gate's part is the hidden dimension, and no gate goes."""
    gate, member = call.factor(axis, (count, hidden))
    call.freeze(gate, "the gates of a recurrent cell")
    call.unify(member, state)


@register_rule("aten::mkldnn_rnn_layer")
def mkldnn_rnn_layer(call: Call) -> None:
    """(input, w_ih, w_hh, b_ih, b_hh, h, c, reverse, ..., hidden) -> output, h, c, workspace: one layer, one direction."""
    source, w_ih, w_hh, b_ih, b_hh, h, c = call.args[:7]
    hidden = w_hh.shape[1]
    count = w_hh.shape[0] // hidden
    state = call.axes(w_hh)[1]
    call.unify(call.axes(source)[-1], call.axes(w_ih)[1])
    for tensor in (w_ih, w_hh, b_ih, b_hh):
        if tensor is not None and tensor.numel():
            gates(call, call.axes(tensor)[0], count, hidden, state)
    for tensor in (h, c):
        if tensor is not None and tensor.numel():
            call.unify(call.axes(tensor)[-1], state)
    output, *rest = call.outputs()
    call.set(output, [*call.axes(source)[:-1], state])
    for out in rest:
        call.set(out, [*[None] * (out.dim() - 1), state] if out.dim() and out.shape[-1] == hidden else [None] * out.dim())
