"""The lock of a run folder: one job at a time writes in it.

    RUN_DIR/lock.json    host, process and Slurm job of the holder; its mtime is a heartbeat every HEARTBEAT_SECONDS

A lock of this machine is valid while its process lives. A lock of another machine is valid while its heartbeat
continues, which is watched for at most STALE_SECONDS. A lock of an earlier start of the same Slurm job is stale. Kernel
file locks are not used, because many network file systems do not share them between machines. Needs no PyTorch.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from enum import Enum
from pathlib import Path

from vdtrain.config.compose import ConfigError
from vdtrain.errors import unwritable
from vdtrain.run.processes import machine, process_start
from vdtrain.run.restarts import slurm_job

LOCK_FILE = "lock.json"
HEARTBEAT_SECONDS = 15.0
# Some network file systems stall for a minute or two.
STALE_SECONDS = 180.0
POLL_SECONDS = 1.0
# After replacing a dead holder: how long to look for another process that did the same.
SETTLE_SECONDS = 0.5
# The status of a mistake in the settings: a batch job that ends with it is not requeued.
LOST_STATUS = 2


@dataclass(frozen=True)
class Holder:
    """The holder of a lock."""

    machine: list[str] = field(default_factory=list)
    pid: int = 0
    started: str = ""
    job: str | None = None
    restart_count: int = 0
    array_task: str | None = None
    since: float = 0.0
    token: str = ""

    @classmethod
    def here(cls) -> Holder:
        pid, task = os.getpid(), os.environ.get("SLURM_ARRAY_TASK_ID")
        return cls(machine(), pid, process_start(pid) or "", *slurm_job(), task, time.time(), uuid.uuid4().hex)

    @classmethod
    def read(cls, text: str) -> Holder:
        """An unreadable holder counts as an unknown process of another machine."""
        known = {each.name for each in fields(cls)}
        try:
            values = json.loads(text)
            return cls(**{key: value for key, value in values.items() if key in known})
        except (ValueError, TypeError, AttributeError):
            return cls(token=text)

    def lives(self) -> bool:
        """Whether the process, on this machine, is alive."""
        started = process_start(self.pid)
        return started is not None and (not self.started or not started or started == self.started)

    def __str__(self) -> str:
        if not self.pid:
            return "another process"
        job = f", job {self.job}" if self.job else ""
        task = f" (array task {self.array_task})" if self.array_task else ""
        since = datetime.fromtimestamp(self.since).isoformat(" ", "seconds")
        return f"process {self.pid} on {(self.machine or ['another host'])[0]}{job}{task}, since {since}"


class HeldError(ConfigError):
    """Another job holds the lock; the message names it in one line."""


class LockState(Enum):
    FREE, STALE, HELD, WATCHED = range(4)


class RunLock:
    """The lock of a folder; one process of a job takes it for all.

    Args:
        folder: on a file system that all jobs share; created with the lock.
        setting: the folder's setting, for errors.
    """

    def __init__(self, folder: Path, setting: str = "run_dir") -> None:
        self.folder, self.setting = folder, setting
        self.path = folder / LOCK_FILE
        self.own: Holder | None = None
        self._released = threading.Event()
        self._heartbeats: threading.Thread | None = None
        # The watched holder: its token, its last heartbeat, and when this process began to watch.
        self._seen: tuple[str, float, float] | None = None
        self._waits = False

    def attempt(self) -> bool:
        """Take the lock: True. False if its holder must be watched longer; then call this again.

        Raises:
            HeldError: another job holds it.
            OSError: the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        state, holder = self._look(exactly=True)
        if state is LockState.HELD:
            raise HeldError(self._refusal(holder))
        if state is LockState.WATCHED:
            return False
        own = Holder.here()
        if not (self._create(own) if state is LockState.FREE else self._replace(own, holder)):
            return False
        self.own = own
        self._heartbeats = threading.Thread(target=self._keep_alive, name="run-lock", daemon=True)
        self._heartbeats.start()
        return True

    def held(self) -> str | None:
        """A line on who holds the lock; None if it is free. Takes and writes nothing; may take STALE_SECONDS."""
        while True:
            state, holder = self._look(exactly=False)
            if state is LockState.HELD:
                return self._refusal(holder)
            if state is not LockState.WATCHED:
                return None
            time.sleep(POLL_SECONDS)

    def release(self) -> None:
        """Release the lock, if this process still holds it."""
        self._released.set()
        if self._heartbeats is not None:
            self._heartbeats.join()
            self._heartbeats = None
        if self.own is not None:
            with contextlib.suppress(OSError):
                if self._read()[0].token == self.own.token:
                    self.path.unlink()
        self.own = None

    def _look(self, exactly: bool) -> tuple[LockState, Holder]:
        try:
            holder, beaten = self._read()
        except FileNotFoundError:
            return LockState.FREE, Holder()
        if holder.machine == machine():
            return (LockState.HELD if holder.lives() else LockState.STALE), holder
        job, count = slurm_job()
        if holder.job is not None and holder.job == job and count > holder.restart_count:
            return LockState.STALE, holder
        now = time.monotonic()
        if self._seen is None or self._seen[0] != holder.token:
            self._seen = (holder.token, beaten, now)
        _, first, since = self._seen
        if beaten != first:
            return LockState.HELD, holder
        # By the file system's clock, because the clocks of two machines may differ.
        still = max(now - since, (self._clock() if exactly else time.time()) - beaten)
        if still > STALE_SECONDS:
            return LockState.STALE, holder
        if not self._waits:
            self._waits = True
            place = f"{self.setting}={self.folder}"
            wait = f"waits {STALE_SECONDS:.0f} s at most to see whether that is still at work"
            print(f"warning: {place}: has the lock of {holder}; {wait}", file=sys.stderr, flush=True)
        return LockState.WATCHED, holder

    def _read(self) -> tuple[Holder, float]:
        """The holder and its last heartbeat. Opening the file makes network file systems ask the server."""
        with self.path.open(encoding="utf-8", errors="replace") as file:
            return Holder.read(file.read()), os.fstat(file.fileno()).st_mtime

    def _clock(self) -> float:
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=f"{LOCK_FILE}.") as probe:
            return os.fstat(probe.fileno()).st_mtime

    def _create(self, own: Holder) -> bool:
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(asdict(own)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return True

    def _replace(self, own: Holder, dead: Holder) -> bool:
        """Replace a dead holder; of several processes that do so, the last one wins."""
        draft = self.path.with_name(f"{LOCK_FILE}.{own.token}")
        draft.write_text(json.dumps(asdict(own)) + "\n")
        try:
            if self._read()[0].token != dead.token:
                return False
            draft.replace(self.path)
            time.sleep(SETTLE_SECONDS)
            return self._read()[0].token == own.token
        except FileNotFoundError:
            return False
        finally:
            draft.unlink(missing_ok=True)

    def _keep_alive(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            # A file system error passes: the next heartbeat may succeed.
            with contextlib.suppress(OSError):
                assert self.own is not None
                try:
                    holder, _ = self._read()
                except FileNotFoundError:
                    if not self._create(self.own):
                        continue
                    holder = self.own
                if holder.token == self.own.token:
                    os.utime(self.path)
                elif holder.pid:
                    _end(f"{self.setting}={self.folder}: was taken over by {holder}; this process ends unsaved")
                    return

    def _refusal(self, holder: Holder) -> str:
        remedy = f"wait for it, stop it, or give another {self.setting}"
        if os.environ.get("SLURM_ARRAY_TASK_ID"):
            remedy = f"give every task of the job array a {self.setting} of its own"
        return f"{self.setting}={self.folder}: is in use by {holder}; {remedy}"


def take_together(lock: RunLock, waiting: Callable[[], None], needed: bool = True) -> None:
    """Take a lock on rank 0 for all processes of a job; every process calls this.

    Args:
        waiting: called repeatedly while this waits.
        needed: False if the job may have nothing to do; a folder that cannot be written is then not an error.

    Raises:
        ConfigError: on every process, if another job holds it.
        SharedError: on every process, if the folder cannot be written.
    """
    # Imported late, because it imports PyTorch.
    from vdtrain.run.distributed import SharedError, on_first

    def attempt() -> bool:
        try:
            return lock.attempt()
        except OSError as error:
            if needed:
                raise SharedError(f"{lock.setting}={lock.folder}: {unwritable(error, lock.folder)}") from error
            return True

    waiting()
    while not on_first(attempt):
        time.sleep(POLL_SECONDS)
        waiting()


def _end(line: str) -> None:
    """End this process: another job has taken its lock, which happens after it stood still for long."""
    print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(LOST_STATUS)
