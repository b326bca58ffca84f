"""A zoo of architectures with random weights: timm, torchvision, transformers, diffusers, as small as their code allows.

    build("hf", "causal:llama") -> Example(model, args, kwargs)       names("zoo"): the 186          names("further"): the others

`zoo.txt` is the list on which other pruners were measured; `further.txt` was chosen (one of each module of timm and of
torchvision's families, and the model types of transformers) and frozen before anything of this repository had run on it.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

BUILDERS = {
    "timm": "timm_models",
    "tv": "torchvision_models",
    "hf": "transformers_models",
    "diff": "diffusers_models",
    "plain": "plain_models",
}
NEEDS = {
    "timm": ("timm", "torchvision"),
    "tv": ("torchvision",),
    "hf": ("transformers",),
    "diff": ("transformers", "diffusers"),
    "plain": (),
}


@dataclass(frozen=True)
class Example:
    """A model in eval mode and what it is called with."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def build(kind: str, name: str) -> Example:
    """Build one model with seeded random weights. Whatever the framework raises passes through.

    >>> build("plain", "mlp").model    # doctest: +SKIP
    """
    import torch

    torch.manual_seed(0)
    module = importlib.import_module(f"benchmarks.zoo.{BUILDERS[kind]}")
    example = module.build(name)
    example.model.eval()
    return example


def names(which: str) -> list[tuple[str, str]]:
    """Return (kind, name) of a list: "zoo", "further" or "all"."""
    files = ["zoo", "further"] if which == "all" else [which]
    lines = [line for f in files for line in (Path(__file__).parent / f"{f}.txt").read_text().splitlines()]
    return [(kind, name) for kind, name in (line.split() for line in lines if line and not line.startswith("#"))]


def missing(kind: str) -> list[str]:
    """Return the packages that a kind needs and that are not installed."""
    from importlib.util import find_spec

    return [package for package in NEEDS[kind] if find_spec(package) is None]
