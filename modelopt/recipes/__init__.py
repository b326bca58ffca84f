"""Recipes: a whole job as data, in the shape that `apply_mode` takes and that a checkpoint keeps as its history.

Imports no torch; `run` and `plan` are loaded at first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from modelopt.recipes.load import Recipe, builtin_recipes, load_recipe, parse_recipe, recipe_text

_LAZY = {"run_recipe": "run", "Result": "run", "plan_model": "plan", "Plan": "plan"}

__all__ = ["Recipe", "builtin_recipes", "load_recipe", "parse_recipe", "recipe_text", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
