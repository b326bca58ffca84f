"""Modes and their history: apply steps to a model, save what was done, restore it bit for bit, change modules in place."""

from __future__ import annotations

import importlib
from typing import Any

from modelopt.core.config import Config as ModeloptBaseConfig
from modelopt.torch.opt.conversion import (
    ModeloptStateManager,
    load_modelopt_state,
    modelopt_state,
    restore,
    restore_from_modelopt_state,
    save,
)
from modelopt.torch.opt.mode import Mode, ModeRegistry, ModeTable, Step, apply_mode, history
from modelopt.torch.opt.mode import Mode as ModeDescriptor
from modelopt.torch.opt.surgery import convert_class, revert_class, walk

_HUGGINGFACE = (
    "disable_huggingface_checkpointing",
    "enable_huggingface_checkpointing",
    "load_pretrained",
    "save_pretrained",
)

__all__ = [
    "Mode",
    "ModeDescriptor",
    "ModeRegistry",
    "ModeTable",
    "ModeloptBaseConfig",
    "ModeloptStateManager",
    "Step",
    "apply_mode",
    "convert_class",
    "history",
    "load_modelopt_state",
    "modelopt_state",
    "restore",
    "restore_from_modelopt_state",
    "revert_class",
    "save",
    "walk",
    *_HUGGINGFACE,
]


def __getattr__(name: str) -> Any:
    if name in _HUGGINGFACE:
        return getattr(importlib.import_module("modelopt.torch.opt.huggingface"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
