"""How far a command has come: a bar on a terminal, a line at intervals in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from datetime import timedelta
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

Item = TypeVar("Item")

# Shorter work shows nothing.
QUIET_SECONDS = 2.0
# Between two lines in a log.
LINE_SECONDS = 30.0


class Progress:
    """Shows on standard error how much of some work is done, at which rate, and the time left.

    Args:
        title: names the work, e.g. "index".
        total: units of the whole work; None if it is unknown.
        unit: plural name of what is counted, e.g. "images".
        silent: show nothing.

    Attributes:
        done: units so far.
        note: what is shown behind the figures, e.g. counts of failures by reason.
    """

    def __init__(self, title: str, total: float | None, unit: str, *, silent: bool = False) -> None:
        self.title, self.total, self.unit, self.note, self.done = title, total, unit, "", 0.0
        self._terminal, self._silent, self._first = sys.stderr.isatty(), silent, 0.0
        self._began = self._printed = time.monotonic()
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def skip(self, done: float) -> None:
        """Count units of an earlier run, which the rate leaves out."""
        self.done = self._first = done

    def advance(self, count: float = 1) -> None:
        """Count some more units."""
        self.show(self.done + count)

    def show(self, done: float) -> None:
        """Set how many units are done in all."""
        self.done = done
        now = time.monotonic()
        if self._silent or now - self._began < QUIET_SECONDS:
            return
        if self._terminal:
            if self._bar is None:
                columns = (TextColumn("{task.description}", markup=False), BarColumn())
                line = TextColumn("{task.fields[line]}", markup=False)
                self._bar = Bar(*columns, line, console=Console(stderr=True))
                self._bar.start()
                self._task = self._bar.add_task(self.title, line="")
            self._bar.update(self._task, completed=done, total=self.total, description=self.title, line=self.line())
        elif now - self._printed >= LINE_SECONDS:
            self._printed = now
            print(f"{self.title}: {self.line()}", file=sys.stderr, flush=True)

    def line(self) -> str:
        """Count, rate, time left, or taken in the end, and note."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = (self.done - self._first) / seconds
        speed = f"{rate:,.{0 if rate >= 10 else 1 if rate >= 1 else 3}f} {self.unit}/s"
        note = f"; {self.note}" if self.note else ""
        if self.total is None:
            return f"{self.done:,.0f} {self.unit}, {speed}{note}"
        if rate > 0 and self.done >= self.total:
            left = f"in {timedelta(seconds=round(seconds))}"
        else:
            left = (
                f"{timedelta(seconds=round((self.total - self.done) / rate))} left" if rate > 0 else "unknown time left"
            )
        return f"{self.done:,.0f} of {self.total:,.0f} {self.unit}, {speed}, {left}{note}"


def track(items: Iterable[Item], title: str, unit: str) -> Iterator[Item]:
    """Iterate over items and show how many are done; a title of "" shows nothing."""
    total = len(items) if isinstance(items, Sized) else None
    with Progress(title, total, unit, silent=not title) as progress:
        for item in items:
            yield item
            progress.advance()
