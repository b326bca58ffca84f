"""The progress callback that the command line draws: a bar with an estimate for each task, on the standard error."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from modelopt.cli.console import err

LINE_SECONDS = 2.0  # where the output is no terminal, only tasks that take longer get a line


class Bars:
    """A `modelopt.core.logging.Progress`; also a context manager. Tasks are known by their names, and may come again."""

    def __init__(self) -> None:
        self._live = err().is_terminal
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=err(),
            disable=not self._live,
        )
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def __call__(self, done: int, total: int | None, what: str) -> None:
        """Draw `done` of `total` units of the task called `what`."""
        if what not in self._started:
            self._started[what] = time.perf_counter()
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done, total=total)
        if total is not None and done >= total:
            self._finish(what)

    def _finish(self, what: str) -> None:
        seconds = time.perf_counter() - self._started.pop(what)
        task = self._tasks.pop(what)
        if seconds < LINE_SECONDS and self._live:
            self._bars.remove_task(task)
        elif seconds >= LINE_SECONDS and not self._live:
            err().print(f"{what}: {seconds:.0f} s", markup=False)

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Show a task without units while a block runs."""
        self(0, None, what)
        try:
            yield
        finally:
            self(1, 1, what)
