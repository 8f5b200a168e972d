"""Two runs of the tiny preset as a Slurm job leaves them, for tests of what looks at runs from outside.

Stage 1 is complete; stage 2 was stopped by a signal, started again by the same job, and killed before its first step.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.pairs import write_pairs
from tests.programs import Ending
from tests.settings import TINY, phases
from tests.training.forks import Case, run_cases
from vdtrain.data.batch import Batch
from vdtrain.data.stream import PairStream

ROOT = Path(__file__).parents[1]
STAGES = ("stage1_single_flow", "stage2_dual_flow", "stage3_four_flow")
LOW, HIGH, BATCH = 3, 2, 4
STEPS = LOW + HIGH
JOB = "4711"


class EndingStream(PairStream):
    """Sends its own process a signal before it delivers a batch.

    Args:
        name: of the signal.
        at: number of the batch, from 0.
    """

    def __init__(self, manifest: Path, *, name: str, at: int, **arguments: Any) -> None:
        super().__init__(manifest, **arguments)
        self.name, self.at = name, at

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(super().__iter__()):
            if number == self.at:
                os.kill(os.getpid(), getattr(signal, self.name))
            yield batch


@dataclass(frozen=True)
class TinyRuns:
    """`folder`/data and `folder`/runs, and how each start ended: stage 1, then stage 2 twice."""

    folder: Path
    endings: list[Ending]

    @property
    def overrides(self) -> list[str]:
        """Of every start, but for the stage."""
        return overrides(self.folder)

    def run(self, number: int) -> Path:
        """Folder of stage `number`'s run, from 1."""
        return self.folder / "runs" / STAGES[number - 1]


def overrides(folder: Path) -> list[str]:
    return [
        *TINY,
        f"stage.global_batch_size={BATCH}",
        "hardware.micro_batch_size={32:4,64:2}",
        phases(BATCH, (32, LOW), (64, HIGH)),
        "optimizer.warmup_samples=0",
        "log_every_steps=1",
        "checkpoint.every_steps=2",
        "checkpoint.keep=2",
        "watchdog_seconds=120",
        f"data.manifest={folder}/data/manifest",
        f"runs_dir={folder}/runs",
    ]


def make_tiny_runs(folder: Path) -> TinyRuns:
    write_pairs(folder / "data")
    first, second = ([f"stage={stage}", *overrides(folder)] for stage in STAGES[:2])
    stops = [*second, "data.stream._target_=tests.tiny_runs.EndingStream"]
    cases = [
        Case(1, [*first, "tracking=offline"]),
        Case(1, [*stops, "+data.stream.name=SIGUSR1", "+data.stream.at=2"]),
        Case(1, [*stops, "+data.stream.name=SIGKILL", "+data.stream.at=0"]),
    ]
    job = {"PYTHONPATH": str(ROOT), "SLURM_JOB_ID": JOB, "SLURM_JOB_PARTITION": "gpu", "SLURM_SUBMIT_DIR": str(ROOT)}
    with patch.dict(os.environ, job):
        return TinyRuns(folder, run_cases(folder / "cases", cases))
