"""Run a command, and kill all its processes when it ends or when its starter ends.

    python -m data_pipeline.download.supervisor COMMAND...

Standard input is a pipe that the starter holds open. When it closes, the starter is gone or wants the command to stop.
A process group is not enough: Spark's and Ray's processes have groups of their own. Linux only.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def supervise(command: list[str]) -> int:
    """Run the command until it ends or standard input closes; returns its exit status, or 137 if it was killed."""
    # Orphans of the command become children of this process.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    ended = os.pidfd_open(child.pid)
    readable, _, _ = select.select([sys.stdin.fileno(), ended], [], [])
    if ended in readable:
        child.wait()
    end_descendants()
    return child.returncode if child.returncode is not None else 128 + signal.SIGKILL


def end_descendants() -> None:
    """Kill all descendants of this process, including new ones, and wait until they are gone."""
    while found := _descendants():
        for process in found:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        time.sleep(0.01)


def _descendants() -> list[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                # The name in parentheses may hold spaces and parentheses of its own.
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    own: set[int] = {os.getpid()}
    while more := {process for process, parent in parents.items() if parent in own} - own:
        own |= more
    return sorted(own - {os.getpid()})


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[1:]))
