"""Optional packages and the plugins that serve them. The only place that may find out whether a package exists.

A plugin is found by a table (framework of the model's own classes -> our module) and loaded when such a model arrives.
A plugin that fails to import raises; it never vanishes.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from types import ModuleType

from modelopt.core.errors import MissingDependencyError


def has(module: str) -> bool:
    """Return whether `module` could be imported, without importing it."""
    if module in sys.modules:
        return sys.modules[module] is not None
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def require(module: str, extra: str, why: str = "") -> ModuleType:
    """Import and return `module`, or raise MissingDependencyError that names the extra to install."""
    if not has(module):
        name, reason = module.split(".")[0], f" {why}" if why else ""
        raise MissingDependencyError(
            f'The package "{name}" is not installed, and it is needed{reason}. Run: pip install "modelopt[{extra}]"'
        )
    return importlib.import_module(module)


class PluginTable:
    """Frameworks (top-level package names) to the module of ours that serves them."""

    def __init__(self, table: dict[str, str]) -> None:
        self.table = dict(table)

    def frameworks_of(self, objects: Iterable[object]) -> list[str]:
        """Return the frameworks of the table that define a class of any of `objects`."""
        seen: dict[type, None] = {}
        for obj in objects:
            seen.setdefault(type(obj))
        packages = {base.__module__.split(".")[0] for cls in seen for base in cls.__mro__}
        return [name for name in self.table if name in packages]

    def load_for(self, objects: Iterable[object]) -> list[ModuleType]:
        """Import the plugins for `objects` (for instance `model.modules()`) and return them."""
        return [importlib.import_module(self.table[name]) for name in self.frameworks_of(objects)]
