"""Reads that fail for a while are repeated: disks, file servers and object stores come back."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from vdtrain.errors import one_line, passes
from vdtrain.redaction import without_secrets
from vdtrain.run.pulse import moved

# Seconds for which a read is repeated where no watchdog sets the limit, and as a share of the watchdog's.
PATIENCE_SECONDS = 60.0
PATIENCE_OF_WATCHDOG = 0.5
# Pauses between two tries, which double.
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 15.0
# Of this many outages each is told, then every tenth, hundredth, ...
TOLD = 10

Found = TypeVar("Found")


class StreamError(RuntimeError):
    """The data cannot be trained on. The message is one line.

    Attributes:
        passes: whether the same read may succeed later; None if the error behind it tells.
        wait: seconds that a server asks to wait.
        alone: whether other reads succeeded meanwhile.
    """

    def __init__(self, message: str, *, passes: bool | None = None, wait: float = 0.0, alone: bool = False) -> None:
        super().__init__(message)
        self.passes, self.wait, self.alone = passes, wait, alone


class Patience:
    """Repeats reads whose error may pass, after growing pauses. Any number of threads may use it.

    One line tells of an outage, another one of its end. Each try is a sign of work to the watchdog.

    Args:
        seconds: for which a read is repeated, from its first failure; 0 repeats none.
    """

    def __init__(self, seconds: float = PATIENCE_SECONDS) -> None:
        self.seconds = seconds
        self._closed = threading.Event()
        self._lock = threading.Lock()
        # By thread: begin and name of its present read.
        self._reads: dict[int, tuple[float, str]] = {}
        self._failing: set[int] = set()
        self._answered, self._over = 0.0, False
        self._outages, self._began = 0, 0.0

    def keep(self, name: str, read: Callable[[], Found]) -> Found:
        """What `read` finds.

        Args:
            name: what is read: a path or an address.

        Raises:
            StreamError: its error did not pass. Errors that cannot pass are raised as they are.
        """
        thread, began, tries = threading.get_ident(), 0.0, 0
        try:
            while True:
                self._reads[thread] = time.monotonic(), name
                try:
                    found = read()
                except Exception as error:
                    if not passes(error):
                        raise
                    now, tries = time.monotonic(), tries + 1
                    began = began or now
                    if now - began >= self.seconds:
                        raise self._given_up(error, tries, began) from error
                    self._note(thread, error)
                    pause = min(FIRST_PAUSE_SECONDS * 2.0 ** min(tries - 1, 10), LONGEST_PAUSE_SECONDS)
                    pause = max(min(pause, self.seconds / 4), getattr(error, "wait", 0.0))
                    self.pause(min(pause, began + self.seconds - now))
                else:
                    moved()
                    self._answered = time.monotonic()
                    if tries:
                        self._settle(thread, name)
                    return found
        finally:
            self._reads.pop(thread, None)
            self._failing.discard(thread)

    def pause(self, seconds: float | None = None) -> None:
        """Wait, as before a second try if no time is given; a StreamError if it was closed meanwhile."""
        moved()
        if self._closed.wait(FIRST_PAUSE_SECONDS if seconds is None else seconds):
            raise StreamError("the stream was closed")

    def close(self) -> None:
        """End the pauses; nothing is repeated afterwards."""
        self._closed.set()

    def slowest(self) -> str:
        """What has been read for longest, and for how long; empty if nothing is being read."""
        reads = list(self._reads.values())
        if not reads:
            return ""
        began, name = min(reads)
        return f"{without_secrets(name)}: a read has not ended for {time.monotonic() - began:.0f} s"

    def _given_up(self, error: Exception, tries: int, began: float) -> StreamError:
        often = f", tried {tries} times in {time.monotonic() - began:.0f} s" if tries > 1 else ""
        alone = self._answered > began
        self._over = not alone
        return StreamError(one_line(error) + often, passes=True, alone=alone)

    def _note(self, thread: int, error: Exception) -> None:
        with self._lock:
            first = not self._failing
            self._failing.add(thread)
            if first:
                self._outages, self._began = self._outages + 1, time.monotonic()
            # What follows an error that ends the run is no news.
            told = first and self._is_told() and not self._over
        if told:
            warn(f"{one_line(error)}; trying again for {self.seconds:g} s")

    def _settle(self, thread: int, name: str) -> None:
        with self._lock:
            self._failing.discard(thread)
            told = not self._failing and self._is_told()
        if told:
            warn(f"{without_secrets(name)}: can be read again, after {time.monotonic() - self._began:.1f} s")

    def _is_told(self) -> bool:
        return self._outages <= TOLD or self._outages == 10 ** (len(str(self._outages)) - 1)


def patience_of(watchdog_seconds: float | None) -> float:
    """For how many seconds a read is repeated under a watchdog."""
    return 5 * PATIENCE_SECONDS if watchdog_seconds is None else PATIENCE_OF_WATCHDOG * watchdog_seconds


def warn(line: str) -> None:
    """Print a warning in one piece: other threads write too."""
    sys.stderr.write(f"warning: {line}\n")
    sys.stderr.flush()
