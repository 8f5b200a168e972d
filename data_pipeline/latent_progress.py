"""How the encoding of pictures stands: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn

SECONDS = 30.0


class LatentProgress:
    """Shows this process's pictures, how many a second, and the time left.

    Args:
        resolution: of the pictures, in pixels.
        world_size: number of processes that share the work; each counts its own.
        silent: for all processes but one.
    """

    def __init__(self, resolution: int, world_size: int, silent: bool = False) -> None:
        self._resolution, self._world_size, self._silent = resolution, world_size, silent
        self._pictures = self._made = 0
        self._began = self._printed = time.monotonic()
        self._terminal = sys.stdout.isatty() and not silent
        columns = (TextColumn("latents"), BarColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, disable=not self._terminal)
        self._task = self._bar.add_task("", total=1)

    def __enter__(self) -> LatentProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def expect(self, pictures: int) -> None:
        """So many more are this process's to make."""
        self._pictures = self._made + pictures

    def add(self, pictures: int) -> None:
        """So many have been made."""
        self._made += pictures
        now = time.monotonic()
        if self._terminal:
            line = self.line(now - self._began)
            self._bar.update(self._task, total=max(1, self._pictures), completed=self._made, description=line)
        elif not self._silent and now - self._printed >= SECONDS:
            self._printed = now
            print(self.line(now - self._began), flush=True)

    def line(self, seconds: float) -> str:
        """One line of it, so many seconds after the beginning."""
        rate = self._made / max(seconds, 1e-9)
        left = timedelta(seconds=round((self._pictures - self._made) / rate)) if rate > 0 else "unknown time"
        whose = "" if self._world_size == 1 else f" of the first of {self._world_size} processes"
        return (
            f"{self._resolution}: {self._made:,} of {self._pictures:,} pictures{whose}, {rate:,.0f} pictures/s, "
            f"{left} left"
        )
