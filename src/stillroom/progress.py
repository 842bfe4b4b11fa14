"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any


class ProgressBars:
    """Called with (what, done, total); one bar for each thing that is going on, with the time left."""

    def __init__(self) -> None:
        """Bars go to standard error, so that output can be piped."""
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._last: tuple[str, float] = ("", 0.0)

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show progress; a bar ends when done reaches total."""
        if sys.stderr.isatty():
            self._draw(what, done, total)
        else:
            self._print(what, done, total)

    def _draw(self, what: str, done: int, total: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        if self._bars is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bars = Progress(*columns, console=Console(stderr=True))
            self._bars.start()
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done, total=total)
        if all(task.finished for task in self._bars.tasks):
            self._bars.stop()
            self._bars, self._tasks = None, {}

    def _print(self, what: str, done: int, total: int) -> None:
        known, at = self._last
        if what != known or done == total or time.monotonic() - at > 30:
            print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)
            self._last = (what, time.monotonic())
