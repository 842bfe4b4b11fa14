"""Progress of long work: a bar on a terminal; elsewhere quiet, but for a line a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

Progress = Callable[[int, int], None]
"""Called with how much of one piece of work is done, and how much there is."""


class NamedProgress(Protocol):
    """Called with what is going on, how much of it is done, and a note that changes with it."""

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        """Show it."""


def silent(*_: Any, **__: Any) -> None:
    """Progress that nobody sees."""


QUIET_SECONDS = 60
"""Off a terminal, the least time between two lines."""


class ProgressBars:
    """Called with (what, done, total); one bar for each thing that is going on, with the time left."""

    def __init__(self) -> None:
        """Bars go to standard error, so that output can be piped."""
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._printed = time.monotonic()

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        """Show progress; a bar ends when done reaches total. The note stands beside it."""
        if sys.stderr.isatty():
            self._draw(what, done, total, note)
        else:
            self._print(what, done, total, note)

    def _draw(self, what: str, done: int, total: int, note: str) -> None:
        from rich import progress as bars
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
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
                TextColumn("{task.fields[note]}"),
            )
            self._bars = bars.Progress(*columns, console=Console(stderr=True))
            self._bars.start()
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total, note=note)
        self._bars.update(self._tasks[what], completed=done, total=total, note=note)
        if all(task.finished for task in self._bars.tasks):
            self.close()

    def close(self) -> None:
        """Take the bars off the terminal, whatever has become of the work."""
        if self._bars is not None:
            self._bars.stop()
            self._bars, self._tasks = None, {}

    def _print(self, what: str, done: int, total: int, note: str) -> None:
        if time.monotonic() - self._printed >= QUIET_SECONDS:
            print(f"{what}: {done}/{total}{'; ' if note else ''}{note}", file=sys.stderr, flush=True)
            self._printed = time.monotonic()
