"""Agreement of all processes: on the settings at the start, and on each step.

A step needs it for trouble with the data, for skipped steps, and for a run that makes no progress.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from vdtrain.config.fields import shown
from vdtrain.config.instantiate import leaves
from vdtrain.config.schema import ProcessesConfig, TrainConfig
from vdtrain.data.loading import data_problem
from vdtrain.data.manifest import ManifestError
from vdtrain.data.stream import StreamError
from vdtrain.diffusion.objective import QUARTERS
from vdtrain.engine.engine import StepReport
from vdtrain.errors import ConfigError, one_line, passes
from vdtrain.redaction import redacted
from vdtrain.run import distributed
from vdtrain.run.distributed import SharedError
from vdtrain.run.watchdog import Watchdog
from vdtrain.training.continuation import SAID, UNSAID, UNSET, within

# Settings that a process may have of its own: of its node, or used by process 0 alone. Of the data, only those that say
# which samples are trained on must be the same. A value with a slash is a place, which may differ, too.
OWN = (
    *(each.name for each in fields(ProcessesConfig)),
    *("runs_dir", "run_dir", "tracking", "max_restarts", "watchdog_seconds"),
    *(f"hardware.{name}" for name in ("name", "memory_gb", "micro_batch_size", "loader_workers", "threads", "rates")),
)
# Characters of the line on a skipped step that name samples.
NAMED_CHARACTERS = 2000
# Errors that say themselves what is wrong and what to do.
KNOWN = (ConfigError, ManifestError, StreamError, OSError)


class DataError(SharedError):
    """The data of a process cannot be read, so all stop after the same step.

    Attributes:
        passes: whether a later start may do better.
        stuck: whether a thread of this process still waits for a read.
    """

    def __init__(self, message: str, passes: bool, stuck: bool = False) -> None:
        super().__init__(message)
        self.passes, self.stuck = passes, stuck


def agree_on_settings(raw_config: DictConfig) -> None:
    """Refuse settings that the processes do not share, as when the commands on two nodes differ.

    Without this, each process would update its part of the weights by its own settings, or wait for the others in vain.
    Every process calls it.

    Raises:
        ConfigError: on every process.
    """

    settings: Any = redacted(OmegaConf.to_container(raw_config, resolve=True))
    mine = {name: shown(value) for name, value in leaves("", settings) if _is_shared(name)}
    first: dict[str, str] = distributed.broadcast_json(mine)
    line = None
    for name in dict.fromkeys([*first, *mine]):
        theirs, ours = first.get(name, UNSET), mine.get(name, UNSET)
        if theirs != ours and "/" not in f"{theirs}{ours}":
            line = f"{name}={theirs}: process {distributed.rank()} has {ours}; give all processes the same settings"
            break
    if (found := distributed.first_failure(line)) is not None:
        raise ConfigError(found)


def _is_shared(name: str) -> bool:
    if within(name, ("data",)):
        return within(name, SAID) and not within(name, UNSAID)
    return not within(name, OWN)


@dataclass(frozen=True)
class Tried:
    """A step of this process that is not known to be applied.

    Attributes:
        names: of the samples; see `Batch`.
        positions: int64 [b].
        losses: of each micro-batch, by flow.
    """

    names: Sequence[str]
    positions: Tensor
    losses: list[dict[str, Tensor]]

    def poisoned(self) -> str:
        """Which flows' losses are not finite, and the samples of those micro-batches; empty if all are."""
        bad = [{name for name, loss in each.items() if not math.isfinite(loss)} for each in self.losses]
        flows = sorted(set().union(*bad))
        if not flows:
            return ""
        names = self.names or [f"position {position}" for position in self.positions.tolist()]
        micro = len(names) // len(self.losses)
        samples = [name for number, name in enumerate(names) if bad[number // micro]]
        listed = ", ".join(samples)
        if len(listed) > NAMED_CHARACTERS:
            listed = f"{listed[:NAMED_CHARACTERS]}..."
        whose = "the sample" if len(samples) == 1 else f"a micro-batch, of these {len(samples)} samples"
        return f"the loss of {', '.join(flows)} is not finite on process {distributed.rank()}, for {whose}: {listed}"


def agreed(error: Exception | None, config: TrainConfig, watchdog: Watchdog) -> DataError | None:
    """What ends the run if the data of a process failed. Every process calls it, with its own error or None."""
    failure = None
    if error is not None:
        watchdog.record(f"process {distributed.rank()} could not go on with its data", error)
        line = f"{type(error).__name__}: {one_line(error)}; see {watchdog.folder}"
        failure = [data_problem(error, config.data.manifest) if isinstance(error, KNOWN) else line, passes(error)]
    failures = [(rank, *each) for rank, each in enumerate(distributed.gather_json(failure)) if each]
    if not failures:
        return None
    rank, line, _ = failures[0]
    others = f" and {len(failures) - 1} more" if len(failures) > 1 else ""
    if len({each[1] for each in failures}) > 1 or len(failures) < distributed.world_size():
        line = f"process {rank}{others}: {line}"
    return DataError(line, passes=all(each[2] for each in failures))


# Sums of squares of such numbers are exact in float64 for up to 8192 processes.
HASH_BITS = 20


@dataclass(frozen=True)
class StepOutcome:
    """A step as all processes saw it.

    Attributes:
        losses: mean over the processes of each flow that ran.
        gradient_norm: see StepReport.
        applied: False if the step was skipped because a loss or a gradient was not finite.
        stop: whether a process was asked to stop; all processes then stop after the same step.
        replaced: number of bad samples replaced by others, over all processes.
        gradient_norms: as `gradient_norm`, of each layer group.
        update_ratios: 2-norm of each layer group's update over that of its weights; empty if it was not measured.
        quarters: of each flow, the sum of the samples' errors and their number in each quarter of the timesteps.
        seconds: each process's time of an earlier step, by rank; see `StepSync.submit`.
    """

    step: int
    losses: dict[str, float]
    gradient_norm: float
    applied: bool
    stop: bool
    replaced: int = 0
    gradient_norms: dict[str, float] = field(default_factory=dict)
    update_ratios: dict[str, float] = field(default_factory=dict)
    quarters: dict[str, list[list[float]]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)


class StepSync:
    """Agreement between processes on each step: one all-reduce of losses, norm, signals, meters and a fingerprint.

    Args:
        flows: names of all flows that a step may run, the same on every process.
        groups: names of the layer groups that the engine reports on.
    """

    def __init__(self, flows: Sequence[str], device: torch.device, groups: Sequence[str] = ()) -> None:
        self.flows, self.groups = list(flows), list(groups)
        self.device = device
        processes = distributed.world_size()
        # Losses; what `submit` names; sums by layer group; sums by flow and quarter; seconds by rank.
        self._sizes = [len(self.flows), 6, 3 * len(self.groups), 2 * QUARTERS * len(self.flows), processes]
        # Of the submitted step: its number, the flows that ran, the exchanged vector, and what waits for that.
        self._pending: tuple[int, list[str], Tensor, Callable[[], object]] | None = None

    def submit(
        self,
        step: int,
        losses: Mapping[str, Tensor],
        report: StepReport,
        signal_number: int,
        replaced: int = 0,
        quarters: Tensor | None = None,
        seconds: float = 0.0,
    ) -> None:
        """Start the exchange of a step. Every process must call it once per step, after `collect`.

        Args:
            losses: by flow, in the order that they ran.
            signal_number: of the signal that this process received; 0 for none.
            replaced: number of bad samples replaced in this process's batch.
            quarters: see `QuarterLosses.sums`.
            seconds: that this process worked in the step before, without its waits for the others; 0 if not known.
        """
        ran = list(losses)
        number = fingerprint(step, ran)
        # Filled one by one: building a GPU tensor from Python numbers would wait for the GPU.
        vector = torch.zeros(sum(self._sizes), dtype=torch.float64, device=self.device)
        means, words, groups, parts, times = vector.split(self._sizes)
        for slot, name in enumerate(self.flows):
            if name in losses:
                means[slot] = losses[name].detach()
        words[0], words[1] = report.gradient_norm, report.applied
        for slot, value in enumerate((signal_number, replaced, number, number * number), start=2):
            words[slot].fill_(value)
        if self.groups:
            groups.copy_(report.squares.flatten())
        if quarters is not None:
            parts.copy_(quarters.flatten())
        times[distributed.rank()].fill_(seconds)
        work = dist.all_reduce(vector, async_op=True) if distributed.world_size() > 1 else None
        if self.device.type == "cuda":
            if work is not None:
                work.wait()  # The stream waits, not this process.
            vector = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True).copy_(vector, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self._pending = step, ran, vector, arrived.synchronize
        else:
            self._pending = step, ran, vector, (lambda: None) if work is None else work.wait

    def collect(self) -> StepOutcome | None:
        """The outcome of the submitted step; None if no step was submitted since.

        Raises:
            SharedError: on every process, if their steps or flows differ.
        """
        if self._pending is None:
            return None
        (step, ran, vector, wait), self._pending = self._pending, None
        wait()
        losses, words, groups, parts, times = (part.tolist() for part in vector.split(self._sizes))
        norm, applied, signals, replaced, number, squares = words
        processes = distributed.world_size()
        # Equality holds only if all numbers are equal (Cauchy-Schwarz).
        if processes * int(squares) != int(number) ** 2:
            raise SharedError(
                f"step {step}: the processes differ in their step or flows (process {distributed.rank()} ran "
                f"{', '.join(ran)}), so their weights are wrong; give all processes the same configuration and "
                "seed, and run the same command again"
            )
        means = {name: loss / processes for name, loss in zip(self.flows, losses, strict=True) if name in ran}
        sums = dict(zip(self.groups, _rows(groups, 3), strict=True))
        quarters = zip(self.flows, _rows(_rows(parts, 2), QUARTERS), strict=True)
        return StepOutcome(
            step=step,
            losses=means,
            gradient_norm=norm / processes,
            applied=applied == processes,
            stop=signals > 0,
            replaced=int(replaced),
            gradient_norms={group: math.sqrt(gradient) for group, (gradient, _, _) in sums.items()},
            update_ratios={
                group: math.sqrt(update / weights) for group, (_, weights, update) in sums.items() if weights > 0
            },
            quarters={name: each for name, each in quarters if name in ran},
            seconds=times,
        )


class BadSteps:
    """Counts skipped steps and ends a run that makes no progress.

    Args:
        limit: number of skipped steps in a row that is an error (optimizer.max_bad_steps).
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._in_a_row = 0

    def add(self, outcome: StepOutcome) -> None:
        """Count a step.

        Raises:
            SharedError: on every process, if the limit is reached.
        """
        if outcome.applied:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        if self._in_a_row < self.limit:
            return
        bad = [name for name, loss in outcome.losses.items() if not math.isfinite(loss)]
        raise SharedError(
            f"step {outcome.step}: the last {self._in_a_row} steps were skipped because a loss or a gradient was not "
            f"finite (losses not finite: {', '.join(bad) or 'none'}; optimizer.max_bad_steps={self.limit}); they "
            "changed no weights: continue from the last checkpoint with a lower stage.learning_rate, or look for the "
            "cause in the data"
        )


def _rows(values: list[Any], width: int) -> list[list[Any]]:
    return [values[first : first + width] for first in range(0, len(values), width)]


def fingerprint(step: int, flows: Sequence[str]) -> int:
    """A hash below 2^20 of a step and its flows in order; two different steps collide once in a million."""
    digest = hashlib.sha256(f"{step} {' '.join(flows)}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> (32 - HASH_BITS)
