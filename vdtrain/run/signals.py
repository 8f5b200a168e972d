"""Signals that stop a run: recorded on arrival; all ranks act on them at the same step boundary."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType
from typing import Any

# Schedulers stop a run with these.
SCHEDULER_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SIGNALS = (signal.SIGINT, *SCHEDULER_SIGNALS)


class StopSignal:
    """Records the first stop signal. A second SIGINT ends the process at once, as users expect of Ctrl-C.

    Args:
        numbers: the signals to record.
    """

    def __init__(self, numbers: Sequence[signal.Signals] = SIGNALS) -> None:
        self.number = 0
        self._previous: dict[int, Any] = {}
        self.note(*numbers)

    def note(self, *numbers: signal.Signals) -> None:
        """Record these signals too, from now on."""
        for number in numbers:
            self._previous.setdefault(number, signal.signal(number, self._note))

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @property
    def interrupted(self) -> bool:
        """Whether it was Ctrl-C."""
        return self.number == signal.SIGINT

    def ignore(self) -> None:
        """Ignore further SIGTERMs and SIGUSR1s: this process is about to end with its proper status.

        Slurm's `srun --kill-on-bad-exit` sends SIGTERM to processes that end a moment after the first.
        """
        for number in SCHEDULER_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
