"""Tasks in worker processes, which end when the process that started them ends."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Protocol, TypeVar

import pyarrow as pa

from vdtrain.errors import ConfigError
from vdtrain.files import LockedError, locked
from vdtrain.progress import track
from vdtrain.redaction import redact_output

Task = TypeVar("Task")
Result = TypeVar("Result")
# How long a command waits for the processes of one that was killed.
LOCK_SECONDS = 10.0
# Tasks for each process that are given out before their results are taken: results can be large.
AHEAD = 8
# A worker keeps its lock file open as long as it lives.
_HELD: list[IO[str]] = []


class Run(Protocol):
    """Call a function for every task. It yields the results in the order of the tasks."""

    def __call__(
        self, function: Callable[[Task], Result], tasks: Sequence[Task], description: str
    ) -> Iterator[Result]: ...


@contextmanager
def alone(command: str, lock: Path, place: str, seconds: float = LOCK_SECONDS) -> Iterator[int]:
    """Hold the lock file of what a command writes, for the block; returns the descriptor that holds it.

    Args:
        place: what is written, for the error: a setting and its value, or a folder.

    Raises:
        ConfigError: the same command holds the lock elsewhere.
    """
    try:
        with locked(lock, seconds) as descriptor:
            yield descriptor
    except LockedError as error:
        raise ConfigError(
            f"{place}: another {command} is writing there (process {error.holder}); wait for it or stop it"
        ) from error


@contextmanager
def workers(processes: int, setting: str, lock: Path) -> Iterator[Run]:
    """Start worker processes; if `processes` is 1, this process does the tasks.

    Args:
        setting: the name of the setting `processes`, for errors.
        lock: the file that the caller holds by `alone`; the workers hold it too while they live.

    Raises:
        ConfigError: a worker was killed.
    """
    if processes == 1:
        yield _run_here
        return
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        processes, mp_context=multiprocessing.get_context("spawn"), initializer=_begin, initargs=(lock,)
    )
    try:
        yield partial(_run_in, pool, processes)
    except BrokenProcessPool as error:
        raise ConfigError(
            f"{setting}={processes}: a worker process was killed, perhaps because memory ran out; choose fewer "
            "processes and run it again"
        ) from error
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run_here(function: Callable[[Task], Result], tasks: Sequence[Task], description: str) -> Iterator[Result]:
    for task in track(tasks, description, "tasks"):
        yield function(task)


def _run_in(
    pool: ProcessPoolExecutor,
    processes: int,
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    description: str,
) -> Iterator[Result]:
    waiting, futures = iter(tasks), deque[Future[Result]]()
    for _ in track(range(len(tasks)), description, "tasks"):
        # Ctrl-C reaches all processes of a terminal, and a scheduler's SIGTERM those of a job. The workers inherit this
        # mask, and their parent ends them.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            futures.extend(pool.submit(function, each) for each in islice(waiting, AHEAD * processes - len(futures)))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield futures.popleft().result()


def _begin(lock: Path) -> None:
    """Hold the lock, and end when the parent ends, even if it is killed."""
    redact_output()
    _HELD.append(lock.open())
    fcntl.flock(_HELD[-1], fcntl.LOCK_SH)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
