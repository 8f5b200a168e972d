"""Checkpoints written in the background: training waits only while the values are copied.

    saver.begin(engine, ema, trainer_state, step)      copies and returns; a thread writes and publishes
    for line in saver.failures(): ...                  at any later step: saves that failed
    saver.wait()                                       returns when nothing is being written

The threads of all processes use a process group of their own, so their collectives never mix with those of training.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from vdtrain.checkpoint.store import CheckpointStore, HostMemory, Snapshot
from vdtrain.engine.engine import Engine, ShardEMA
from vdtrain.errors import one_line
from vdtrain.run import distributed
from vdtrain.run.connections import connection_problem

# A slow disk delays only the other processes' threads. A process that ends breaks the connection.
GROUP_TIMEOUT = timedelta(days=1)


class BackgroundSaver:
    """Writes a store's checkpoints, one at a time. Every process calls each method together, after the same step.

    A save that fails on one process fails on all. The next save tries again.

    Args:
        timeout_seconds: how long `begin` waits for the previous save before it gives up the new one; None waits until
            it is done.
    """

    def __init__(self, store: CheckpointStore, timeout_seconds: float | None = None) -> None:
        self.store = store
        self.timeout_seconds = timeout_seconds
        self.saved_step: int | None = None
        self.failed = 0
        # Seconds that training waited since `times` was last called, and that the newest save took to write.
        self._waited, self._took = 0.0, 0.0
        self._seconds: float | None = None
        self._memory = HostMemory()
        self._group: Any = (
            dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT) if distributed.world_size() > 1 else None
        )
        self._thread: threading.Thread | None = None
        self._overdue = False
        # Of the current save; its thread sets it last.
        self._failure: str | None = None
        self._step: int | None = None
        self._news: list[str] = []

    def begin(self, engine: Engine, ema: ShardEMA | None, trainer_state: dict[str, Any], step: int) -> None:
        """Copy the present values; a thread writes them as the checkpoint of `step`."""
        with self._waiting():
            idle = self._wait(0.0 if self._overdue else self.timeout_seconds)
            if not distributed.all_agree(idle):
                self._overdue = not idle
                self._give_up(
                    f"{self.store.folder}: the checkpoint of step {step} was not saved (a process still writes the one "
                    f"of step {self._step})"
                )
                return
            self._overdue, self._step = False, step
            snapshot = Snapshot.take(engine, ema, trainer_state, step, self._memory)
            # A daemon: a failing run must not hang on a dead file system when the interpreter ends.
            self._thread = threading.Thread(target=self._write, args=(snapshot,), name=f"save-{step}", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written."""
        with self._waiting():
            self._wait(None)

    def times(self) -> dict[str, float]:
        """Seconds that training waited for saves since the last call, and that the newest save took to be written."""
        waited, self._waited = self._waited, 0.0
        return {"wait": waited} | ({} if self._seconds is None else {"write": self._seconds})

    def failures(self) -> list[str]:
        """One line per save that failed since the last call."""
        self._wait(0.0)
        news, self._news = self._news, []
        return news

    def close(self) -> None:
        """Leave the threads' process group. A save that is still running after an error is not published."""
        if self._group is not None and self._thread is None:
            dist.destroy_process_group(self._group)
        self._group = None

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    def _write(self, snapshot: Snapshot) -> None:
        group, began = self._group, time.monotonic()
        try:
            self.store.write(snapshot, lambda value: distributed.gather_json(value, group))
        except Exception as error:
            self._failure = connection_problem(error) or one_line(error)
        self._took = time.monotonic() - began

    def _wait(self, seconds: float | None) -> bool:
        """Wait at most `seconds` for the current save and record its outcome; False if it is not done."""
        if self._thread is None:
            return True
        self._thread.join(seconds)
        if self._thread.is_alive():
            return False
        self._thread = None
        if self._failure is None:
            self.saved_step, self._seconds = self._step, self._took
        else:
            self._give_up(self._failure)
        self._failure = None
        return True

    def _give_up(self, line: str) -> None:
        self.failed += 1
        self._news.append(line)
