"""When a run is looked at, and what that may cost: samples and validation come at fixed numbers of training samples.

RUN_DIR/watched.json     what the looks have cost so far, so that a run that continues keeps its budget
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vdtrain.files import SHAPE_ERRORS, atomic_write, read_record

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
        with atomic_write(self._path) as draft:
            draft.write_text(
                json.dumps({"ran": self.ran, "looks": {name: asdict(each) for name, each in looks.items()}})
            )
