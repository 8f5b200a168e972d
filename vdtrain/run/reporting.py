"""What a run reports: log lines, a progress bar on a terminal, the tracker. Only rank 0 prints."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vdtrain.config.schema import TrainConfig
from vdtrain.config.validation import phase_steps
from vdtrain.run.speed import StepClock
from vdtrain.run.tracking import Tracker
from vdtrain.run.wandb_run import INIT_SECONDS

if TYPE_CHECKING:
    from vdtrain.training.trainer import StepOutcome


@dataclass
class Meters:
    """Sums since the last log line: losses, gradient norms, waiting, pairs.

    Attributes:
        device: that this process trains on.
        peak: FLOP/s of a matrix product on it.
        flops: of a step of this process; None until they are counted.
        clock: of the parts of the steps.
    """

    device: torch.device
    peak: float
    flops: int | None = None
    losses: dict[str, list[float]] = field(default_factory=dict)
    gradient_norms: list[float] = field(default_factory=list)
    waited: float = 0.0
    pairs: int = 0
    steps: int = 0
    began: float = field(default_factory=time.monotonic)
    clock: StepClock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = StepClock(self.device)

    def add(self, outcome: StepOutcome) -> None:
        """Add a step. Skipped steps do not count: their figures are not finite."""
        if not outcome.applied:
            return
        self.gradient_norms.append(outcome.gradient_norm)
        for name, loss in outcome.losses.items():
            self.losses.setdefault(name, []).append(loss)

    def summary(self) -> dict[str, Any]:
        """Means and rates of the interval, ready for JSON and for the tracker."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        flops = None if self.flops is None else self.flops * self.steps / seconds
        return {
            "loss": {name: sum(values) / len(values) for name, values in self.losses.items()},
            # None if all steps of the interval were skipped.
            "gradient_norm": sum(self.gradient_norms) / len(self.gradient_norms) if self.gradient_norms else None,
            "pairs_per_second": self.pairs / seconds,
            "data_wait": self.waited / seconds,
            "time_shares": {part: spent / seconds for part, spent in self.clock.seconds().items()},
            # Of one process; the share is that of a matrix product's rate, which this run measured.
            "tflops": None if flops is None else flops / 1e12,
            "peak_share": None if flops is None else flops / self.peak,
            "memory_gb": memory_gb(self.device),
        }


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process in GB (1e9 bytes): of the GPU if there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def log_line(record: Mapping[str, Any]) -> str:
    """A record as a log line."""
    losses = " | ".join(f"{name} {loss:.4f}" for name, loss in record["loss"].items()) or "no step counted"
    norm = "-" if record["gradient_norm"] is None else f"{record['gradient_norm']:.3f}"
    shares = {"data wait": record["data_wait"], **record["time_shares"]}
    times = ", ".join(f"{part} {share:.0%}" for part, share in shares.items())
    rate = "" if record["tflops"] is None else f"{record['tflops']:.3g} TFLOP/s ({record['peak_share']:.0%}) | "
    return (
        f"step {record['step']} | {record['resolution']} px | "
        f"samples {record['samples']:,}/{record['total_samples']:,} | "
        f"{losses} | grad {norm} | lr {record['learning_rate']:.2e} | "
        f"{record['pairs_per_second']:.1f} pairs/s | {rate}{times} | {record['memory_gb']:.2f} GB"
        + (f" | skipped {record['skipped']}" if record["skipped"] else "")
        + (f" | bad samples {record['replaced']}" if record["replaced"] else "")
    )


# Share of the watchdog's limit that W&B may take at the start, so that an outage does not look like a hang.
WANDB_OF_WATCHDOG = 0.25


class Reporter:
    """Reports one run.

    Args:
        raw_config: the resolved configuration, for the tracker and for config.yaml in the run folder.
        step: the step that the run continues from.
    """

    def __init__(self, config: TrainConfig, raw_config: Any, step: int, rank: int) -> None:
        self.tracker: Tracker | None = None
        self.progress: Progress | None = None
        self.console = Console(soft_wrap=True, highlight=False, quiet=rank != 0)
        if rank != 0:
            return
        limit = config.watchdog_seconds
        seconds = INIT_SECONDS if limit is None else min(INIT_SECONDS, WANDB_OF_WATCHDOG * limit)
        self.tracker = Tracker(Path(config.run_dir), config.tracking, raw_config, step, self.warn, seconds)
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
        self.note(log_line(record))
        self.tracker.log(record)

    def warn(self, line: str) -> None:
        """Print a warning; training continues."""
        self.note(f"warning: {line}")

    def note(self, line: str) -> None:
        """Print a line."""
        # Standard output may be a file on a full disk.
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
