"""Starts of `vdtrain train` on two ranks under a launcher, of which the drill can kill each process.

Most starts are forks of this process, which has imported everything: an import takes ten seconds of a core. The
launcher is then a fork that starts the ranks and waits for them. Some starts are those of real interpreters, by
torchrun.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import psutil

from tests.programs import free_port, of_rank
from tests.programs.server import begin_libraries_anew, end_with_parent, leave, libc, take_streams, warm_up
from tests.training import trouble
from vdtrain import cli

RANKS = 2
POLL_SECONDS = 0.01
# Between the end of a process and that of all.
END_SECONDS = 240.0
FAULTS_VARIABLE = "VDTRAIN_FAULTS"

_statuses: dict[int, int] = {}
# Processes of the drill itself.
helpers: set[int] = set()


def warm() -> None:
    """Import everything, and adopt what a killed launcher leaves."""
    warm_up()
    libc.prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def fork(body: Callable[[], int]) -> int:
    """The number of a fork that runs `body`, and ends with its status."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _be(body)
    return pid


def _be(body: Callable[[], int]) -> NoReturn:
    status = 70
    try:
        status = body()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        leave(status)


def preloaded() -> bool:
    """Whether this process has the library of faults."""
    return hasattr(ctypes.CDLL(None), "read_faults")


def with_faults(rules: str) -> None:
    """Let the rules of `tests/faults/shim.c`, which this process has preloaded, befall it from now on."""
    os.environ[FAULTS_VARIABLE] = rules
    ctypes.CDLL(None).read_faults()


def reap() -> None:
    """Take the exit status of every child that has ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _statuses[pid] = os.waitstatus_to_exitcode(status)


def wait_for(pids: Sequence[int]) -> list[int]:
    """The exit statuses of forks, negative for a signal."""
    while not all(pid in _statuses for pid in pids):
        reap()
        time.sleep(POLL_SECONDS / 5)
    return [_statuses.pop(pid) for pid in pids]


class Start:
    """A launcher and its ranks.

    Attributes:
        began: `time.monotonic` of the start.

    Args:
        words: of `vdtrain`.
        log: for what all of them print.
        rules: of faults, by rank (`tests/faults`).
        befalls: for `tests.training.trouble.prepare`.
        fresh: start interpreters, by torchrun.
    """

    def __init__(
        self,
        words: Sequence[str],
        log: Path,
        rules: str = "",
        befalls: Mapping[str, object] | None = None,
        fresh: bool = False,
    ) -> None:
        self.log, self.fresh, self.began = log, fresh, time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            if fresh:
                torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}"]
                command = [*torchrun, f"--master-port={free_port()}", "-m", "vdtrain", *words]
                self.launcher = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
                ).pid
                self._ranks: list[int] = []
            else:
                read, write = os.pipe()
                self.launcher = fork(lambda: _launch(words, output.fileno(), write, rules, befalls))
                os.close(write)
                with os.fdopen(read) as pipe:
                    self._ranks = json.loads(pipe.readline())
        # Numbers come back.
        for pid in (self.launcher, *self._ranks):
            _statuses.pop(pid, None)

    @property
    def ranks(self) -> list[int]:
        """Process numbers by rank; empty before they exist."""
        if not self._ranks:
            try:
                children = psutil.Process(self.launcher).children()
                found = [child.pid for child in children if "vdtrain" in child.cmdline()]
            except psutil.Error:
                return []
            if len(found) == RANKS:
                self._ranks = found
        return self._ranks

    def text(self) -> str:
        """What was printed."""
        return self.log.read_text(errors="replace")

    def traced(self) -> bool:
        """Whether a traceback was printed that is not torchrun's own."""
        text = self.text()
        own = len(re.findall(r"^torch\.distributed\.elastic\.\S+: ", text, re.MULTILINE))
        return text.count("Traceback (most recent call last)") > own

    def running(self) -> bool:
        """Whether the launcher or a rank runs."""
        reap()
        return any(psutil.pid_exists(pid) and pid not in _statuses for pid in (self.launcher, *self.ranks))

    def signal(self, number: signal.Signals, *pids: int) -> None:
        """Send a signal to processes, as far as they still run."""
        reap()
        for pid in pids:
            if pid not in _statuses and psutil.pid_exists(pid):
                os.kill(pid, number)

    def wait(self, seconds: float = END_SECONDS) -> bool:
        """Whether all that was started has ended by itself; what has not is killed."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self.running() and not left():
                return True
            time.sleep(POLL_SECONDS)
        for process in left():
            process.kill()
        while self.running() or left():
            time.sleep(POLL_SECONDS)
        return False

    def statuses(self) -> list[int | None]:
        """Exit statuses by rank of a start that has ended; None where the launcher was killed or is torchrun."""
        record = self.log.with_suffix(".json")
        if record.exists():
            return list(json.loads(record.read_text()))
        return [_statuses.get(pid) for pid in self._ranks] or [None] * RANKS


def left() -> list[psutil.Process]:
    """Processes that starts have left, but for those that only wait to be reaped."""
    reap()
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.pid not in helpers and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def _launch(words: Sequence[str], log: int, pipe: int, rules: str, befalls: Mapping[str, object] | None) -> int:
    """What torchrun does: ranks with its variables."""
    end_with_parent()
    os.setsid()
    path = os.readlink(f"/proc/self/fd/{log}")
    port = free_port()
    pids = [fork(lambda rank=rank: _train(words, log, rank, port, rules, befalls)) for rank in range(RANKS)]  # type: ignore[misc]
    os.write(pipe, json.dumps(pids).encode() + b"\n")
    os.close(pipe)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    Path(path).with_suffix(".json").write_text(json.dumps(statuses))
    return int(any(statuses))


def _train(
    words: Sequence[str], log: int, rank: int, port: int, rules: str, befalls: Mapping[str, object] | None
) -> int:
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update({**of_rank(rank, RANKS, port), "TORCHELASTIC_RUN_ID": "drill"})
    take_streams(dict(os.environ))
    begin_libraries_anew(dict(os.environ))
    if rules:
        with_faults(rules)
    if befalls is not None:
        trouble.prepare(dict(befalls))
    sys.argv = ["vdtrain", *words]
    return cli.main()
