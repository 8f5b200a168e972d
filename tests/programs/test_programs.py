"""The tests' own programs behave as real ones do: arguments, folder, variables, files, limits, signals, exit status."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.programs import kill, program, run_ranks


def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program("python"), *words], capture_output=True, text=True, timeout=120, **options)


ABOUT = """
import json, os, resource, sys, torch
print(json.dumps([sys.argv, os.getcwd(), os.environ.get("OWN"), os.environ.get("HOME"), sys.stdin.read(),
    resource.getrlimit(resource.RLIMIT_NOFILE)[0], torch.get_num_threads()]))
"""


def test_a_program_has_what_its_caller_has(tmp_path: Path) -> None:
    variables = {"OWN": "it's ünï", "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "2"}

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (345, 345))

    options = {"cwd": tmp_path, "env": variables, "input": "typed", "capture_output": True, "text": True}
    words = ["-c", ABOUT, "a b", "--flag"]
    mine, real = (
        subprocess.run([python, *words], preexec_fn=limit, check=True, **options)  # type: ignore[call-overload]
        for python in (program("python"), sys.executable)
    )
    assert json.loads(mine.stdout) == json.loads(real.stdout)
    assert json.loads(mine.stdout)[:6] == [["-c", "a b", "--flag"], str(tmp_path), "it's ünï", None, "typed", 345]


def test_every_process_has_seeds_of_its_own() -> None:
    code = "import random, numpy, torch; print(random.random()); print(numpy.random.rand()); print(torch.rand(1))"
    one, other = (run("-c", code).stdout.splitlines() for _ in range(2))
    assert all(mine != its for mine, its in zip(one, other, strict=True))


@pytest.mark.parametrize(
    "code",
    [
        "pass",
        "raise SystemExit(3)",
        "raise SystemExit('a word')",
        "import os; os.kill(os.getpid(), 9)",
        "import atexit; atexit.register(print, 'at the end'); print('before')",
        "raise KeyboardInterrupt",
        "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('a thread'))).start()",
        "1 / 0",
    ],
)
def test_it_ends_as_a_real_one(code: str) -> None:
    mine = run("-c", code)
    real = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (mine.returncode, mine.stdout) == (real.returncode, real.stdout)
    assert mine.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]


def test_modules_files_and_installed_programs_run(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__main__.py").write_text("import sys, other; print(__name__, sys.argv[1:], other.__name__)")
    (tmp_path / "other.py").write_text("if __name__ == '__main__': print(__file__)")
    assert run("-m", "own", "x", cwd=tmp_path).stdout == "__main__ ['x'] other\n"
    assert run(str(tmp_path / "other.py")).stdout == f"{tmp_path / 'other.py'}\n"
    done = subprocess.run([program("vdtrain"), "plan", "--help"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout[:12]) == (0, "Usage: vdtra")
    assert run("--version").stdout.startswith("Python 3")


def test_other_packages_are_found_in_a_clone(tmp_path: Path) -> None:
    (tmp_path / "vdtrain").mkdir()
    (tmp_path / "vdtrain" / "__init__.py").write_text("")
    (tmp_path / "vdtrain" / "cli.py").write_text("print('of the clone')")
    assert run("-m", "vdtrain.cli", cwd=tmp_path).stdout == "of the clone\n"
    elsewhere = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert run("-c", "import vdtrain.cli", env=elsewhere, cwd="/").stdout == "of the clone\n"


WAITS = """
import os, signal, sys, time
# The signal may come while the number is still being printed: a second print would be a reentrant call.
signal.signal(signal.SIGUSR1, lambda *_: (os.write(1, b"USR1\\n"), sys.exit(75)))
print(os.getpid(), flush=True)
time.sleep(600)
"""


def begin(*words: str) -> tuple[subprocess.Popen[str], int]:
    """A program that waits, and the number of the process that does."""
    process = subprocess.Popen([program("python"), *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def alive(number: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{number}/status").read_text()
    except OSError:
        return False


def gone(number: int) -> bool:
    deadline = time.monotonic() + 60
    while alive(number) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(number)


def test_signals_reach_it() -> None:
    process, _ = begin("-c", WAITS)
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=60)[0] == "USR1\n"
    assert process.returncode == 75
    process, _ = begin("-c", WAITS)
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM


def test_it_ends_with_its_caller() -> None:
    process, number = begin("-c", WAITS)
    process.kill()
    assert gone(number)
    process.communicate()
    process, number = begin("-c", WAITS)
    assert kill(process) == -signal.SIGKILL
    assert not alive(number)
    process.communicate()


def test_ranks_that_take_too_long_are_killed_and_their_texts_told(tmp_path: Path) -> None:
    code = "import os, sys, time; print('rank', os.environ['RANK'], flush=True); time.sleep(600 * int(sys.argv[1]))"
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    with pytest.raises(AssertionError, match=r"took longer than 5 s, and ended with \[0, -9\]\n(.*\n)+rank 1"):
        run_ranks([["-c", code, str(rank)] for rank in range(2)], logs, 5)
