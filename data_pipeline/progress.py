"""Progress bars on a terminal, plain lines in logs."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Self, TypeVar

from rich.progress import BarColumn, Progress, TextColumn
from rich.progress import track as rich_track

Item = TypeVar("Item")

# Between two lines in a log.
SECONDS = 30.0


def track(items: Sequence[Item], description: str) -> Iterable[Item]:
    """Iterate with a bar where a person is looking; without a description there is none."""
    return rich_track(items, description) if description and sys.stdout.isatty() else items


class LineProgress:
    """A line on how a command's work stands: beside a bar on a terminal, now and then in a log.

    Args:
        command: whose work it is.
        silent: say nothing.
    """

    def __init__(self, command: str, silent: bool = False) -> None:
        self._began = self._printed = time.monotonic()
        self._terminal, self._silent = sys.stdout.isatty() and not silent, silent
        columns = (TextColumn(command), BarColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, disable=not self._terminal)
        self._task = self._bar.add_task("", total=1)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, done: float, total: float) -> None:
        """Show that so much is done, where it is time to."""
        now = time.monotonic()
        if self._terminal:
            self._bar.update(self._task, completed=done, total=max(total, 1), description=self.line(now - self._began))
        elif not self._silent and now - self._printed >= SECONDS:
            self._printed = now
            print(self.line(now - self._began), flush=True)

    def line(self, seconds: float) -> str:
        """How the work stands so many seconds after the beginning."""
        raise NotImplementedError


def time_left(work: float, rate: float) -> str:
    """How long work takes at a rate, in hours, minutes and seconds."""
    return f"{timedelta(seconds=round(work / rate))} left" if rate > 0 else "unknown time left"
