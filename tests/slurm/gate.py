"""A stream that stops before one of its batches until the process gets SIGUSR1, so that a test can come between."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from vdtrain.data.batch import Batch
from vdtrain.data.stream import PairStream


class GatedStream(PairStream):
    """`PairStream`, which in a job's first attempts waits before a batch, and leaves a file that says so.

    Args:
        gate: the folder for these files, `JOB-ATTEMPT-RANK`, the first attempt being 0.
        attempts: by job name, how many of them wait; none of the other jobs' do.
        batches: delivered before the wait.
    """

    def __init__(
        self, manifest: Path, *, gate: str, attempts: Mapping[str, int], batches: int, **arguments: Any
    ) -> None:
        super().__init__(manifest, **arguments)
        job, attempt = os.environ["SLURM_JOB_NAME"], int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.before = batches if attempt < attempts.get(job, 0) else None
        self.sign = Path(gate) / f"{job}-{attempt}-{self.rank}"
        self.signalled = threading.Event()
        noted: Any = signal.getsignal(signal.SIGUSR1)

        def pass_on(number: int, frame: FrameType | None) -> None:
            noted(number, frame)
            self.signalled.set()

        signal.signal(signal.SIGUSR1, pass_on)

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(super().__iter__()):
            if number == self.before:
                self.sign.touch()
                self.signalled.wait()
            yield batch
