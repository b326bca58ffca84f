"""The one `torch.library` namespace, and the helper that defines an op in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from modelopt.numerics import Format

NAMESPACE = "modelopt"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define `modelopt::<schema>`, its implementation for all devices and its fake (meta) kernel."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)


def autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any] | None = None) -> None:
    """Give `modelopt::<name>` its autograd formula."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


def notation(fmt: Format | str) -> str:
    """Return the string by which a format travels."""
    return fmt if isinstance(fmt, str) else fmt.text
