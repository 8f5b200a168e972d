"""The runs of a curriculum in their order, and what their folders hold for a report. Needs no PyTorch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from vdtrain.checkpoint.folder import CHECKPOINTS
from vdtrain.config.instantiate import differences
from vdtrain.errors import ConfigError
from vdtrain.tracking.metrics import read_lines
from vdtrain.tracking.summary import RunSummary, find_runs, is_run, read_config, summarise

SAMPLES = "samples"
EVALUATION_FILE = "metrics.json"


@dataclass(frozen=True)
class Run:
    """One stage's run.

    Attributes:
        before: samples of the runs before it.
        records: of metrics.jsonl.
        validations: its lines without losses of training, such as those of validations.
        config: of its last start, without credentials; empty if it cannot be read.
    """

    folder: Path
    before: int
    records: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    summary: RunSummary
    config: dict[str, Any]

    @property
    def name(self) -> str:
        stage = self.config.get("stage")
        return str(stage["name"]) if isinstance(stage, dict) and "name" in stage else self.summary.stage

    @cached_property
    def samples(self) -> int:
        """Samples that it has trained."""
        logged: int = self.records[-1].get("samples", 0) if self.records else 0
        return max(self.summary.samples, logged)

    @property
    def seconds(self) -> float:
        """Time of training, by the speed of the records."""
        seconds, last = 0.0, 0
        for record in self.records:
            rate, samples = record.get("pairs_per_second", 0), record.get("samples", last)
            seconds += max(0, samples - last) / rate if rate > 0 else 0.0
            last = samples
        return seconds


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of a curriculum, each after those before it.

    Args:
        folders: a run of its last stage; or all its runs in their order; or the folder of all its runs.

    Raises:
        ConfigError: no run, or runs of several curricula.
        OSError: a file cannot be read.
    """
    runs: list[Run] = []
    for folder in _ordered(folders):
        before = runs[-1].before + runs[-1].samples if runs else 0
        runs.append(Run(folder, before, *_records(folder), summarise(folder), read_config(folder)))
    return runs


def stage_changes(runs: Sequence[Run]) -> Iterator[tuple[Run, dict[str, list[Any]]]]:
    """Runs after the first, each with the settings in which it differs from the run before it."""
    for earlier, later in pairwise(runs):
        yield later, differences(earlier.config, later.config)


def _records(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The records of metrics.jsonl, and its other lines with samples and numbers, each by step."""
    try:
        lines = read_lines(folder)
    except ValueError:
        return [], []
    records = [line for line in lines if "loss" in line]
    return records, [line for line in lines if "samples" in line and not {"loss", "image"} & line.keys()]


def _ordered(folders: Sequence[Path]) -> list[Path]:
    for folder in folders:
        if not folder.exists():
            raise ConfigError(f"run_dirs={folder}: does not exist; give the folder of a run, or of a curriculum's runs")
        if not find_runs(folder):
            raise ConfigError(f"run_dirs={folder}: holds no run and no folders of runs; give another folder")
    if len(folders) > 1:
        for folder in folders:
            if not is_run(folder):
                raise ConfigError(f"run_dirs={folder}: no run; give run folders in their order, or one folder of them")
        return list(folders)
    (folder,) = folders
    found = find_runs(folder)
    starts = {run: start for run in found if (start := _origin(run)) is not None}
    ends = [run for run in found if not any(run.samefile(start) for start in starts.values())]
    if len(ends) != 1:
        named = " ".join(map(str, ends or found))
        raise ConfigError(
            f"run_dirs={folder}: its runs belong to {len(ends) or 'no'} curricula, of which these are the last; give "
            f"one of them, or all runs of one in their order: {named}"
        )
    chain = [ends[0]]
    while (start := _origin(chain[0])) is not None and not any(start.samefile(run) for run in chain):
        chain.insert(0, start)
    return chain


def _origin(run: Path) -> Path | None:
    """The run whose weights a run started from; None if they are no run's, or the run is not there any more."""
    stage = read_config(run).get("stage")
    start = stage.get("init_from") if isinstance(stage, dict) else None
    if not isinstance(start, str):
        return None
    # A checkpoint is two folders below its run. The runs may have moved together.
    place = Path(start).parents[1] if Path(start).parent.name == CHECKPOINTS else Path(start)
    places = (place, run.parent / place.name)
    return next((each for each in places if _is_run(each) and not each.samefile(run)), None)


def _is_run(folder: Path) -> bool:
    try:
        return is_run(folder)
    except OSError:
        return False


def moments(run: Run) -> list[tuple[int, Path]]:
    """The folders of the run's samples by the number in their name, oldest first."""
    found = []
    folder = run.folder / SAMPLES
    for each in folder.iterdir() if folder.is_dir() else ():
        number = re.fullmatch(r"\D*(\d{1,15})", each.name)
        if number is not None and each.is_dir():
            found.append((int(number[1]), each))
    return sorted(found)


def evaluation_folders(runs: Sequence[Run], given: Sequence[Path]) -> list[Path]:
    """Folders of evaluations: those below the runs' folders, and those that are given."""
    found = [
        path.parent for run in runs for depth in ("*", "*/*") for path in run.folder.glob(f"{depth}/{EVALUATION_FILE}")
    ]
    return list(dict.fromkeys([*sorted(found), *given]))
