"""How far an evaluation has come: a bar on a terminal, a line for every part in logs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class SampleProgress:
    """Counts samples.

    Args:
        total: samples that this process will make.
        speaks: whether it says anything; of several processes one does, of its own share.
    """

    def __init__(self, total: int, speaks: bool) -> None:
        self.total, self.speaks, self.made = total, speaks, 0.0
        self.console = Console(soft_wrap=True, highlight=False)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]} samples/s, left"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=self.console, disable=not (speaks and self.console.is_terminal))
        self.task = self.bar.add_task("", total=total, rate="?")
        self._begun = time.monotonic()

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def begin(self, what: str, samples: int, batch_size: int) -> None:
        """Say what is being made; `steps` then counts its `samples` bit by bit."""
        self._portion = samples / -(-samples // batch_size)
        self.bar.update(self.task, description=what)

    def steps(self, turns: Sequence[int]) -> Iterator[int]:
        """The steps of one batch, each of which brings its samples a little further."""
        for turn in turns:
            yield turn
            self.made += self._portion / len(turns)
            self.bar.update(self.task, completed=int(self.made + 1e-6), rate=f"{self.rate:.2f}")

    def done(self, what: str) -> None:
        """Say in a log that something is finished."""
        if self.speaks and not self.console.is_terminal:
            left = (self.total - self.made) / self.rate if self.made else float("inf")
            count = f"{round(self.made):,} of {self.total:,} samples"
            self.console.print(
                f"{what}: {count}, {self.rate:.2f} samples/s, {left / 60:.1f} minutes left", markup=False
            )

    @property
    def rate(self) -> float:
        """Samples a second so far."""
        return self.made / max(1e-6, time.monotonic() - self._begun)
