"""What the command line prints: results on the standard output, progress, warnings and errors on the standard error."""

from __future__ import annotations

import functools
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from modelopt.core.logging import ModelOptWarning

PIPE_WIDTH = 200
NARROW = 130


def _width(stream: Any) -> int | None:
    return None if stream.isatty() or os.environ.get("COLUMNS") else PIPE_WIDTH


@functools.lru_cache(maxsize=4)
def _console(stream: Any) -> Console:
    return Console(file=stream, width=_width(stream), highlight=False)


def out() -> Console:
    """Return the console for results."""
    return _console(sys.stdout)


def err() -> Console:
    """Return the console for progress, warnings and errors."""
    return _console(sys.stderr)


def print_line(text: str, style: str = "") -> None:
    """Print one line of a result; nothing in it is read as markup."""
    out().print(Text(text, style=style))


def print_error(error: BaseException | str) -> None:
    """Print an error as one paragraph on the standard error."""
    text = str(error).strip() or type(error).__name__
    err().print(f"[bold red]Error:[/] {escape(text)}", soft_wrap=True)


def print_warning(text: str) -> None:
    """Print a warning as one paragraph on the standard error."""
    err().print(f"[yellow]Warning:[/] {escape(text)}", soft_wrap=True)


def print_json(data: Any) -> None:
    """Print a result as JSON."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = (), title: str = "", wide: Sequence[str] = ()
) -> Table:
    """Return a table; columns in `right` are numbers, a narrow screen drops those in `wide`, and cells are plain text."""
    if out().width < NARROW:
        kept = [i for i, column in enumerate(columns) if column not in wide]
        columns, rows = [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]
    made = Table(title=Text(title) if title else None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        number = column in right
        made.add_column(column, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def size(num_bytes: float) -> str:
    """Return a number of bytes for people, decimal: `91.3 MB`.

    >>> size(91_300_000)
    '91.3 MB'
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes:.0f} B"


@contextmanager
def quiet(debug: bool) -> Iterator[None]:
    """Show this library's warnings as one line each and keep those of others to themselves, unless `debug`."""
    if debug:
        yield
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    shown: set[str] = set()

    def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, ModelOptWarning) and str(message) not in shown:
            shown.add(str(message))
            print_warning(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", ModelOptWarning)
        warnings.showwarning = show
        yield
