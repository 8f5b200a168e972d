"""No process outlives its supervisor, whatever group it is in and however the starter went (two seconds)."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.download import supervisor

SUPERVISE = [sys.executable, "-I", "-S", supervisor.__file__]


def processes(mark: str) -> int:
    """How many processes there are, besides zombies, with a word in their command line."""
    count = 0
    for entry in Path("/proc").iterdir():
        try:
            count += entry.name.isdigit() and mark in (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
    return count


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("killed", [False, True])
def test_nothing_is_left(tmp_path: Path, killed: bool) -> None:
    """Whether the starter closes the pipe or is killed."""
    mark = f"family-{tmp_path.name}-{killed}"
    script = tmp_path / mark
    script.write_text("#!/bin/sh\nsleep 987\n")
    script.chmod(0o755)
    family = f"setsid {script} & sh -c '{script} & {script}' & (setsid {script} &); wait"
    starter = (
        "import subprocess, sys; p = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, start_new_session=True); "
        "sys.stdin.read(); p.stdin.close(); sys.exit(p.wait())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", starter, *SUPERVISE, "sh", "-c", family], stdin=subprocess.PIPE, cwd=tmp_path
    )
    wait_for(lambda: processes(mark) >= 7)
    if killed:
        process.kill()
        process.wait()
    else:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=60) == 137
    wait_for(lambda: processes(mark) == 0)


def test_the_status_is_the_commands() -> None:
    with subprocess.Popen([*SUPERVISE, "sh", "-c", "exit 7"], stdin=subprocess.PIPE) as process:
        assert process.wait(timeout=60) == 7
