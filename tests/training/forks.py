"""Starts of `vdtrain train` on several ranks, one after another, and the trouble that befalls them (`trouble.py`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.programs import Ending, run_ranks

TIMEOUT_SECONDS = 600.0
PREPARE = ("-m", "tests.programs.after", "tests.training.trouble:prepare")


@dataclass(frozen=True)
class Case:
    """One start of `vdtrain train` on some ranks, with the trouble that befalls it (see trouble.py), if any."""

    ranks: int
    arguments: list[str]
    trouble: dict[str, str | int] | None = None

    @property
    def words(self) -> list[str]:
        """What `python` is called with."""
        start = ["-m"] if self.trouble is None else [*PREPARE, json.dumps(self.trouble)]
        return [*start, "vdtrain", "train", *self.arguments]


def run_cases(folder: Path, cases: list[Case], before: Callable[[int], None] | None = None) -> list[Ending]:
    """Run cases one after another; what they have in common is on disk.

    Args:
        before: called with the number of a case when all before it have ended, and it has not begun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    endings = []
    for number, case in enumerate(cases):
        if before is not None:
            before(number)
        logs = [folder / f"{number}-{rank}.log" for rank in range(case.ranks)]
        endings.append(run_ranks([case.words] * case.ranks, logs, TIMEOUT_SECONDS))
    return endings
