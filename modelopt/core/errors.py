"""Every error that a user can cause, each one a `ModelOptError` that says what was seen, what was wanted and what to do.

The second base class is the built-in exception that a caller unaware of this library would catch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ModelOptError(Exception):
    """Base class of all errors that this library raises for a reason that the user can act upon."""

    def __str__(self) -> str:
        # KeyError would print the repr of its argument; a message for people is printed as it stands.
        return " ".join(str(a) for a in self.args)


class ConfigError(ModelOptError, ValueError):
    """A configuration, recipe or command line that does not mean anything, or contradicts itself."""


class UnknownNameError(ModelOptError, KeyError):
    """A name that no registry, preset, format or module answers to."""


class FormatError(ModelOptError, ValueError):
    """A number format that cannot be parsed, or cannot hold the given tensor."""


class ShapeError(ModelOptError, ValueError):
    """A tensor whose shape does not fit what it is used for."""


class CalibrationError(ModelOptError, RuntimeError):
    """Calibration that did not happen, did not reach a quantizer, or saw values that are not finite."""


class TraceError(ModelOptError, RuntimeError):
    """A model that cannot be run, traced or analyzed as asked, or a tracing rule that does not fit its module."""


class ModeError(ModelOptError, RuntimeError):
    """A step that cannot follow the steps already applied to a model."""


class CheckpointError(ModelOptError, RuntimeError):
    """A file or directory that is missing, truncated, corrupt, hostile or of another model."""


class ExportError(ModelOptError, RuntimeError):
    """A model that the chosen writer cannot represent, or a result that failed its own verification."""


class MissingAlgorithmError(ModelOptError, NotImplementedError):
    """An algorithm that is known by name but is not part of this version."""


class MissingDependencyError(ModelOptError, ImportError):
    """An optional package that is needed for what was asked and is not installed."""


def nearest(name: str, names: Iterable[str], n: int = 1) -> list[str]:
    """Return up to `n` of `names` that look most like `name`, best first."""
    pool = sorted({str(x) for x in names})
    lowered = {x.lower(): x for x in pool}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=n, cutoff=0.5)
    return [lowered[c] for c in close]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return ` Did you mean "x"?`, or an empty string where nothing is near.

    >>> did_you_mean("nvpf4", ["nvfp4", "int8"])
    ' Did you mean "nvfp4"?'
    """
    close = nearest(name, names)
    return f' Did you mean "{close[0]}"?' if close else ""
