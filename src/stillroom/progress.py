"""Progress of long work: a bar on a terminal; elsewhere, and on one that cannot redraw a line, one line per minute."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

Progress = Callable[[int, int], None]
"""Called with how much of one piece of work is done, and how much there is."""


class NamedProgress(Protocol):
    """Called with the current activity, how much of it is done, and a note that changes with it."""

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        """Show it."""


def silent(*_: Any, **__: Any) -> None:
    """Progress that nobody sees."""


QUIET_SECONDS = 60
"""Off a terminal, the least time between two lines."""


def _redraws() -> bool:
    """Whether standard error is a terminal on which a line can be drawn again."""
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


def _bars() -> Any:
    """Bars, each below a line that says of what: the two together would not fit a terminal of 80 columns."""
    from rich import progress
    from rich.console import Console
    from rich.text import Text

    class Bars(progress.Progress):
        def get_renderables(self) -> Iterator[Any]:
            for task in self.tasks:
                note = task.fields["note"]
                yield Text(f"{task.description}: {note}" if note else task.description)
                yield self.make_tasks_table([task])

    return Bars(
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        refresh_per_second=4,
        redirect_stdout=False,  # it may be a file, and would be written to the terminal
    )


class ProgressBars:
    """Called with (what, done, total); one bar per activity, with the time left."""

    def __init__(self) -> None:
        """Bars go to standard error, so that output can be piped."""
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._printed = time.monotonic()

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        """Show progress; a bar ends when done reaches total. The note stands above it."""
        if _redraws():
            self._draw(what, done, total, note)
        else:
            self._print(what, done, total, note)

    def _draw(self, what: str, done: int, total: int, note: str) -> None:
        if self._bars is None:
            self._bars = _bars()
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
