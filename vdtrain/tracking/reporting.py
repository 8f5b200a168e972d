"""What a run reports: log lines, a progress bar on a terminal, the tracker. Only rank 0 prints."""

from __future__ import annotations

import contextlib
import resource
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vdtrain.config.schema import TrainConfig
from vdtrain.config.validation import phase_steps
from vdtrain.redaction import redacted
from vdtrain.run import distributed
from vdtrain.tracking.metrics import INIT_SECONDS, Tracker
from vdtrain.tracking.speed import StepClock
from vdtrain.tracking.summary import PACE_LINES, age, pace, tracked_at
from vdtrain.tracking.surroundings import environment, processor

if TYPE_CHECKING:
    from vdtrain.training.agreement import StepOutcome


@dataclass
class Meters:
    """Sums since the last log line: losses, gradient norms, waiting, pairs. docs/metrics.md explains the figures.

    Attributes:
        peak: FLOP/s of a matrix product on it.
        flops: of a step of this process; None until they are counted.
    """

    device: torch.device
    peak: float
    flops: int | None = None
    outcomes: list[StepOutcome] = field(default_factory=list)
    waited: float = 0.0
    pairs: int = 0
    steps: int = 0
    began: float = field(default_factory=time.monotonic)
    clock: StepClock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = StepClock(self.device)

    def add(self, outcome: StepOutcome) -> None:
        """Add a step. Skipped steps do not count: their figures are not finite."""
        if outcome.applied:
            self.outcomes.append(outcome)

    def summary(self) -> dict[str, Any]:
        """Means and rates of the interval, ready for JSON and for the tracker."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        flops = None if self.flops is None else self.flops * self.steps / seconds
        outcomes = self.outcomes
        norms = [outcome.gradient_norm for outcome in outcomes]
        return {
            "loss": _means(outcome.losses for outcome in outcomes),
            "loss_quarters": _quarter_means(outcome.quarters for outcome in outcomes),
            # None if all steps of the interval were skipped.
            "gradient_norm": fmean(norms) if norms else None,
            "gradient_norms": _means(outcome.gradient_norms for outcome in outcomes),
            "update_ratios": _means(outcome.update_ratios for outcome in outcomes),
            **_rank_times([outcome.seconds for outcome in outcomes if any(outcome.seconds)]),
            "pairs_per_second": self.pairs / seconds,
            "data_wait": self.waited / seconds,
            "time_shares": {part: spent / seconds for part, spent in self.clock.seconds().items()},
            # Of one process; the share is that of a matrix product's rate, which this run measured.
            "tflops": None if flops is None else flops / 1e12,
            "peak_share": None if flops is None else flops / self.peak,
            "memory_gb": memory_gb(self.device),
        }


def _means(values: Iterable[Mapping[str, float]]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for each in values:
        for name, value in each.items():
            found.setdefault(name, []).append(value)
    return {name: fmean(each) for name, each in found.items()}


def _quarter_means(steps: Iterable[Mapping[str, list[list[float]]]]) -> dict[str, dict[str, float]]:
    """The mean loss of the samples in each quarter of the timesteps; quarters without any are left out."""
    sums: dict[str, dict[str, list[float]]] = {}
    for step in steps:
        for flow, quarters in step.items():
            of_flow = sums.setdefault(flow, {})
            for number, (error, samples) in enumerate(quarters, start=1):
                total = of_flow.setdefault(f"q{number}", [0.0, 0.0])
                total[0], total[1] = total[0] + error, total[1] + samples
    return {
        flow: {name: error / samples for name, (error, samples) in quarters.items() if samples}
        for flow, quarters in sums.items()
    }


def _rank_times(steps: list[list[float]]) -> dict[str, Any]:
    if not steps:
        return {}
    means = [fmean(times) for times in zip(*steps, strict=True)]
    slowest = max(means)
    return {"step_times": {"slowest": slowest, "fastest": min(means)}, "slowest_rank": means.index(slowest)}


def environment_of(config: TrainConfig) -> dict[str, Any]:
    """The `environment` of a run's processes."""
    hosts = [str(machine[0]) for machine, *_ in distributed.peers()]
    return environment(hosts, torch.cuda.get_device_name() if config.hardware.device == "cuda" else processor())


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
    """

    def __init__(self, config: TrainConfig, raw_config: Any, step: int, rank: int) -> None:
        self.tracker: Tracker | None = None
        self.progress: Progress | None = None
        self._config, self._raw_config, self._step, self._rank = config, raw_config, step, rank
        # Of the present phase.
        self._records: deque[Mapping[str, Any]] = deque(maxlen=PACE_LINES)
        self._began = time.monotonic()
        self.console = Console(soft_wrap=True, highlight=False, quiet=rank != 0)
        if rank == 0 and self.console.is_terminal:
            batch = config.stage.global_batch_size
            total = sum(phase_steps(config, phase) for phase in config.stage.phases) * batch
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.progress = Progress(*columns, console=self.console)
            self.task = self.progress.add_task(config.stage.name, total=total, completed=step * batch)
            self.progress.start()

    def begin(self) -> None:
        """Open the tracker, unless it is open: the start has succeeded, and figures of lost steps may be dropped."""
        if self._rank != 0 or self.tracker is not None:
            return
        config = self._config
        limit, run_dir, tracking, stage = config.watchdog_seconds, Path(config.run_dir), config.tracking, config.stage
        seconds = INIT_SECONDS if limit is None else min(INIT_SECONDS, WANDB_OF_WATCHDOG * limit)
        content = {**self._raw_config, "environment": redacted(environment_of(config))}
        self.tracker = Tracker(
            run_dir, tracking, content, self._step, self.warn, seconds, stage.global_batch_size, stage.init_from
        )
        if self.tracker.on_wandb:
            self.note(f"Weights & Biases: {tracked_at(run_dir, tracking)}")
        if tracking.tensorboard:
            self.note(f"TensorBoard: tensorboard --logdir {run_dir / 'tensorboard'}")

    def log(self, record: Mapping[str, Any]) -> None:
        """Print a record, with the time of day and the time left, and send it to the tracker."""
        self.add(record, f"{datetime.now():%H:%M:%S} | {log_line(record)}{self._left(record)}")

    def _left(self, record: Mapping[str, Any]) -> str:
        """The end of a line: how long the phase still takes, at the pace of its lines, or how long the stage took."""
        if self._records and self._records[-1]["phase"] != record["phase"]:
            self._records.clear()
        self._records.append(record)
        phases, batch = self._config.stage.phases, self._config.stage.global_batch_size
        number = record["phase"]
        end = batch * sum(phase_steps(self._config, phase) for phase in phases[: number + 1])
        rate = pace(self._records)
        if not rate:
            return ""
        last = number == len(phases) - 1
        if last and record["samples"] >= end:
            return f" | {age(time.monotonic() - self._began)} since the start"
        of_phase = "" if last else f" in phase {number + 1} of {len(phases)}"
        return f" | {age((end - record['samples']) / rate)} left{of_phase}"

    def add(self, record: Mapping[str, Any], line: str) -> None:
        """Print a line, and send its record to the tracker."""
        if self.tracker is None:
            return
        self.note(line)
        self.tracker.log(record)

    def log_image(self, name: str, path: Path, samples: int) -> None:
        """Send an image to the tracker; see `Tracker.log_image`."""
        if self.tracker is not None:
            self.tracker.log_image(name, path, samples)

    def stalled(self, line: str) -> None:
        """Alert that training stands still. The watchdog calls it, and must not wait for a tracker."""
        if self.tracker is not None:
            alert = partial(self.tracker.alert, "training stands still", line)
            threading.Thread(target=alert, name="alert", daemon=True).start()

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
