"""One folder, one job: whoever writes in a run's folder leaves in it who it is, and gives a sign of life.

    RUN_DIR/lock.json    host, process, Slurm job; its time of change is the sign, given every BEAT_SECONDS

A lock of this machine holds as long as its process lives. One of another machine holds as long as its sign comes: for
that it is watched, at most STALE_SECONDS. One of an earlier start of the same Slurm job holds no more. The kernel's own
file locks are not used: many network file systems keep them to one machine. Needs no PyTorch.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from enum import Enum
from pathlib import Path

from vdtrain.config.compose import ConfigError
from vdtrain.errors import unwritable
from vdtrain.run.restarts import slurm_job

LOCK_FILE = "lock.json"
BEAT_SECONDS = 15.0
# Some network file systems keep everyone waiting for a minute or two.
STALE_SECONDS = 180.0
POLL_SECONDS = 1.0
# For how long one that took a dead process's place looks whether another did so at the same moment.
SETTLE_SECONDS = 0.5
# The status of a mistake in the settings: a batch job that ends with it is not put back into the queue.
LOST_STATUS = 2


def machine() -> list[str]:
    """What has one set of process numbers: a host since its start, or a container of it."""
    parts = [socket.gethostname()]
    for name in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(os.readlink(name) if os.path.islink(name) else Path(name).read_text().strip())
        except OSError:
            parts.append("")
    return parts


def process_start(pid: int) -> str | None:
    """When a process of this machine started, in the kernel's ticks, by which a number that was given anew is told.

    None if there is no such process, "" where the system does not say when.
    """
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass
    try:
        # The name of the program, in parentheses, may have anything in it.
        state, *rest = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except FileNotFoundError:
        return None if Path("/proc/self/stat").exists() else ""
    except OSError:
        return ""
    return None if state in "ZX" else rest[18]


@dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    machine: list[str] = field(default_factory=list)
    pid: int = 0
    started: str = ""
    job: str | None = None
    restart_count: int = 0
    array_task: str | None = None
    since: float = 0.0
    token: str = ""

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> Holder:
        job, count = slurm_job(environment)
        return cls(
            machine(),
            os.getpid(),
            process_start(os.getpid()) or "",
            job,
            count,
            environment.get("SLURM_ARRAY_TASK_ID"),
            time.time(),
            uuid.uuid4().hex,
        )

    @classmethod
    def read(cls, text: str) -> Holder:
        """One that cannot be read is somebody of another machine, of whom nothing is known."""
        known = {each.name for each in fields(cls)}
        try:
            values = json.loads(text)
            return cls(**{key: value for key, value in values.items() if key in known})
        except (ValueError, TypeError, AttributeError):
            return cls(token=text)

    def lives(self) -> bool:
        """Whether the process, one of this machine, is there."""
        started = process_start(self.pid)
        return started is not None and (not self.started or not started or started == self.started)

    def __str__(self) -> str:
        if not self.pid:
            return "another process"
        job = f", job {self.job}" if self.job else ""
        task = f" (array task {self.array_task})" if self.array_task else ""
        since = datetime.fromtimestamp(self.since).isoformat(" ", "seconds")
        return f"process {self.pid} on {(self.machine or ['another host'])[0]}{job}{task}, since {since}"


class HeldError(RuntimeError):
    """Another job holds the lock; the message says who, in a line."""


class Verdict(Enum):
    FREE, STALE, HELD, WATCHED = range(4)


class RunLock:
    """The lock of a folder, taken by one process of a job for all of them.

    Args:
        folder: on a file system that all jobs see; made when the lock is taken.
        setting: names the folder, in errors.
        lost: called on a thread of its own when another job has taken this one's place, which happens to a process that
            stood still for long; by default it says so and ends the process.
    """

    def __init__(self, folder: Path, setting: str = "run_dir", lost: Callable[[str], None] | None = None) -> None:
        self.folder, self.setting = folder, setting
        self.path = folder / LOCK_FILE
        self.own: Holder | None = None
        self._lost = lost or _end
        self._released = threading.Event()
        self._beating: threading.Thread | None = None
        # Whose sign of life is watched, when it was last given, and since when on this process's clock.
        self._seen: tuple[str, float, float] | None = None
        self._waits = False

    def attempt(self) -> bool:
        """Take the lock: True. False if it has to be watched for a while longer; then call this again.

        Raises:
            HeldError: another job holds it.
            OSError: the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        verdict, holder = self._judge(exactly=True)
        if verdict is Verdict.HELD:
            raise HeldError(self._refusal(holder))
        if verdict is Verdict.WATCHED:
            return False
        own = Holder.here()
        if not (self._create(own) if verdict is Verdict.FREE else self._replace(own, holder)):
            return False
        self.own = own
        self._beating = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._beating.start()
        return True

    def held(self) -> str | None:
        """Why the lock cannot be had, in a line, or None; nothing is taken or written. May take STALE_SECONDS."""
        while True:
            verdict, holder = self._judge(exactly=False)
            if verdict is Verdict.HELD:
                return self._refusal(holder)
            if verdict is not Verdict.WATCHED:
                return None
            time.sleep(POLL_SECONDS)

    def release(self) -> None:
        """Give the lock back, if it was taken and nobody else took it."""
        self._released.set()
        if self._beating is not None:
            self._beating.join()
            self._beating = None
        if self.own is not None:
            with contextlib.suppress(OSError):
                if self._read()[0].token == self.own.token:
                    self.path.unlink()
        self.own = None

    def _judge(self, exactly: bool) -> tuple[Verdict, Holder]:
        try:
            holder, beaten = self._read()
        except FileNotFoundError:
            return Verdict.FREE, Holder()
        if holder.machine == machine():
            return (Verdict.HELD if holder.lives() else Verdict.STALE), holder
        job, count = slurm_job()
        if holder.job is not None and holder.job == job and count > holder.restart_count:
            return Verdict.STALE, holder
        now = time.monotonic()
        if self._seen is None or self._seen[0] != holder.token:
            self._seen = (holder.token, beaten, now)
        _, first, since = self._seen
        if beaten != first:
            return Verdict.HELD, holder
        # Where it matters, by the file system's own clock: those of two machines may differ.
        still = max(now - since, (self._clock() if exactly else time.time()) - beaten)
        if still > STALE_SECONDS:
            return Verdict.STALE, holder
        if not self._waits:
            self._waits = True
            place = f"{self.setting}={self.folder}"
            wait = f"waits {STALE_SECONDS:.0f} s at most to see whether that is still at work"
            print(f"warning: {place}: has the lock of {holder}; {wait}", file=sys.stderr, flush=True)
        return Verdict.WATCHED, holder

    def _read(self) -> tuple[Holder, float]:
        """Who holds the lock, and when it last gave a sign. Opened anew: network file systems then ask the server."""
        with self.path.open(encoding="utf-8", errors="replace") as file:
            return Holder.read(file.read()), os.fstat(file.fileno()).st_mtime

    def _clock(self) -> float:
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=f"{LOCK_FILE}.") as probe:
            return os.fstat(probe.fileno()).st_mtime

    def _create(self, own: Holder) -> bool:
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(asdict(own)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return True

    def _replace(self, own: Holder, dead: Holder) -> bool:
        """Take a dead one's place; of several that do so the last one has it."""
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

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            # Whatever the file system has: the next sign may come through.
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
                    self._lost(f"{self.setting}={self.folder}: was taken over by {holder}; this process ends unsaved")
                    return

    def _refusal(self, holder: Holder) -> str:
        remedy = f"wait for it, stop it, or give another {self.setting}"
        if os.environ.get("SLURM_ARRAY_TASK_ID"):
            remedy = f"give every task of the job array a {self.setting} of its own"
        return f"{self.setting}={self.folder}: is in use by {holder}; {remedy}"


def take_together(lock: RunLock, waiting: Callable[[], None] = lambda: None, needed: bool = True) -> None:
    """Take a lock on rank 0, for all processes of a job, each of which calls this.

    Args:
        waiting: called again and again.
        needed: False where the job may find nothing to do, so that a folder that cannot be written is no error.

    Raises:
        ConfigError: on every process, if another job holds it.
        SharedError: on every process, if the folder cannot be written.
    """
    # Late, for it imports PyTorch.
    from vdtrain.run import distributed

    while True:
        waiting()
        taken, held, failure = True, None, None
        if distributed.rank() == 0:
            try:
                taken = lock.attempt()
            except HeldError as error:
                held = str(error)
            except OSError as error:
                failure = f"{lock.setting}={lock.folder}: {unwritable(error, lock.folder)}" if needed else None
        taken, held, failure = distributed.broadcast_json([taken, held, failure])
        if held is not None:
            raise ConfigError(held)
        distributed.raise_if_any(failure)
        if taken:
            return
        time.sleep(POLL_SECONDS)


def _end(line: str) -> None:
    print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(LOST_STATUS)
