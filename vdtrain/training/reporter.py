"""Rank 0's voice: log lines, a progress bar on a terminal, the tracker. Silent on every other rank."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vdtrain.config import TrainConfig
from vdtrain.training.meters import log_line
from vdtrain.training.tracking import Tracker
from vdtrain.training.wandb_access import INIT_SECONDS
from vdtrain.validation import phase_steps

# Share of the watchdog's limit that W&B may take at the start: it is to end a run that stands still, and no outage.
WANDB_OF_WATCHDOG = 0.25


class Reporter:
    """Reports one run.

    Args:
        document: the resolved configuration, for the tracker and for config.yaml in the run folder.
        step: the step that the run continues from.
    """

    def __init__(self, config: TrainConfig, document: Any, step: int, rank: int) -> None:
        self.tracker: Tracker | None = None
        self.progress: Progress | None = None
        self.console = Console(soft_wrap=True, highlight=False, quiet=rank != 0)
        if rank != 0:
            return
        limit = config.watchdog_seconds
        seconds = INIT_SECONDS if limit is None else min(INIT_SECONDS, WANDB_OF_WATCHDOG * limit)
        self.tracker = Tracker(Path(config.run_dir), config.tracking, document, step, self.warn, seconds)
        if self.console.is_terminal:
            batch = config.stage.global_batch_size
            total = sum(phase_steps(config, phase) for phase in config.stage.phases) * batch
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.progress = Progress(*columns, console=self.console)
            self.task = self.progress.add_task(config.stage.name, total=total, completed=step * batch)
            self.progress.start()

    def log(self, record: Mapping[str, Any]) -> None:
        """Print a record and send it to the tracker."""
        if self.tracker is None:
            return
        self._say(log_line(record))
        self.tracker.log(record)

    def warn(self, line: str) -> None:
        """Print what a person should see to; training goes on."""
        self._say(f"warning: {line}")

    def _say(self, line: str) -> None:
        # Standard output may be a file on the disk that is full.
        with contextlib.suppress(OSError):
            self.console.print(line, markup=False)

    def advance(self, pairs: int) -> None:
        """Move the progress bar."""
        if self.progress is not None:
            self.progress.advance(self.task, pairs)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
        if self.tracker is not None:
            self.tracker.close()
