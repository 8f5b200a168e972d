"""Programs that tests start, run by forks of one process that has imported everything already.

`vdtrain`, `python` and `torchrun` in `folder()` are called as the real ones are, from a test, a shell or a batch job.
What they run is real, with its own folder, variables, files, limits, signals and exit status. Only the imports, ten to
twenty seconds of a core, are paid once for the whole session (`server.py`).

What is not as in a real start: forks share a hash seed; no interpreter is started or torn down; a process has the
name and the number of its caller's child, not of its caller. Tests of these start `sys.executable`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMES = ("vdtrain", "python", "torchrun")
FOLDER_VARIABLE = "VDTRAIN_TEST_PROGRAMS"
SOCKET, LOG = "socket", "log"
# Until there is a socket; until everything is imported.
BEGIN_SECONDS, START_SECONDS = 60.0, 600.0
POLL_SECONDS = 0.02

CALLER = Path(__file__).with_name("caller.py")


def install(folder: Path, address: Path) -> None:
    """Put the programs into a folder; `address` is the socket of their server."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        program = folder / name
        program.write_text(f"#!{sys.executable} -IS\n{CALLER.read_text()}")
        program.chmod(0o755)
    if address.parent != folder:
        (folder / SOCKET).symlink_to(address)


@contextlib.contextmanager
def server(python: str, address: Path, root: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """The process behind programs, started by `python` for the packages in `root`; what it started ends with it.

    It imports at the first call. It ends with the process that started it, too.
    """
    with (address.with_name(LOG)).open("w") as log:
        process = subprocess.Popen(
            [python, "-m", "tests.programs.server", str(address)],
            cwd=root,
            env={**environment, "OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def session() -> Iterator[None]:
    """The programs of a test session, for all of its processes."""
    from tests.faults import compiled  # it needs pytest, which the process behind the programs does without

    # The path of a socket is short.
    with tempfile.TemporaryDirectory(prefix="programs-", dir="/tmp") as place:
        folder = Path(place)
        install(folder, folder / SOCKET)
        # So that the rules of a call can befall its fork (`tests/faults`); without any, the library passes all on.
        library = compiled(folder)
        preload = {} if library is None else {"LD_PRELOAD": str(library)}
        with server(sys.executable, folder / SOCKET, ROOT, {**os.environ, **preload}):
            os.environ[FOLDER_VARIABLE] = place
            yield
            del os.environ[FOLDER_VARIABLE]


def folder() -> Path:
    """The folder of the programs, once the process behind them has imported everything."""
    place = Path(os.environ[FOLDER_VARIABLE])
    if place not in _ready:
        wait_until_ready(place / SOCKET)
        _ready.add(place)
    return place


_ready: set[Path] = set()


def wait_until_ready(address: Path) -> None:
    """Return when the server at `address` forks without delay."""
    log = address.with_name(LOG)
    deadline = time.monotonic() + BEGIN_SECONDS
    while not address.exists():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(POLL_SECONDS)
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(START_SECONDS)
        link.connect(str(address))
        link.shutdown(socket.SHUT_WR)
        assert link.recv(16) == b"ready", f"the test's programs did not start\n{log.read_text()}"


def program(name: str) -> str:
    """The path of `vdtrain`, `python` or `torchrun`."""
    return str(folder() / name)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def of_rank(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    return {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Ending:
    """How a program ended on its ranks: exit status (negative for a signal) and output, by rank."""

    statuses: list[int]
    logs: list[str]

    def __str__(self) -> str:
        texts = (f"--- rank {rank}\n{log}" for rank, log in enumerate(self.logs))
        return "\n".join((f"ended with {self.statuses}", *texts))


def run_ranks(
    commands: Sequence[Sequence[str]],
    logs: Sequence[Path],
    timeout: float,
    variables: Mapping[str, str] | None = None,
    python: str | None = None,
) -> Ending:
    """Run `python` with other arguments on every rank, at once.

    Raises:
        AssertionError: it took longer than `timeout` seconds. Says what all ranks printed.
    """
    ranks, port = len(commands), free_port()
    words = [python or program("python")]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, (command, log) in enumerate(zip(commands, logs, strict=True)):
            environment = {**os.environ, **(variables or {}), **of_rank(rank, ranks, port)}
            with log.open("wb") as output:
                processes.append(
                    subprocess.Popen([*words, *command], env=environment, stdout=output, stderr=subprocess.STDOUT)
                )
        deadline = time.monotonic() + timeout
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
        late = False
    except subprocess.TimeoutExpired:
        late = True
    finally:
        for process in processes:
            process.kill()
            process.wait()
    texts = [log.read_text(errors="replace") for log in logs]
    ending = Ending([process.returncode for process in processes], texts)
    assert not late, f"took longer than {timeout} s, and {ending}"
    return ending


def kill(process: subprocess.Popen[str]) -> int:
    """SIGKILL what a program runs; return the exit status when it is gone."""
    process.send_signal(signal.SIGRTMIN)
    return process.wait()
