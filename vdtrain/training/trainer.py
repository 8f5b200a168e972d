"""The training loop of one stage: phases, steps, logging, checkpoints. It never names a modality.

One step encodes each sample once, sends it through every flow of the stage, sums the losses, accumulates the gradients
over micro-batches, and updates once.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vdtrain.checkpoint.folder import CheckpointError
from vdtrain.checkpoint.saver import BackgroundSaver
from vdtrain.config.schema import PhaseConfig, TrainConfig
from vdtrain.config.validation import micro_batches, phase_steps, stage_flows, warmup_samples
from vdtrain.data.batch import Batch, BatchStream
from vdtrain.data.loading import Prefetcher, data_problem, open_stream
from vdtrain.data.manifest import ManifestError
from vdtrain.data.stream import StreamError
from vdtrain.diffusion.objective import Denoiser, Objective, StepRandom
from vdtrain.engine.engine import Engine, ShardEMA, StepReport
from vdtrain.errors import one_line
from vdtrain.models.frozen import each_tensor
from vdtrain.planning.dry_run import DryRun
from vdtrain.run import distributed
from vdtrain.run.distributed import SharedError
from vdtrain.run.reporting import Meters, Reporter
from vdtrain.run.signals import StopSignal
from vdtrain.run.speed import BACKWARD, ENCODE, FORWARD, OPTIMISER, OperatorCount, StepClock, matmul_rate
from vdtrain.run.watchdog import Watchdog
from vdtrain.training.continuation import STATE, stage_steps
from vdtrain.training.state import TrainState

# Sums of squares of such numbers are exact in float64 for up to 8192 processes.
HASH_BITS = 20
# Compiling may take this many times `watchdog_seconds`.
COMPILE_PATIENCE = 6.0


@dataclass(frozen=True)
class StepOutcome:
    """A step as all processes saw it.

    Attributes:
        step: its number.
        losses: mean over the processes of each flow that ran.
        gradient_norm: see StepReport.
        applied: False if the step was skipped because a loss or a gradient was not finite.
        stop: whether a process was asked to stop; all processes then stop after the same step.
        replaced: number of bad samples replaced by others, over all processes.
    """

    step: int
    losses: dict[str, float]
    gradient_norm: float
    applied: bool
    stop: bool
    replaced: int = 0


class StepSync:
    """Agreement between processes on each step: one all-reduce of losses, norm, signals and a fingerprint.

    Args:
        flows: names of all flows that a step may run, the same on every process.
        device: of the losses and reports.
    """

    def __init__(self, flows: Sequence[str], device: torch.device) -> None:
        self.flows = list(flows)
        self.device = device
        self._pending: _Pending | None = None

    def submit(
        self, step: int, losses: Mapping[str, Tensor], report: StepReport, signal_number: int, replaced: int = 0
    ) -> None:
        """Start the exchange of a step. Every process must call it once per step, after `collect`.

        Args:
            losses: by flow, in the order that they ran.
            signal_number: of the signal that this process received; 0 for none.
            replaced: number of bad samples replaced in this process's batch.
        """
        ran = list(losses)
        number = fingerprint(step, ran)
        count = len(self.flows)
        # Filled one by one: building a GPU tensor from Python numbers would wait for the GPU.
        vector = torch.zeros(count + 6, dtype=torch.float64, device=self.device)
        for slot, name in enumerate(self.flows):
            if name in losses:
                vector[slot] = losses[name].detach()
        vector[count], vector[count + 1] = report.gradient_norm, report.applied
        for slot, value in enumerate((signal_number, replaced, number, number * number), start=count + 2):
            vector[slot].fill_(value)
        work = dist.all_reduce(vector, async_op=True) if distributed.world_size() > 1 else None
        if self.device.type == "cuda":
            if work is not None:
                work.wait()  # The stream waits, not this process.
            vector = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True).copy_(vector, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self._pending = _Pending(step, ran, vector, arrived.synchronize)
        else:
            self._pending = _Pending(step, ran, vector, None if work is None else work.wait)

    def collect(self) -> StepOutcome | None:
        """The outcome of the submitted step; None if no step was submitted since.

        Raises:
            SharedError: on every process, if their steps or flows differ.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        if pending.wait is not None:
            pending.wait()
        *losses, norm, applied, signals, replaced, number, squares = pending.vector.tolist()
        processes = distributed.world_size()
        # Equality holds only if all numbers are equal (Cauchy-Schwarz).
        if processes * int(squares) != int(number) ** 2:
            raise SharedError(
                f"step {pending.step}: the processes differ in their step or flows (process {distributed.rank()} ran "
                f"{', '.join(pending.ran)}), so their weights are wrong; give all processes the same configuration and "
                "seed, and run the same command again"
            )
        means = {name: loss / processes for name, loss in zip(self.flows, losses, strict=True) if name in pending.ran}
        return StepOutcome(pending.step, means, norm / processes, applied == processes, signals > 0, int(replaced))


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


@dataclass(frozen=True)
class _Pending:
    step: int
    ran: list[str]
    vector: Tensor
    wait: Callable[[], object] | None


def fingerprint(step: int, flows: Sequence[str]) -> int:
    """A hash below 2^20 of a step and its flows in order; two different steps collide once in a million."""
    digest = hashlib.sha256(f"{step} {' '.join(flows)}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> (32 - HASH_BITS)


class Trainer:
    """Trains one stage on this process's device, from its start to its end. `build_trainer` makes one.

    Args:
        ema: None trains without EMA.
        watchdog: receives a heartbeat at every step.
        state: the position in the stage; updated in place.
        record: constant content of every checkpoint, beside the state.
    """

    def __init__(
        self,
        config: TrainConfig,
        place: distributed.RankInfo,
        *,
        engine: Engine,
        objective: Objective,
        ema: ShardEMA | None,
        saver: BackgroundSaver,
        reporter: Reporter,
        watchdog: Watchdog,
        state: TrainState,
        record: dict[str, Any],
    ) -> None:
        self.config, self.place = config, place
        self.engine, self.objective, self.ema = engine, objective, ema
        self.saver, self.reporter, self.watchdog = saver, reporter, watchdog
        self.state, self.record = state, record
        self.flow_names = [flow.name for flow in stage_flows(config)]
        self.total_steps = sum(phase_steps(config, phase) for phase in config.stage.phases)

    def run(self, stop: StopSignal | None = None) -> bool:
        """Train to the end of the stage, or until a signal asks to stop; True if the stage is complete.

        Args:
            stop: signals received since the process started; by default, those from now on.

        Raises:
            CheckpointError: the last checkpoint could not be written; the previous one remains.
            SharedError: on every process, if the data cannot be read on one of them.
            StreamError: the data can no longer be read on this process.
        """
        given, stop = stop, stop or StopSignal()
        self._peak = matmul_rate(self.place.device, self.engine.compute_dtype)
        try:
            while self.state.phase < len(self.config.stage.phases):
                if not distributed.all_agree(stop.number == 0):
                    break
                if self._run_phase(self.config.stage.phases[self.state.phase], stop):
                    break
                self.state.phase, self.state.phase_step = self.state.phase + 1, 0
            self._save_last()
            return self.state.completes(stage_steps(self.config.stage))
        finally:
            if given is None:
                stop.restore()
            self.close()

    def close(self) -> None:
        """Release the tracker, the saver, the engine and their process groups."""
        self.reporter.close()
        self.saver.close()
        self.engine.close()

    def _run_phase(self, phase: PhaseConfig, stop: StopSignal) -> bool:
        """Train the phase from the present position to its end; True if a signal stopped it."""
        config, batch_size = self.config, self.config.stage.global_batch_size
        steps = phase_steps(config, phase)
        if self.state.phase_step >= steps:
            return False
        if self.ema is not None and self.state.phase_step == 0:
            self.ema.restart()
        batches = Prefetcher(self._open_stream(), self.objective.prepare)
        sync, bad_steps = StepSync(self.flow_names, self.place.device), BadSteps(config.optimizer.max_bad_steps)
        meters, asked = Meters(self.place.device, self._peak), False
        compiled, first = config.hardware.compile == "none", self.state.phase_step

        def collect() -> bool:
            """Take in the outcome of the last submitted step; True if a process was asked to stop."""
            outcome = sync.collect()
            if outcome is None:
                return False
            bad_steps.add(outcome)
            meters.add(outcome)
            self.state.skipped += not outcome.applied
            self.state.replaced += outcome.replaced
            return outcome.stop

        try:
            while self.state.phase_step < steps and not asked:
                self.watchdog.heartbeat(f"step {self.state.step + 1}, waiting for data")
                asked_at = time.monotonic()
                batch = next(batches)
                meters.waited += time.monotonic() - asked_at
                self.watchdog.place = f"step {self.state.step + 1}"
                if not compiled:
                    flops = self._compile(batch, phase)
                    meters, compiled = Meters(self.place.device, self._peak, flops), True
                # In the second step what happens once is over. Compiled code would run eagerly while it is counted.
                counts = config.hardware.compile == "none" and self.state.phase_step == first + 1
                count = OperatorCount() if counts else None
                with count or contextlib.nullcontext():
                    losses, report = self.step(batch, phase, meters.clock)
                meters.flops = meters.flops if count is None else count.flops
                # The previous step's outcome arrives now. This step's exchange overlaps with the next step.
                asked = collect()
                sync.submit(self.state.step, losses, report, stop.number, sum(batch.replaced.values()))
                meters.pairs += batch_size
                meters.steps += 1
                last = self.state.phase_step == steps
                saves = last or self.state.step % config.checkpoint.every_steps == 0
                logs = last or self.state.step % config.log_every_steps == 0
                if saves or logs:
                    asked = collect() or asked
                if logs:
                    self.reporter.log(self._record(phase, meters))
                    meters = Meters(self.place.device, self._peak, meters.flops)
                if saves:
                    self._begin_save()
                self._report_saves()
                self.reporter.advance(batch_size)
            asked = collect() or asked
            self._finish_saves()
        finally:
            batches.close()
        return asked

    def _open_stream(self) -> BatchStream:
        """Open the phase's stream at the present position, on every process or on none."""
        config, failure = self.config, None
        stream: BatchStream | None = None
        try:
            stream = open_stream(
                config,
                self.state.phase,
                rank=self.place.rank,
                world_size=self.place.world_size,
                step=self.state.phase_step,
            )
        except (ManifestError, StreamError, OSError) as error:
            failure = data_problem(error, config.data.manifest)
        distributed.raise_if_any(failure)
        assert stream is not None
        identity = getattr(stream, "identity", "")
        if self.state.phase_step > 0 and identity != self.state.data:
            self.reporter.warn(
                f"data.manifest={config.data.manifest}: its shards have changed since the checkpoint, so the order of "
                "the samples has too: in this epoch some samples repeat and others are missed"
            )
        self.state.data = identity
        return stream

    def _compile(self, batch: Batch, phase: PhaseConfig) -> int | None:
        """Run one micro-batch forward and backward without any effect, so that no step waits for the compiler.

        Returns:
            A step's floating-point operations by a dry run; None if it fails, and on ranks that log nothing.
        """
        began, clock = time.monotonic(), StepClock(self.place.device)
        with self.watchdog.patient(f"compiling for {phase.resolution} pixels", COMPILE_PATIENCE):
            local, count = self._local(phase)
            losses = self._losses(self.engine.module, batch, slice(0, local // count), local, phase, clock)
            # This parameter lies before every block, so that all of them compute gradients; none accumulates.
            first = next(parameter for parameter in self.engine.module.parameters() if parameter.requires_grad)
            torch.autograd.grad(self.objective.total(losses), first)
            flops = None
            if self.place.rank == 0:
                try:
                    flops = count * DryRun(self.config).measure(phase.resolution, local // count).flops
                except Exception as error:  # layers of one's own may not run without values; training must go on
                    self.reporter.warn(f"no TFLOP/s are logged, because a dry run failed: {one_line(error)}")
            distributed.barrier()
        self.reporter.note(f"compiled for {phase.resolution} pixels in {time.monotonic() - began:.0f} s")
        return flops

    def _local(self, phase: PhaseConfig) -> tuple[int, int]:
        """Pairs of this process in a step, and the number of its micro-batches."""
        local = self.config.stage.global_batch_size // self.place.world_size
        return local, micro_batches(self.config, phase.resolution, self.place.world_size)

    def step(self, batch: Batch, phase: PhaseConfig, clock: StepClock) -> tuple[dict[str, Tensor], StepReport]:
        """One update over the local batch: this rank's mean loss of each flow, and the engine's report.

        Args:
            clock: receives the ends of the step's parts.
        """
        clock.mark(None)
        local, count = self._local(phase)
        micro = local // count
        sums: dict[str, Tensor] = {}
        for index in range(count):
            rows = slice(index * micro, (index + 1) * micro)
            losses = self._losses(self.engine, batch, rows, local, phase, clock)
            self.engine.backward(self.objective.total(losses) / count, last=index == count - 1)
            clock.mark(BACKWARD)
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + loss.detach() / count
        report = self.engine.step(self._learning_rate(self.state.step + 1))
        if self.ema is not None:
            self.ema.update(report.applied)
        clock.mark(OPTIMISER)
        self.state.step += 1
        self.state.phase_step += 1
        return sums, report

    def _losses(
        self, denoiser: Denoiser, batch: Batch, rows: slice, local: int, phase: PhaseConfig, clock: StepClock
    ) -> dict[str, Tensor]:
        first = self.place.rank * local
        rng = StepRandom(
            self._draw_seed,
            self.state.phase_step,
            self.config.stage.global_batch_size,
            slice(first + rows.start, first + rows.stop),
            self.place.device,
        )
        device = self.place.device
        samples = {name: _to(values[rows], device) for name, values in batch.samples.items()}
        moments = {name: _to(values[rows], device) for name, values in batch.moments.items()}
        encoded = self.objective.encode(samples, phase.resolution, rng, moments)
        clock.mark(ENCODE)
        losses = self.objective.losses(denoiser, encoded, rng)
        clock.mark(FORWARD)
        return losses

    @property
    def _draw_seed(self) -> str:
        return f"{self.config.seed}/{self.config.stage.name}/{self.state.phase}"

    def _learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 1: linear warm-up over samples, then constant."""
        optimizer, stage = self.config.optimizer, self.config.stage
        rise = warmup_samples(self.config)
        warm = min(1.0, step * stage.global_batch_size / rise) if rise > 0 else 1.0
        return stage.learning_rate * optimizer.learning_rate_scale * warm

    def _record(self, phase: PhaseConfig, meters: Meters) -> dict[str, Any]:
        batch_size = self.config.stage.global_batch_size
        learning_rate = self._learning_rate(self.state.step)
        return {
            "step": self.state.step,
            "phase": self.state.phase,
            "resolution": phase.resolution,
            "samples": self.state.step * batch_size,
            "total_samples": self.total_steps * batch_size,
            # The base rate of this step; a group's rate is this times its scale.
            "learning_rate": learning_rate,
            "learning_rates": self.engine.rates(learning_rate),
            "skipped": self.state.skipped,
            "replaced": self.state.replaced,
            "failed_saves": self.saver.failed,
            **meters.summary(),
        }

    def _begin_save(self) -> None:
        self.watchdog.heartbeat(f"step {self.state.step}, saving")
        self.saver.begin(self.engine, self.ema, {STATE: self.state.to_dict(), **self.record}, self.state.step)

    def _finish_saves(self) -> None:
        """Wait for the current save, before shapes change or the process ends."""
        self.watchdog.heartbeat(f"step {self.state.step}, waiting for the checkpoint to be written")
        self.saver.wait()
        self._report_saves()

    def _report_saves(self) -> None:
        for line in self.saver.failures():
            self.reporter.warn(f"{line}; training goes on, and the next save tries again")

    def _save_last(self) -> None:
        """Save the present step, or raise."""
        self._finish_saves()
        if self.saver.saved_step == self.state.step:
            return
        self._begin_save()
        self.saver.wait()
        failures = self.saver.failures()
        if failures:
            raise CheckpointError(f"{failures[0]}, then run the same command again")


def _to(values: Any, device: torch.device) -> Any:
    # Streams may deliver images with channels last.
    return each_tensor(lambda tensor: tensor.to(device, non_blocking=True).contiguous(), values)
