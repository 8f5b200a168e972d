"""Signs of work of a process whose main thread takes long: bytes that move, and processor time.

A process that waits for another one shows no sign of its own. So the processes of a run tell each other of theirs,
through the store at which they met.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from vdtrain.run.processes import stat_of

# Threads whose reading and writing counts: the main one, and those that prepare the first batch.
WORKERS = ("MainThread", "prepare", "decode")
# Share of the time that a working process keeps a processor busy, at least.
BUSY = 0.2
KEY = "vdtrain/pulse"

_moved = 0


def moved(count: int = 1) -> None:
    """Note that a background thread has moved bytes, or finished a file."""
    global _moved
    _moved += count


class Pulse:
    """Tells whether this process, or another one of the run, has worked since the last look.

    Attributes:
        seconds: that processor time alone counts as work, after the last byte.
    """

    def __init__(self, pause: float, seconds: float) -> None:
        self.seconds = seconds
        self._pause = pause
        self._moved, self._bytes, self._processor = 0, 0, 0.0
        self._looked = self._byte = time.monotonic()
        self._own = self._heard = False
        self._listens, self._closed = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def share(self, store: Any) -> None:
        """Exchange signs with the processes at a store. The calls have a thread of their own, because they may hang."""
        self._thread = threading.Thread(target=self._exchange, args=(store.clone(),), name="pulse", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the exchange."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(self._pause)

    def listen(self, on: bool) -> None:
        """Exchange signs from now on, or no longer."""
        if on:
            self._byte = time.monotonic()
            self._listens.set()
        else:
            self._listens.clear()

    def beats(self, reads: bool) -> bool:
        """Whether there was a sign since the last call.

        Args:
            reads: the main thread reads or computes. Otherwise only what `moved` notes is a sign.
        """
        now = time.monotonic()
        working = _moved != self._moved
        self._moved = _moved
        if reads:
            read, processor = _read_and_written(), time.process_time() + _children_seconds()
            working |= read != self._bytes
            if working:
                self._byte = now
            computing = processor - self._processor > BUSY * (now - self._looked)
            working |= computing and now - self._byte < self.seconds
            self._bytes, self._processor, self._looked = read, processor, now
        self._own |= working
        heard, self._heard = self._heard, False
        return working or heard

    def _exchange(self, store: Any) -> None:
        seen = None
        while not self._closed.wait(self._pause):
            if not self._listens.is_set():
                continue
            own, self._own = self._own, False
            try:
                total = store.add(KEY, int(own))
            except RuntimeError:
                # The process that keeps the store has ended, which the collectives report.
                return
            self._heard |= seen is not None and total != seen + own
            seen = total


def _read_and_written() -> int:
    """Bytes and calls of the working threads, as the system counts them; 0 if it does not."""
    total = 0
    for thread in threading.enumerate():
        if thread.name.startswith(WORKERS):
            # In a fork, Python 3.11 keeps the number that the main thread had before.
            number = os.getpid() if thread is threading.main_thread() else thread.native_id
            # The thread may have ended.
            with suppress(OSError, ValueError):
                text = Path(f"/proc/self/task/{number}/io").read_text()
                total += sum(int(line.split(": ")[1]) for line in text.splitlines())
    return total


def _children_seconds() -> float:
    """Processor time of the processes that this one started, such as compilers."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for process in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        # It may have ended.
        with suppress(OSError, ValueError, IndexError):
            fields = stat_of(process)
            parents[process], ticks[process] = int(fields[1]), sum(map(int, fields[11:15]))
    found, level = 0, {os.getpid()}
    while level := {process for process, parent in parents.items() if parent in level}:
        found += sum(ticks[process] for process in level)
    return found / os.sysconf("SC_CLK_TCK")
