"""How an index stands: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn

SECONDS = 30.0


class IndexProgress:
    """Shows shards and megabytes per second, and the time left.

    Args:
        shards, total_bytes: to be read.
    """

    def __init__(self, shards: int, total_bytes: int) -> None:
        self._shards, self._bytes = shards, total_bytes
        self._shards_read = self._bytes_read = 0
        self._began = self._printed = time.monotonic()
        self._terminal = sys.stdout.isatty()
        columns = (TextColumn("index"), BarColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, disable=not self._terminal)
        self._task = self._bar.add_task("", total=max(total_bytes, 1))

    def __enter__(self) -> IndexProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def add(self, size: int) -> None:
        """Another shard of so many bytes has been read."""
        self._shards_read += 1
        self._bytes_read += size
        now = time.monotonic()
        if self._terminal:
            self._bar.update(self._task, completed=self._bytes_read, description=self.line(now - self._began))
        elif now - self._printed >= SECONDS:
            self._printed = now
            print(self.line(now - self._began), flush=True)

    def line(self, seconds: float) -> str:
        """One line of it, so many seconds after the beginning."""
        seconds = max(seconds, 1e-9)
        rate = self._bytes_read / seconds
        left = timedelta(seconds=round((self._bytes - self._bytes_read) / rate)) if rate > 0 else "unknown time"
        return (
            f"{self._shards_read:,} of {self._shards:,} shards, {self._shards_read / seconds:.1f} shards/s, "
            f"{rate / 1e6:,.0f} MB/s, {left} left"
        )
