"""Looks at a run while it trains: samples of its flows and losses on held-out pairs.

Looks come at fixed numbers of training samples, and take a bounded share of the run's time. A look changes nothing that
training computes. The averaged weights change places with the master weights and back, random states and modes of
layers are restored, and compiled code is passed by.

RUN_DIR/watched.json     what the looks have cost so far, so that a run that continues keeps its budget
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vdtrain.config.schema import TrainConfig
from vdtrain.config.validation import stage_flows
from vdtrain.data.loading import data_problem
from vdtrain.data.manifest import ManifestError
from vdtrain.data.stream import StreamError
from vdtrain.diffusion.objective import Objective
from vdtrain.engine.engine import Engine, ShardEMA
from vdtrain.errors import ConfigError, described, one_line
from vdtrain.files import SHAPE_ERRORS, atomic_write, read_record
from vdtrain.pipeline import VersatileDiffusion
from vdtrain.run import distributed
from vdtrain.run.distributed import RankInfo
from vdtrain.run.watchdog import Watchdog
from vdtrain.tracking.metrics import read_lines
from vdtrain.tracking.reporting import Reporter
from vdtrain.training import samples, validation
from vdtrain.training.continuation import TrainState, stage_steps
from vdtrain.training.scoring import Scoring

FILE = "watched.json"


@dataclass
class Moments:
    """The moments of one kind of look, on rank 0.

    Attributes:
        every: training samples between two of them, as set.
        time_share: of the run's time so far that they may take; None for any.
        interval: training samples between two of them now: `every` times a power of two.
        spent, cost: seconds of all of them, and of the last one.
    """

    every: int
    time_share: float | None
    interval: int
    spent: float = 0.0
    cost: float = 0.0

    def reached(self, before: int, samples: int) -> bool:
        """Whether there is a moment above `before` training samples and up to `samples`."""
        return samples // self.interval > before // self.interval

    def allows(self, ran: float) -> bool:
        """Whether another look is within the budget of a run that has taken `ran` seconds."""
        return self.time_share is None or self.spent + self.cost <= self.time_share * ran

    def grow(self, ran: float, samples: int) -> bool:
        """Choose an interval at which a look stays within the budget; whether it is a longer one.

        Args:
            ran: seconds in which `samples` were trained.
        """
        before = self.interval
        assert self.time_share is not None
        while self.cost > self.time_share * ran * self.interval / max(1, samples):
            self.interval *= 2
        return self.interval > before

    def add(self, seconds: float) -> None:
        """Count a look."""
        self.spent, self.cost = self.spent + seconds, seconds


class Clock:
    """The run's time over all its starts, and what looks have cost; kept in the run folder by rank 0."""

    def __init__(self, run_dir: Path) -> None:
        self._path, self._began, self._before = run_dir / FILE, time.monotonic(), 0.0
        self._kept: dict[str, Any] = {}
        with suppress(OSError, *SHAPE_ERRORS):
            found = json.loads(read_record(self._path))
            self._before, self._kept = float(found["ran"]), dict(found["looks"])

    @property
    def ran(self) -> float:
        """Seconds of this run so far."""
        return self._before + time.monotonic() - self._began

    def restore(self, name: str, moments: Moments) -> None:
        """Take over what the run's earlier starts have spent; the interval only if `every` and the share are the same.

        A look at other pairs, at another resolution, may cost something else; the next one tells.
        """
        with suppress(*SHAPE_ERRORS):
            kept = Moments(**self._kept[name])
            moments.spent, moments.cost = float(kept.spent), float(kept.cost)
            if (kept.every, kept.time_share) == (moments.every, moments.time_share) and kept.interval >= kept.every:
                moments.interval = int(kept.interval)

    def keep(self, looks: dict[str, Moments]) -> None:
        """Write the present state.

        Raises:
            OSError: it cannot be written.
        """
        kept = {"ran": self.ran, "looks": {name: asdict(each) for name, each in looks.items()}}
        with atomic_write(self._path) as draft:
            draft.write_text(json.dumps(kept))


SAMPLES, VALIDATION = KINDS = ("samples", "validation")


class Watching:
    """The looks of one run. Every process calls each method together, after the same step.

    Args:
        ema: None shows the weights as trained.
    """

    def __init__(
        self,
        config: TrainConfig,
        place: RankInfo,
        engine: Engine,
        objective: Objective,
        ema: ShardEMA | None,
        reporter: Reporter,
        watchdog: Watchdog,
        state: TrainState,
    ) -> None:
        self.config, self.place, self.engine, self.objective = config, place, engine, objective
        self.ema, self.reporter, self.watchdog, self.state = ema, reporter, watchdog, state
        self.run_dir = Path(config.run_dir)
        self.looks: dict[str, Moments] = {}
        for name, settings in ((SAMPLES, config.samples), (VALIDATION, config.validation)):
            if settings.every and self._possible(name):
                self.looks[name] = Moments(settings.every, settings.time_share, settings.every)
        self._clock: Clock | None = None
        self._inputs: tuple[int, samples.Inputs] | None = None
        self._pairs: validation.Validation | None = None
        self._scoring: Scoring | None = None

    def begin(self) -> None:
        """Look before the first step of a start, unless that was done.

        Grids of steps that the run has lost are removed.
        """
        if not self.looks:
            return
        chosen: list[str] = []
        if self.place.rank == 0:
            self._clock = Clock(self.run_dir)
            for name, moments in self.looks.items():
                self._clock.restore(name, moments)
            self.reporter.note(self._said())
            try:
                samples.drop_later(self.run_dir, self._samples())
                chosen = [name for name in self.looks if self._missing(name)]
            # Damage to the records must not end a run; the next looks come at their moments.
            except OSError as error:
                self.reporter.warn(described(error))
        self._look(distributed.broadcast_json(chosen))

    def due(self, last: bool) -> bool:
        """Whether a look may come after this step."""
        return bool(self.looks) and (last or bool(self._reached()))

    def look(self, last: bool) -> float:
        """Look after a step, if the budget allows it, or `last`; the seconds that it took."""
        began = time.monotonic()
        chosen = [name for name in self.looks if last or self._allows(name)] if self.place.rank == 0 else []
        self._look(distributed.broadcast_json(chosen))
        return time.monotonic() - began

    def _possible(self, name: str) -> bool:
        if name == VALIDATION:
            return bool(self.config.data.validation.share)
        return any({flow.context, flow.output} <= {*samples.SHOWN} for flow in stage_flows(self.config))

    def _samples(self) -> int:
        return self.state.step * self.config.stage.global_batch_size

    def _reached(self) -> list[str]:
        now = self._samples()
        before = max(0, now - self.config.stage.global_batch_size)
        # The interval grows on rank 0 alone; `every` is the same on all.
        return [name for name, moments in self.looks.items() if now // moments.every > before // moments.every]

    def _missing(self, name: str) -> bool:
        """Whether a look belongs before the first step of this start, and was not made at this step."""
        if name == SAMPLES:
            made = list(samples.made(self.run_dir))
        else:
            made = [line["samples"] for line in read_lines(self.run_dir) if VALIDATION in line]
        if not made:
            return True
        return name in self._reached() and self._samples() not in made and self._allows(name)

    def _allows(self, name: str) -> bool:
        """Whether the budget allows a look now; else a line says so, and the interval may grow."""
        moments, now, clock = self.looks[name], self._samples(), self._clock
        assert clock is not None
        if name not in self._reached():
            return False
        if not moments.reached(now - self.config.stage.global_batch_size, now):
            return False
        if moments.allows(clock.ran):
            return True
        longer = moments.grow(clock.ran, now)
        then = f"the next come every {moments.interval:,}" if longer else "they wait for the next one"
        self.reporter.note(
            f"{name}: none after {now:,} training samples, because the last took {moments.cost:.1f} s and they keep to "
            f"{name}.time_share={moments.time_share:g} of the run's time; {then}"
        )
        return False

    def _said(self) -> str:
        """The line about all looks at a start."""
        texts = []
        for name in KINDS:
            if name in self.looks:
                moments = self.looks[name]
                limit = "" if moments.time_share is None else f", at most {moments.time_share:.2%} of the time"
                texts.append(f"{name} every {moments.interval:,} training samples{limit}")
            elif name == VALIDATION and self.config.validation.every:
                texts.append("no validation, because data.validation.share holds no pairs out")
            elif name == SAMPLES and self.config.samples.every:
                texts.append("no samples, because no flow has only images and captions")
        return "; ".join(texts)

    def _look(self, chosen: list[str]) -> None:
        """Make the chosen looks."""
        if not chosen:
            return
        spent = dict.fromkeys(chosen, 0.0)
        phase = self.config.stage.phases[min(self.state.phase, len(self.config.stage.phases) - 1)]
        place = f"step {self.state.step}, {' and '.join(chosen)}"
        losses: dict[str, Any] = {}
        with self.watchdog.patient(place), undisturbed(self.engine.module, self.place.device, self.config):
            chosen = [name for name in chosen if self._prepared(name, phase.resolution, spent)]
            if VALIDATION in chosen:
                losses["model"] = self._validate(spent)
            with self.ema.shown(self.engine) if self.ema is not None and chosen else contextlib.nullcontext():
                if VALIDATION in chosen and self.ema is not None:
                    losses["ema"] = self._validate(spent)
                scores = self._score(phase.resolution, spent) if VALIDATION in chosen else {}
                if SAMPLES in chosen:
                    self._draw(phase, spent)
        if all(losses.values()) and losses:
            self._report(losses, scores, phase.resolution, spent[VALIDATION])
        if self.place.device.type == "cuda":
            # What the looks took from the allocator must not crowd the next step's blocks.
            torch.cuda.empty_cache()
        self._keep(spent)

    def _prepared(self, name: str, resolution: int, spent: dict[str, float]) -> bool:
        """Whether what a look needs could be read on every process; else a warning says why."""
        began, failure = time.monotonic(), None
        try:
            if name == SAMPLES and (self._inputs is None or self._inputs[0] != resolution):
                self._inputs = resolution, samples.Inputs.of(self.config, resolution)
            if name == VALIDATION and (self._pairs is None or self._pairs.resolution != resolution):
                pairs = validation.Validation(self.config, self.objective, resolution, self.place.device)
                if self.config.validation.scored:
                    self._scoring = Scoring(self.config, resolution, self.place.device, self.place.rank == 0)
                # Last, so that a process whose networks cannot be read tries again: the others wait for its samples.
                self._pairs = pairs
            if name == VALIDATION and self._pairs is not None:
                self._pairs.encode()
        # None of this waits for other processes, and a look must not end a run.
        except (ConfigError, ManifestError, StreamError, OSError, RuntimeError) as error:
            failure = data_problem(error, self.config.data.manifest)
        failed = distributed.first_failure(failure)
        spent[name] += time.monotonic() - began
        if failed is not None:
            self.reporter.warn(f"{name}: none after {self._samples():,} training samples ({failed})")
        return failed is None

    def _validate(self, spent: dict[str, float]) -> dict[str, Any]:
        """The losses with the module's present weights; none if they could not be computed on a process."""
        began, failure = time.monotonic(), None
        found: dict[int, dict[str, list[float]]] = {}
        assert self._pairs is not None
        diffuser: Any = self.engine.module
        try:
            found = self._pairs.losses(diffuser, self._beat)
        # It must not end a run: what does not fit into the memory that is left is a warning.
        except RuntimeError as error:
            failure = one_line(error)[:200]
        failed = distributed.first_failure(failure)
        if failed is not None:
            self.reporter.warn(f"validation: none after {self._samples():,} training samples ({failed})")
        means = {} if failed is not None else validation.gathered(found)
        spent[VALIDATION] += time.monotonic() - began
        return means

    def _score(self, resolution: int, spent: dict[str, float]) -> dict[str, dict[str, float]]:
        """The scores of samples of a few pairs, on rank 0."""
        if self._scoring is None:
            return {}
        began, scores = time.monotonic(), {}
        drawn, failure = samples.draw(self.config, self._model(), self._scoring.inputs, resolution, self._beat)
        if self.place.rank == 0 and failure is None:
            self._beat("scoring")
            try:
                scores = self._scoring.figures(drawn)
            except (ConfigError, RuntimeError) as error:
                failure = one_line(error)
        if failure is not None:
            self.reporter.warn(f"validation: no scores after {self._samples():,} training samples ({failure})")
        spent[VALIDATION] += time.monotonic() - began
        return scores

    def _model(self) -> VersatileDiffusion:
        diffuser: Any = self.engine.module
        return VersatileDiffusion.around(self.config.model, diffuser, self.objective.frozen, self.objective.schedule)

    def _draw(self, phase: Any, spent: dict[str, float]) -> None:
        began, now = time.monotonic(), self._samples()
        assert self._inputs is not None
        drawn, failure = samples.draw(self.config, self._model(), self._inputs[1], phase.resolution, self._beat)
        if self.place.rank == 0 and failure is None:
            about = {"step": self.state.step, "phase": self.state.phase, "seconds": time.monotonic() - began}
            try:
                files = samples.write(self.config, self.run_dir, drawn, now, phase, about)
            except OSError as error:
                failure = described(error)
            else:
                for flow, file in files.items():
                    self.reporter.log_image(f"{samples.FOLDER}/{flow}", file, now)
                self.reporter.note(f"samples of {len(files)} flows in {samples.folder_of(self.run_dir, now)}")
        if failure is not None:
            self.reporter.warn(f"samples: none after {now:,} training samples ({failure})")
        spent[SAMPLES] += time.monotonic() - began

    def _report(
        self, losses: dict[str, Any], scores: dict[str, dict[str, float]], resolution: int, seconds: float
    ) -> None:
        shown = losses.get("ema", losses["model"])
        texts = " | ".join(f"{flow} {each['loss']:.4f}" for flow, each in shown.items())
        record = {
            "step": self.state.step,
            "phase": self.state.phase,
            "resolution": resolution,
            "samples": self._samples(),
            "total_samples": sum(stage_steps(self.config.stage)) * self.config.stage.global_batch_size,
            **validation.figures(losses),
            **({"validation_scores": scores} if scores else {}),
            "validation_seconds": round(seconds, 3),
        }
        weights = "averaged" if "ema" in losses else "trained"
        line = f"validation with {weights} weights, {self._samples():,} training samples | {texts}"
        self.reporter.add(record, line)

    def _beat(self, doing: str) -> None:
        self.watchdog.heartbeat(f"step {self.state.step}, {doing}")

    def _keep(self, spent: dict[str, float]) -> None:
        if self._clock is None:
            return
        for name, seconds in spent.items():
            self.looks[name].add(seconds)
        try:
            self._clock.keep(self.looks)
        except OSError as error:
            self.reporter.warn(described(error))


@contextlib.contextmanager
def undisturbed(diffuser: nn.Module, device: torch.device, config: TrainConfig) -> Iterator[None]:
    """While the block runs, layers only evaluate, and nothing is compiled. Random states and modes come back."""
    training = [module for module in diffuser.modules() if module.training]
    # Samples have shapes of their own, each of which would take minutes to compile.
    eager: Any = contextlib.nullcontext()
    if config.hardware.compile != "none":
        eager = torch.compiler.set_stance("force_eager")
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad(), eager:
        diffuser.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True
