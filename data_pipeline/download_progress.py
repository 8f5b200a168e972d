"""How a download stands: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn

from data_pipeline.failures import Tally

SECONDS = 30.0


class DownloadProgress:
    """Shows pictures per second, the success rate, the commonest failures and the time left.

    Args:
        pictures: of all parts.
    """

    def __init__(self, pictures: int) -> None:
        self._pictures = pictures
        self._began = self._printed = time.monotonic()
        self._at_first: int | None = None
        self._terminal = sys.stdout.isatty()
        columns = (TextColumn("download"), BarColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, disable=not self._terminal)
        self._task = self._bar.add_task("", total=pictures)

    def __enter__(self) -> DownloadProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, tally: Tally) -> None:
        """Show the pictures so far, those of earlier runs among them."""
        if self._at_first is None:
            self._at_first = tally.count
        now = time.monotonic()
        if self._terminal:
            self._bar.update(self._task, completed=tally.count, description=self.line(tally, now))
        elif now - self._printed >= SECONDS:
            self._printed = now
            print(self.line(tally, now), flush=True)

    def line(self, tally: Tally, now: float) -> str:
        """One line of it."""
        rate = (tally.count - (self._at_first or 0)) / max(now - self._began, 1e-9)
        left = timedelta(seconds=round((self._pictures - tally.count) / rate)) if rate > 0 else "unknown time"
        return (
            f"{tally.count:,} of {self._pictures:,} pictures, {rate:,.0f}/s, {tally.success_share:.0%} fetched, {left} "
            f"left; failed: {tally.failures(3)}"
        )
