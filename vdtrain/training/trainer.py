"""The training loop of one stage: phases, steps, logging, checkpoints. It never names a modality.

One step encodes each sample once, sends it through every flow of the stage, sums the losses, accumulates the gradients
over micro-batches, and updates once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from vdtrain.compose import ConfigError
from vdtrain.config import PhaseConfig, TrainConfig
from vdtrain.data.stream import Batch, BatchStream
from vdtrain.diffusion.draws import StepDraws
from vdtrain.diffusion.objective import Objective
from vdtrain.diffusion.schedule import Schedule
from vdtrain.flows import active_groups
from vdtrain.instantiate import instantiate
from vdtrain.models.attention import use_kernel
from vdtrain.models.diffuser import Diffuser, layer_group, parameters_by_group
from vdtrain.models.versatile_diffusion import build_frozen
from vdtrain.training import distributed
from vdtrain.training.checkpoints import CheckpointStore, weight_names
from vdtrain.training.curriculum import CHECKPOINTS, Start, initial_weights, run_document
from vdtrain.training.ema import ShardEMA
from vdtrain.training.engine import Engine, EngineSettings
from vdtrain.training.meters import Interval, StepConsensus
from vdtrain.training.preemption import StopSignal
from vdtrain.training.reporter import Reporter
from vdtrain.training.state import TrainState
from vdtrain.validation import gradient_scales, micro_batches, phase_steps, stage_flows
from vdtrain.weights.tensor_files import LazyTensors


class Trainer:
    """One stage on this process's device, from wherever it starts to its end.

    Args:
        config: checked by `vdtrain.validation.check`.
        document: the same configuration, unresolved, for the checkpoints.
        start: from `find_start`.
        place: from `distributed.start`.
    """

    def __init__(self, config: TrainConfig, document: DictConfig, start: Start, place: distributed.Place) -> None:
        self.config, self.place = config, place
        self.document = run_document(document)
        flows = stage_flows(config)
        self.flow_names = [flow.name for flow in flows]
        weights = initial_weights(start, config.model)
        # Layers that an earlier stage trained and this one does not are carried along to the stages after it.
        names = weight_names(start.resume) if start.resume is not None else weights
        carried = {layer_group(name) for name in names}
        diffuser = Diffuser(config.model, {*active_groups(flows), *carried}, seed=config.seed)
        load_weights(diffuser, weights)
        use_kernel(diffuser, config.hardware.attention)
        diffuser.to(place.device)
        trained = parameters_by_group(diffuser)
        self.engine = Engine(
            diffuser,
            {group: trained[group] for group in active_groups(flows)},
            engine_settings(config),
        )
        frozen = build_frozen(config.model).to(place.device, self.engine.compute_dtype)
        self.objective = Objective(flows, Schedule(config.model.schedule, place.device), frozen, config.objective)
        self.ema = ShardEMA(self.engine, config.ema.decay) if config.ema.enabled else None
        self.store = CheckpointStore(Path(config.run_dir) / CHECKPOINTS, keep=config.checkpoint.keep)
        self.state = TrainState()
        if start.resume is not None:
            self.state = TrainState.from_dict(self.store.load(start.resume, self.engine, self.ema)["state"])
        self.total_steps = sum(phase_steps(config, phase) for phase in config.stage.phases)
        self.saved_step = self.state.step if start.resume is not None else -1
        self.reporter = Reporter(config, OmegaConf.to_container(document, resolve=True), self.state.step, place.rank)

    def run(self) -> bool:
        """Train to the end of the stage, or until a signal asks to stop; True if the stage is complete."""
        stop = StopSignal()
        try:
            while self.state.phase < len(self.config.stage.phases):
                phase = self.config.stage.phases[self.state.phase]
                if self._run_phase(phase, stop):
                    break
                self.state.phase, self.state.phase_step = self.state.phase + 1, 0
            self._save()
            return self.state.step == self.total_steps
        finally:
            stop.restore()
            self.reporter.close()
            self.engine.close()

    def _run_phase(self, phase: PhaseConfig, stop: StopSignal) -> bool:
        """Train the phase from the present position to its end; True if asked to stop before."""
        config, batch_size = self.config, self.config.stage.global_batch_size
        steps = phase_steps(config, phase)
        if self.state.phase_step >= steps:
            return False
        stream: BatchStream = instantiate(
            config.data.stream,
            "data.stream",
            manifest=Path(config.data.manifest),
            seed=self._phase_seed,
            resolution=phase.resolution,
            global_batch_size=batch_size,
            rank=self.place.rank,
            world_size=self.place.world_size,
            start=self.state.phase_step * batch_size,
            workers=config.hardware.loader_workers,
        )
        consensus = StepConsensus(self.flow_names, self.place.device)
        interval, asked = Interval(), False
        batches = iter(stream)
        try:
            while self.state.phase_step < steps and not asked:
                asked_at = time.monotonic()
                batch = next(batches)
                interval.waited += time.monotonic() - asked_at
                losses = self._step(batch, phase, interval)
                # The previous step's losses arrive now; this step's travel while the next one computes.
                asked = _collect(consensus, interval)
                consensus.submit(losses, stop.number)
                interval.pairs += batch_size
                last = self.state.phase_step == steps
                if last or self.state.step % config.log_every_steps == 0:
                    asked = _collect(consensus, interval) or asked
                    self.reporter.log(self._record(phase, interval))
                    interval = Interval()
                if self.state.step % config.checkpoint.every_steps == 0 or last:
                    self._save()
                self.reporter.advance(batch_size)
            asked = _collect(consensus, interval) or asked
        finally:
            stream.close()
        return asked

    def _step(self, batch: Batch, phase: PhaseConfig, interval: Interval) -> dict[str, Tensor]:
        """One update over the local batch; returns this rank's mean loss of each flow."""
        count = micro_batches(self.config, phase.resolution, self.place.world_size)
        local = self.config.stage.global_batch_size // self.place.world_size
        micro = local // count
        sums: dict[str, Tensor] = {}
        for index in range(count):
            rows = slice(index * micro, (index + 1) * micro)
            losses = self._losses(batch, rows, local, phase)
            self.engine.backward(self.objective.total(losses) / count, last=index == count - 1)
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + loss.detach() / count
        report = self.engine.step(self._learning_rate())
        interval.gradient_norms.append(report.gradient_norm)
        if report.applied and self.ema is not None:
            self.ema.update()
        self.state.skipped += not report.applied
        self.state.step += 1
        self.state.phase_step += 1
        return sums

    def _losses(self, batch: Batch, rows: slice, local: int, phase: PhaseConfig) -> dict[str, Tensor]:
        first = self.place.rank * local
        draws = StepDraws(
            self._draw_seed,
            self.state.phase_step,
            self.config.stage.global_batch_size,
            slice(first + rows.start, first + rows.stop),
            self.place.device,
        )
        samples = {name: _to(values[rows], self.place.device) for name, values in batch.samples.items()}
        encoded = self.objective.encode(samples, phase.resolution, draws)
        return self.objective.losses(self.engine, encoded, draws)

    @property
    def _phase_seed(self) -> int:
        """Seed of the data order: another one in each phase, the same in every stage."""
        return self.config.seed + self.state.phase

    @property
    def _draw_seed(self) -> str:
        return f"{self.config.seed}/{self.config.stage.name}/{self.state.phase}"

    def _learning_rate(self) -> float:
        """Linear warm-up over samples, then constant."""
        optimizer, stage = self.config.optimizer, self.config.stage
        seen = (self.state.step + 1) * stage.global_batch_size
        warm = min(1.0, seen / optimizer.warmup_samples) if optimizer.warmup_samples > 0 else 1.0
        return stage.learning_rate * optimizer.learning_rate_scale * warm

    def _record(self, phase: PhaseConfig, interval: Interval) -> dict[str, Any]:
        batch_size = self.config.stage.global_batch_size
        return {
            "step": self.state.step,
            "phase": self.state.phase,
            "resolution": phase.resolution,
            "samples": self.state.step * batch_size,
            "total_samples": self.total_steps * batch_size,
            "learning_rate": self._learning_rate(),
            "skipped": self.state.skipped,
            **interval.summary(self.place.device),
        }

    def _save(self) -> None:
        """Write a checkpoint of the present step, unless there is one already."""
        if self.state.step == self.saved_step:
            return
        content = {"state": self.state.to_dict(), "config": self.document}
        self.store.save(self.engine, self.ema, content, self.state.step)
        self.saved_step = self.state.step


def load_weights(diffuser: Diffuser, weights: Mapping[str, Tensor]) -> None:
    """Copy weights by name. Every layer group comes whole or not at all; one that does not keeps its random start.

    Raises:
        ConfigError: a name or a shape that the model does not have, or a group of which a part is missing.
    """
    own = diffuser.state_dict()
    given = {layer_group(name) for name in weights}
    expected = {name for name in own if layer_group(name) in given}
    for problem, names in (("unknown", weights.keys() - own.keys()), ("missing", expected - weights.keys())):
        if names:
            raise ConfigError(
                f"stage.init_from: {len(names)} {problem} weights, e.g. {min(names)}; is it the same model?"
            )
    for name, tensor in LazyTensors.of(weights).outline().items():
        if own[name].shape != tensor.shape:
            raise ConfigError(
                f"stage.init_from: {name} is {list(tensor.shape)}, here {list(own[name].shape)}; is it the same model?"
            )
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)


def engine_settings(config: TrainConfig) -> EngineSettings:
    """The engine's share of a training configuration."""
    optimizer, hardware = config.optimizer, config.hardware
    first, second = optimizer.betas
    return EngineSettings(
        zero_stage=hardware.zero_stage,
        precision=hardware.precision,
        gradient_clip=optimizer.gradient_clip,
        betas=(first, second),
        epsilon=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
        gradient_scales=gradient_scales(config),
        gradient_scale_mode=config.stage.gradient_scale_mode,
    )


def _collect(consensus: StepConsensus, interval: Interval) -> bool:
    """Add a finished step's losses to the interval; True if a rank was asked to stop."""
    collected = consensus.collect()
    if collected is None:
        return False
    losses, stop = collected
    interval.add_losses(losses)
    return stop


def _to(values: Any, device: torch.device) -> Any:
    return values.to(device, non_blocking=True) if isinstance(values, Tensor) else values
