"""Messages: one logger, one warning class, and the progress callback that the command line draws."""

from __future__ import annotations

import logging
import warnings
from typing import Protocol

logger = logging.getLogger("modelopt")


class ModelOptWarning(UserWarning):
    """Something that the user should know and that does not stop the work."""


def warn(message: str, stacklevel: int = 3) -> None:
    """Issue a `ModelOptWarning`."""
    warnings.warn(message, ModelOptWarning, stacklevel=stacklevel)


class Progress(Protocol):
    """Called as work proceeds: `done` of `total` units (None: unknown) of the task called `what`."""

    def __call__(self, done: int, total: int | None, what: str) -> None: ...


def null_progress(done: int, total: int | None, what: str) -> None:
    """Progress that shows nothing."""
