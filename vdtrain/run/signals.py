"""Signals that ask a run to stop: noted when they come, acted on by all ranks at the same step boundary."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType
from typing import Any

# By which schedulers stop a run.
SCHEDULER_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SIGNALS = (signal.SIGINT, *SCHEDULER_SIGNALS)


class StopSignal:
    """Notes the first stop signal; a second SIGINT ends the process at once, as users expect of Ctrl-C.

    Args:
        numbers: of the signals to note, to begin with.
    """

    def __init__(self, numbers: Sequence[signal.Signals] = SIGNALS) -> None:
        self.number = 0
        self._previous: dict[int, Any] = {}
        self.note(*numbers)

    def note(self, *numbers: signal.Signals) -> None:
        """Note these signals too, from now on."""
        for number in numbers:
            self._previous.setdefault(number, signal.signal(number, self._note))

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @property
    def interrupted(self) -> bool:
        """Whether it was a person's Ctrl-C."""
        return self.number == signal.SIGINT

    def ignore(self) -> None:
        """Let further SIGTERMs and SIGUSR1s pass: this process is about to end, with the status that it should have.

        Slurm's `srun --kill-on-bad-exit` sends SIGTERM to those that end a moment later than the first one.
        """
        for number in SCHEDULER_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
