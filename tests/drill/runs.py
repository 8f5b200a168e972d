"""Runs of the three stages, what they end with, and the samples that they trained on."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.drill.starts import POLL_SECONDS, RANKS, Start
from tests.pairs import write_pairs
from tests.settings import TINY, phases
from vdtrain.checkpoint.folder import CHECKPOINTS
from vdtrain.checkpoint.format import Index
from vdtrain.files import INCOMPLETE, damage
from vdtrain.tracking.metrics import last_metrics, read_metrics

STAGES = ("stage1_single_flow", "stage2_dual_flow", "stage3_four_flow")
# Two phases, and epochs of five steps.
LOW, HIGH, BATCH, SAMPLES = 4, 3, 4, 20
STEPS = LOW + HIGH
WATCHDOG_SECONDS = 60
SETTINGS = [
    *TINY,
    f"stage.global_batch_size={BATCH}",
    "hardware.micro_batch_size={32:2,64:1}",
    phases(BATCH, (32, LOW), (64, HIGH)),
    "optimizer.warmup_samples=20",
    "log_every_steps=1",
    "checkpoint.every_steps=1",
    "checkpoint.keep=2",
    f"watchdog_seconds={WATCHDOG_SECONDS}",
    "data.stream._target_=tests.training.trouble.DrillStream",
]


class DrillError(RuntimeError):
    """The drill itself could not be held."""


class Stage:
    """A stage of one run, which is started again until it ends.

    Attributes:
        starts: those that were made.

    Args:
        folder: of the run.
        number: of the stage, from 0.
        before: folder of the run whose stage before this one starts from.
        settings: beside those of every run.
    """

    def __init__(
        self, place: Path, run: Path, number: int, before: Path | None = None, settings: Sequence[str] = ()
    ) -> None:
        self.name, self.run = STAGES[number], run
        self.folder = run / self.name
        self.starts: list[Start] = []
        before = run if before is None else before
        first = "null" if number == 0 else f"{before / STAGES[number - 1]}"
        own = [f"stage={self.name}", f"stage.init_from={first}", f"run_dir={self.folder}"]
        self.words = ["train", *SETTINGS, f"data.manifest={place}/data/manifest", *own, *settings]

    def start(self, **how: Any) -> Start:
        """Start it, or start it again: with the same words, but for the diary."""
        number = len(self.starts)
        diary = f"+data.stream.diary={self.run}/{self.name}-{number}"
        self.starts.append(Start([*self.words, diary], self.run / f"{self.name}-{number}.log", **how))
        return self.starts[-1]

    def step(self) -> int:
        """The last step in its metrics."""
        records = last_metrics(self.folder, 1)
        return int(records[-1]["step"]) if records else 0

    def first_step_after(self, moment: float) -> float | None:
        """When the first step after a moment was over, or now if the stage was complete."""
        times = [record["time"] for record in read_metrics(self.folder) if record["time"] > moment]
        return times[0] if times else time.time() if self.complete() else None

    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any((self.folder / CHECKPOINTS).glob(f"*{INCOMPLETE}"))

    def delivered(self) -> int:
        """Batches that the last start's loaders have delivered."""
        return sum(len(_lines(path)) for path in self._diaries(len(self.starts) - 1))

    def complete(self) -> bool:
        """Whether its end is saved."""
        try:
            return (self.folder / CHECKPOINTS / "latest").read_text() == f"step-{STEPS:09d}\n"
        except OSError:
            return False

    def _diaries(self, start: int) -> list[Path]:
        return [self.run / f"{self.name}-{start}-{rank}" for rank in range(RANKS)]

    def trained(self) -> Counter[tuple[int, int, str]]:
        """How often each sample was trained on: (phase, position, shard and row).

        A start's batches count from its first one to that with which the next start began.
        """
        by_start: list[dict[int, list[tuple[int, int, str]]]] = []
        for start in range(len(self.starts)):
            batches: dict[int, list[tuple[int, int, str]]] = {}
            for path in self._diaries(start):
                for line in _lines(path):
                    place, phase = line["positions"][0] // BATCH, line["seed"]
                    # The batch after the last one is made ready too.
                    if place < (LOW, HIGH)[phase]:
                        each = zip(line["positions"], line["rows"], strict=True)
                        batches.setdefault(place + LOW * phase, []).extend((phase, *one) for one in each)
            if batches:
                by_start.append(batches)
        ends = [min(batches) for batches in by_start[1:]] + [STEPS]
        return Counter(
            sample
            for batches, end in zip(by_start, ends, strict=True)
            for step, samples in batches.items()
            if step < end
            for sample in samples
        )

    def end(self) -> End:
        """What it ended with."""
        checkpoint = self.folder / CHECKPOINTS / f"step-{STEPS:09d}"
        index = Index.read(checkpoint)
        if (harm := damage(checkpoint, index.files)) is not None:
            raise DrillError(harm)
        records = read_metrics(self.folder)
        # The end of a phase and the beginning of the next one are the same place.
        state = {key: value for key, value in index.trainer["state"].items() if key not in ("phase", "phase_step")}
        return End(
            {name: record.sha256 for name, record in index.files.items()},
            (index.optimizer_steps, index.ema_updates, state),
            [(each["step"], each["resolution"], each["loss"], each["gradient_norm"]) for each in records],
            self.trained(),
        )


def _lines(path: Path) -> list[dict[str, Any]]:
    """Of a diary; a kill may have cut the last one short."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


@dataclass(frozen=True)
class End:
    """What a stage ended with: sums of its weights and moments, its state, its records, its samples."""

    files: Mapping[str, str]
    state: tuple[Any, ...]
    records: Sequence[tuple[Any, ...]]
    samples: Counter[tuple[int, int, str]]

    def same_bits(self, other: End) -> bool:
        """Whether weights, moments, averages, state and records are those of another."""
        return (self.files, self.state, self.records) == (other.files, other.state, other.records)

    def lost(self, other: End) -> int:
        """Samples that another trained on and this one did not."""
        return (other.samples - self.samples).total()

    def repeated(self, other: End) -> int:
        """Samples that this one trained on more often than another."""
        return (self.samples - other.samples).total()


@dataclass(frozen=True)
class Whole:
    """The run that was not disturbed.

    Attributes:
        place: of the data and of all runs.
        ends: of its stages.
        first_seconds: of a start until its first step.
        seconds: of a start.
    """

    place: Path
    ends: Sequence[End]
    first_seconds: float
    seconds: float

    @property
    def run(self) -> Path:
        """Its folder."""
        return self.place / "whole"


def whole(place: Path) -> Whole:
    """Make data, and train the three stages without any disturbance."""
    for name in ("data", "whole"):
        shutil.rmtree(place / name, ignore_errors=True)
    write_pairs(place / "data", count=SAMPLES // 2)
    ends, firsts, seconds = [], [], []
    for number in range(len(STAGES)):
        stage = Stage(place, place / "whole", number)
        start = stage.start()
        until(lambda stage=stage: stage.step() > 0, start)  # type: ignore[misc]
        firsts.append(time.monotonic() - start.began)
        start.wait()
        seconds.append(time.monotonic() - start.began)
        if start.statuses() != [0] * RANKS:
            raise DrillError(f"the run without disturbance: {start.statuses()}\n{start.text()}")
        ends.append(stage.end())
        wrong = [sample for sample, times in ends[-1].samples.items() if times != 1]
        if wrong or ends[-1].samples.total() != STEPS * BATCH:
            raise DrillError(f"the run without disturbance trained on {ends[-1].samples}")
    return Whole(place, ends, sum(firsts) / len(firsts), sum(seconds) / len(seconds))


def until(condition: Callable[[], bool], start: Start, seconds: float = 240.0) -> bool:
    """Wait for a condition while a start runs; whether it came about."""
    deadline = time.monotonic() + seconds
    while not condition():
        if not start.running() or time.monotonic() > deadline:
            return condition()
        time.sleep(POLL_SECONDS)
    return True
