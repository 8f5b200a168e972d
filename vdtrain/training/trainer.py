"""The training loop of one stage: phases, steps, logging, checkpoints. It never names a modality.

One step encodes each sample once, sends it through every flow of the stage, sums the losses, accumulates the gradients
over micro-batches, and updates once.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vdtrain.checkpoint.folder import CheckpointError
from vdtrain.checkpoint.saver import BackgroundSaver
from vdtrain.config.schema import PhaseConfig, TrainConfig
from vdtrain.config.validation import learning_rate, micro_batches, phase_steps, stage_flows
from vdtrain.data.batch import Batch, BatchStream, Mirror
from vdtrain.data.loading import Prefetcher, open_stream
from vdtrain.data.manifest import ManifestError
from vdtrain.data.stream import StreamError
from vdtrain.diffusion.objective import Denoiser, Objective, QuarterLosses, StepRandom
from vdtrain.engine.engine import Engine, ShardEMA, StepReport
from vdtrain.errors import ConfigError, one_line
from vdtrain.flows import Flow
from vdtrain.models.diffuser import parameters_by_group
from vdtrain.models.execution import forget_passes
from vdtrain.models.frozen import each_tensor, pairs_of
from vdtrain.planning.counts import counts
from vdtrain.run import distributed
from vdtrain.run.signals import StopSignal
from vdtrain.run.watchdog import Watchdog
from vdtrain.tracking.reporting import Meters, Reporter
from vdtrain.tracking.speed import BACKWARD, ENCODE, FORWARD, OPTIMISER, OperatorCount, StepClock, matmul_rate
from vdtrain.training.agreement import BadSteps, DataError, StepSync, Tried, agreed
from vdtrain.training.continuation import STATE, TrainState, stage_steps
from vdtrain.training.watching import Watching

# A process whose next batch is not there looks so often for a signal, and gives up at this share of the limit.
LOOK_SECONDS, STILL_OF_WATCHDOG = 1.0, 0.75
# How long a stopped run waits for its reads to end.
CLOSE_SECONDS = 5.0


@dataclass(frozen=True)
class StepResult:
    """What this process computed in a step; tensors are on the device.

    Attributes:
        losses: mean over the local batch of each flow. If pairs lack modalities, they are this process's share of the
            mean over the global batch, times the processes, and a flow without any pair there is left out.
        quarters: see `QuarterLosses.sums`.
        worked: mark of the clock at the end of the last backward, before this process waits for the others.
    """

    losses: dict[str, Tensor]
    report: StepReport
    quarters: Tensor
    worked: Any


class Trainer:
    """Trains one stage on this process's device, from its start to its end. `build_trainer` makes one.

    Args:
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
        self.watching = Watching(config, place, engine, objective, ema, reporter, watchdog, state)
        self._remarks: set[str] = set()
        self._begun = False
        self._trouble: DataError | None = None
        # Batches whose reads have not ended.
        self._batches: Prefetcher | None = None
        self.flow_names = [flow.name for flow in stage_flows(config)]
        self.total_steps = sum(stage_steps(config.stage))

    def run(self, stop: StopSignal | None = None) -> bool:
        """Train to the end of the stage, or until a signal asks to stop; True if the stage is complete.

        Args:
            stop: signals received since the process started; by default, those from now on.

        Raises:
            CheckpointError: the last checkpoint could not be written; the previous one remains.
            DataError: on every process, if the data cannot be read on one of them; what was trained is saved.
        """
        given, stop = stop, stop or StopSignal()
        self._first_step = self.state.step
        self._peak = matmul_rate(self.place.device, self.engine.compute_dtype)
        self.watchdog.on_stall = self.reporter.stalled
        try:
            while self.state.phase < len(self.config.stage.phases):
                if not distributed.all_agree(stop.number == 0):
                    break
                if self._run_phase(self.config.stage.phases[self.state.phase], stop):
                    break
                self.state.phase, self.state.phase_step = self.state.phase + 1, 0
            self._end()
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
        """Train the phase from the present position to its end; True if a signal or the data stopped it."""
        config, batch_size = self.config, self.config.stage.global_batch_size
        steps = phase_steps(config, phase)
        if self.state.phase_step >= steps:
            return False
        if self.ema is not None and self.state.phase_step == 0:
            self.ema.restart()
        with self.watchdog.patient(f"step {self.state.step + 1}, opening the data"):
            stream = self._open_stream()
        if stream is None:
            return True
        mirror = Mirror(config.seed + self.state.phase) if config.data.flip else None
        batches = Prefetcher(stream, self.objective.prepare, mirror)
        sync = StepSync(self.flow_names, self.place.device, self.engine.groups)
        bad_steps = BadSteps(config.optimizer.max_bad_steps)
        meters, asked, worked = Meters(self.place.device, self._peak), False, None
        # Compiled code and CUDA graphs are made before the phase's first step, and hide operations from a count.
        eager = config.hardware.compile == "none" and not config.hardware.cuda_graphs
        prepared, first = eager, self.state.phase_step
        tried: dict[int, Tried] = {}

        def collect() -> bool:
            """Take in the outcome of the last submitted step; True if a process was asked to stop."""
            outcome = sync.collect()
            if outcome is None:
                return False
            of_this_process = tried.pop(outcome.step)
            if not outcome.applied and (line := of_this_process.poisoned()):
                print(f"warning: step {outcome.step} is skipped: {line}", file=sys.stderr, flush=True)
            bad_steps.add(outcome)
            meters.add(outcome)
            self.state.skipped += not outcome.applied
            self.state.replaced += outcome.replaced
            return outcome.stop

        try:
            while self.state.phase_step < steps and not asked:
                asked_at, begun = time.monotonic(), meters.clock.mark(None)
                with self.watchdog.patient(f"step {self.state.step + 1}, waiting for data"):
                    batch = self._next_batch(batches, stop)
                if batch is None:
                    asked = True
                    break
                meters.waited += time.monotonic() - asked_at
                if self.state.phase_step == first:
                    self.watchdog.heartbeat("starting the tracker")
                    opened = time.monotonic()
                    self.reporter.begin()
                    if not self._begun:
                        self.watching.begin()
                    self._begun = True
                    meters.began += time.monotonic() - opened
                    begun = meters.clock.mark(None)
                self.watchdog.place = f"step {self.state.step + 1}"
                if not prepared:
                    flops = self._prepare(batch, phase)
                    meters, prepared = Meters(self.place.device, self._peak, flops), True
                    begun = meters.clock.mark(None)
                # In the second step what happens once is over.
                count = OperatorCount() if eager and self.state.phase_step == first + 1 else None
                with count or contextlib.nullcontext():
                    done = self.step(batch, phase, meters.clock)
                tried[self.state.step] = Tried(batch.names, batch.positions, self._micro_losses)
                meters.flops = meters.flops if count is None else count.flops
                # The previous step's outcome arrives now. This step's exchange overlaps with the next step.
                asked = collect()
                # The device has reached the end of that step.
                seconds = 0.0 if worked is None else meters.clock.between(*worked)
                worked = begun, done.worked
                replaced = sum(batch.replaced.values())
                sync.submit(self.state.step, done.losses, done.report, stop.number, replaced, done.quarters, seconds)
                meters.pairs += batch_size
                meters.steps += 1
                last = self.state.phase_step == steps
                saves = last or self.state.step % config.checkpoint.every_steps == 0
                logs = self._logs(phase, self.state.step, self.state.phase_step)
                looks = self.watching.due(last)
                if saves or logs or looks:
                    asked = collect() or asked
                if logs:
                    self.reporter.log(self._record(phase, meters))
                    meters = Meters(self.place.device, self._peak, meters.flops)
                # Before the checkpoint, so that a run that goes on from it lacks no look; a stop has no time for one.
                if looks and not asked:
                    meters.began += self.watching.look(last)
                if saves:
                    self._begin_save()
                self._report_saves()
                self.reporter.advance(batch_size)
            asked = collect() or asked
            self._finish_saves()
            if asked and self.state.phase_step == steps and self.watching.due(last=True):
                self.watching.look(last=True)
        finally:
            # What was trained is saved first.
            self._batches = None if batches.close(CLOSE_SECONDS if asked else None) else batches
        return asked

    def _next_batch(self, batches: Prefetcher, stop: StopSignal) -> Batch | None:
        """The next batch, on every process or on none: then the run stops here, by a signal or for `_trouble`."""
        batch: Batch | None = None
        error: Exception | None = None
        while not batches.ready(LOOK_SECONDS):
            if stop.number:
                break
            # For a read that hangs, the watchdog would end the process without a save.
            late = self.watchdog.still > STILL_OF_WATCHDOG * (self.watchdog.seconds or math.inf)
            if late and (slowest := batches.slowest()):
                error = StreamError(f"{slowest}; check its disk or its server", passes=True)
                break
        else:
            try:
                batch = next(batches)
            # Any error: a process that left by itself would leave the others waiting.
            except Exception as found:
                error = found
        if distributed.all_agree(batch is not None):
            return batch
        self._trouble = agreed(error, self.config, self.watchdog)
        return None

    def _end(self) -> None:
        """Save what was trained since the start; raise what the data ended the run with."""
        trouble, step = self._trouble, self.state.step
        if trouble is None or step > self._first_step:
            try:
                self._save_last()
            except CheckpointError as error:
                raise CheckpointError(error if trouble is None else f"{trouble}; and {error}") from error
        stuck = self._batches is not None and not self._batches.close(CLOSE_SECONDS)
        if not distributed.all_agree(not stuck):
            trouble = trouble or DataError("a read of the data does not end", passes=True)
            trouble.stuck = True
        if trouble is not None:
            saved = f"; step {step} is saved, and the same command continues" if step > self._first_step else ""
            raise DataError(f"{trouble}{saved}", trouble.passes, trouble.stuck)

    def _open_stream(self) -> BatchStream | None:
        """Open the phase's stream at the present position, on every process or, for `_trouble`, on none."""
        config = self.config
        failure: Exception | None = None
        stream: BatchStream | None = None
        try:
            stream = open_stream(
                config,
                self.state.phase,
                rank=self.place.rank,
                world_size=self.place.world_size,
                step=self.state.phase_step,
            )
        except (ConfigError, ManifestError, StreamError, OSError) as error:
            failure = error
        if not distributed.all_agree(stream is not None):
            self._trouble = agreed(failure, config, self.watchdog)
            return None
        assert stream is not None
        identity = getattr(stream, "identity", "")
        if self.state.phase_step > 0 and identity != self.state.data:
            self.reporter.warn(
                "data.stream: its shards have changed since the checkpoint, so the order of the samples has too: "
                "in this epoch some samples repeat and others are missed"
            )
        for line in getattr(stream, "remarks", ()):
            if line not in self._remarks:
                self._remarks.add(line)
                self.reporter.warn(line)
        self.state.data = identity
        return stream

    def _prepare(self, batch: Batch, phase: PhaseConfig) -> int | None:
        """Run one micro-batch forward and backward without any effect, so that no step waits for the compiler.

        CUDA graphs are recorded in the same pass.

        Returns:
            A step's floating-point operations, by the stored counts or a dry run; None if that fails, and on ranks
            that log nothing.
        """
        hardware = self.config.hardware
        if batch.rows:
            compiled = hardware.compile != "none"
            remedies = ["hardware.compile=none"] * compiled + ["hardware.cuda_graphs=false"] * hardware.cuda_graphs
            what = f"compile={hardware.compile}: compiled code needs" if compiled else "cuda_graphs=true: graphs need"
            raise ConfigError(
                f"hardware.{what} batches of one shape, and this data.stream yields pairs that lack a modality; choose "
                f"{' and '.join(remedies)}"
            )
        began, clock = time.monotonic(), StepClock(self.place.device)
        forget_passes(self.engine.module)
        with self.watchdog.patient(f"compiling for {phase.resolution} pixels"):
            local, count = self._local(phase)
            losses = self._losses(self.engine.module, batch, slice(0, local // count), local, phase, clock)
            # The first ones of the layer groups: every block that training goes back through is compiled. Nothing
            # accumulates.
            trained = parameters_by_group(self.engine.module, trained=True)
            first = [next(iter(parameters.values())) for parameters in trained.values()]
            torch.autograd.grad(self.objective.total(losses), first)
            self.engine.prepare_step(self.ema)
            flops = None
            if self.place.rank == 0:
                try:
                    flops = count * counts(self.config).measure(phase.resolution, local // count).flops
                except Exception as error:  # layers of one's own may not run without values; training must go on
                    self.reporter.warn(f"no TFLOP/s are logged, because a dry run failed: {one_line(error)}")
            distributed.barrier()
        done = "compiled" if hardware.compile != "none" else "recorded"
        self.reporter.note(f"{done} for {phase.resolution} pixels in {time.monotonic() - began:.0f} s")
        return flops

    def _local(self, phase: PhaseConfig) -> tuple[int, int]:
        """Pairs of this process in a step, and the number of its micro-batches."""
        local = self.config.stage.global_batch_size // self.place.world_size
        return local, micro_batches(self.config, phase.resolution, self.place.world_size)

    def _logs(self, phase: PhaseConfig, step: int, phase_step: int) -> bool:
        """Whether a record follows a step."""
        return phase_step == phase_steps(self.config, phase) or step % self.config.log_every_steps == 0

    def step(self, batch: Batch, phase: PhaseConfig, clock: StepClock) -> StepResult:
        """One update over the local batch."""
        worked = clock.mark(None)
        local, count = self._local(phase)
        micro = local // count
        turnout = self._turnout(batch)
        sums: dict[str, Tensor] = {}
        self._micro_losses: list[dict[str, Tensor]] = []
        quarters = QuarterLosses(self.flow_names, self.objective.schedule.steps, self.place.device)
        for index in range(count):
            rows = slice(index * micro, (index + 1) * micro)
            losses = self._losses(self.engine, batch, rows, local, phase, clock, quarters)
            if turnout:
                shares = self._shares(batch.cut(rows.start, rows.stop), turnout, count)
                losses = {name: loss * shares[name] for name, loss in losses.items()}
            self.engine.backward(self.objective.total(losses) / count, last=index == count - 1)
            worked = clock.mark(BACKWARD)
            self._micro_losses.append({name: loss.detach() for name, loss in losses.items()})
            for name, loss in self._micro_losses[-1].items():
                sums[name] = sums.get(name, 0.0) + loss / count
        number = self.state.step + 1
        measure = self._logs(phase, number, self.state.phase_step + 1)
        report = self.engine.step(learning_rate(self.config, number), measure, self.ema)
        clock.mark(OPTIMISER)
        self.state.step += 1
        self.state.phase_step += 1
        if turnout:
            sums = {name: loss for name, loss in sums.items() if turnout[name]}
        return StepResult(sums, report, quarters.sums, worked)

    def _turnout(self, batch: Batch) -> dict[str, int]:
        """How many pairs of the global batch have a flow's modalities, by flow; empty if every pair has all.

        Every process must call it. A flow's loss is the mean over these pairs, on whatever processes they are.
        """
        if not batch.rows:
            return {}
        own = torch.tensor([self._pairs(batch, flow) for flow in stage_flows(self.config)])
        return dict(zip(self.flow_names, distributed.joined(own).tolist(), strict=True))

    def _shares(self, batch: Batch, turnout: Mapping[str, int], count: int) -> dict[str, float]:
        """What the mean over a micro-batch's pairs counts in the flow's mean, times processes and micro-batches."""
        parts = count * self.place.world_size
        return {
            flow.name: parts * self._pairs(batch, flow) / max(1, turnout[flow.name])
            for flow in stage_flows(self.config)
        }

    @staticmethod
    def _pairs(batch: Batch, flow: Flow) -> int:
        """Pairs that have a flow's modalities."""
        having = pairs_of(flow, batch.rows)
        return len(batch) if having is None else len(having)

    def _losses(
        self,
        denoiser: Denoiser,
        batch: Batch,
        rows: slice,
        local: int,
        phase: PhaseConfig,
        clock: StepClock,
        quarters: QuarterLosses | None = None,
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
        own = batch.cut(rows.start, rows.stop)
        samples = {name: _to(values, device) for name, values in own.samples.items()}
        moments = {name: _to(values, device) for name, values in own.moments.items()}
        encoded = self.objective.encode(samples, phase.resolution, rng, moments, own.rows)
        clock.mark(ENCODE)
        losses = self.objective.losses(denoiser, encoded, rng, quarters)
        clock.mark(FORWARD)
        return losses

    @property
    def _draw_seed(self) -> str:
        return f"{self.config.seed}/{self.config.stage.name}/{self.state.phase}"

    def _record(self, phase: PhaseConfig, meters: Meters) -> dict[str, Any]:
        batch_size = self.config.stage.global_batch_size
        rate = learning_rate(self.config, self.state.step)
        return {
            "step": self.state.step,
            "phase": self.state.phase,
            "resolution": phase.resolution,
            "samples": self.state.step * batch_size,
            "total_samples": self.total_steps * batch_size,
            # The base rate of this step; a group's rate is this times its scale.
            "learning_rate": rate,
            "learning_rates": self.engine.rates(rate),
            "skipped": self.state.skipped,
            "replaced": self.state.replaced,
            "failed_saves": self.saver.failed,
            "save_times": self.saver.times(),
            **meters.summary(),
        }

    def _begin_save(self) -> None:
        self.watchdog.heartbeat(f"step {self.state.step}, saving")
        self.saver.begin(self.engine, self.ema, {STATE: asdict(self.state), **self.record}, self.state.step)

    def _finish_saves(self) -> None:
        """Wait for the current save, before shapes change or the process ends."""
        place = f"step {self.state.step}, waiting for the checkpoint to be written"
        with self.watchdog.patient(place, reads=False):
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
        self.reporter.note(f"saving step {self.state.step}")
        self._begin_save()
        with self.watchdog.patient(f"step {self.state.step}, writing the last checkpoint", reads=False):
            self.saver.wait()
        failures = self.saver.failures()
        if failures:
            raise CheckpointError(f"{failures[0]}, then run the same command again")


def _to(values: Any, device: torch.device) -> Any:
    # Streams may deliver images with channels last.
    return each_tensor(lambda tensor: tensor.to(device, non_blocking=True).contiguous(), values)
