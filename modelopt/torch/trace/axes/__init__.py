"""Axis inference: which slices of which parameters depend on one another, read off one real forward pass.

`labels` holds the algebra of labels, `rules` what each ATen op does to them, `record` runs a model under the rules, and
`infer_axes` returns the families. Provenance of Python integers, their solution and the cutting of a model build on it.
"""

from __future__ import annotations

from modelopt.torch.trace.axes.families import Axes, Family, Frozen, Slot
from modelopt.torch.trace.axes.infer import infer_axes
from modelopt.torch.trace.axes.labels import Axis, LabelStore
from modelopt.torch.trace.axes.record import ModuleCall, OpCall, Recorder, TensorRef
from modelopt.torch.trace.axes.rules import register_module_rule, register_rule

__all__ = [
    "Axes",
    "Axis",
    "Family",
    "Frozen",
    "LabelStore",
    "ModuleCall",
    "OpCall",
    "Recorder",
    "Slot",
    "TensorRef",
    "infer_axes",
    "register_module_rule",
    "register_rule",
]
