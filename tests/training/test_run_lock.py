"""One run folder, one job: who holds a lock, when it holds no more, and what a second writer gets to read."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.pairs import write_pairs
from tests.settings import phases
from tests.tiny_runs import BATCH, STAGES, overrides
from vdtrain.commands.preflight import main as preflight
from vdtrain.run import lock as run_lock
from vdtrain.run.lock import LOCK_FILE, HeldError, Holder, RunLock
from vdtrain.run.processes import process_start
from vdtrain.run.restarts import read_events
from vdtrain.tracking.metrics import last_metrics, read_metrics

ELSEWHERE = ["n7", "another boot", "pid:[1]"]
LAUNCHERS = ("SLURM_", "OMPI_", "PMI_", "RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def _outside_of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("HEARTBEAT", 0.1), ("STALE", 1.0), ("POLL", 0.1), ("SETTLE", 0.2)):
        monkeypatch.setattr(run_lock, f"{name}_SECONDS", seconds)


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[RunLock]:
    lock = RunLock(tmp_path)
    assert lock.attempt()
    yield lock
    lock.release()


def leave(folder: Path, holder: Holder, age: float = 0.0) -> None:
    """A lock as somebody left it, whose last sign of life is so old."""
    (folder / LOCK_FILE).write_text(json.dumps(asdict(holder)))
    then = time.time() - age
    os.utime(folder / LOCK_FILE, (then, then))


def taken(folder: Path) -> bool:
    """Whether the lock is had at once."""
    lock = RunLock(folder)
    try:
        return lock.attempt()
    finally:
        lock.release()


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


# What makes a lock stale.


def test_a_lock_of_this_machine_holds_as_long_as_its_process_lives(locked: RunLock, tmp_path: Path) -> None:
    with pytest.raises(HeldError) as caught:
        RunLock(tmp_path).attempt()
    assert f"run_dir={tmp_path}: is in use by process {os.getpid()} on {os.uname().nodename}, since 20" in str(
        caught.value
    )
    assert RunLock(tmp_path).held() == str(caught.value)
    locked.release()
    assert not (tmp_path / LOCK_FILE).exists()
    assert taken(tmp_path)
    leave(tmp_path, replace(Holder.here(), pid=dead_process()))
    assert RunLock(tmp_path).held() is None
    assert taken(tmp_path)


def test_a_number_that_was_given_to_another_process_is_told(tmp_path: Path) -> None:
    leave(tmp_path, replace(Holder.here(), started="1"))
    assert taken(tmp_path)


def test_a_process_that_ended_and_was_not_waited_for_is_dead(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    try:
        deadline = time.monotonic() + 20
        while process_start(process.pid) is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process_start(process.pid) is None
    finally:
        process.wait()


def test_a_stopped_process_of_this_machine_still_holds_its_lock(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        process.send_signal(signal.SIGSTOP)
        started = process_start(process.pid)
        assert started
        leave(tmp_path, replace(Holder.here(), pid=process.pid, started=started), age=10_000)
        with pytest.raises(HeldError):
            RunLock(tmp_path).attempt()
    finally:
        process.kill()
        process.wait()


@pytest.mark.usefixtures("brief")
def test_a_lock_of_another_machine_holds_as_long_as_its_sign_comes(tmp_path: Path) -> None:
    leave(tmp_path, replace(Holder.here(), machine=ELSEWHERE, job="12"))
    lock = RunLock(tmp_path)
    assert not lock.attempt()
    os.utime(tmp_path / LOCK_FILE)
    with pytest.raises(HeldError, match="on n7, job 12, since"):
        lock.attempt()
    # It dies.
    began = time.monotonic()
    lock = RunLock(tmp_path)
    while not lock.attempt():
        time.sleep(0.05)
    assert 0.5 < time.monotonic() - began < 20
    lock.release()


def test_a_lock_of_another_machine_without_a_sign_for_long_is_taken_at_once(tmp_path: Path) -> None:
    leave(tmp_path, replace(Holder.here(), machine=ELSEWHERE), age=run_lock.STALE_SECONDS + 60)
    assert RunLock(tmp_path).held() is None
    assert taken(tmp_path)
    # The same host after a power cut: another boot, in which the number may be anybody's.
    leave(
        tmp_path, replace(Holder.here(), machine=[os.uname().nodename, "before", ""]), age=run_lock.STALE_SECONDS + 60
    )
    assert taken(tmp_path)


def test_a_requeued_job_takes_its_own_lock_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm starts it again when the earlier attempt has ended, on whichever nodes."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    leave(tmp_path, replace(Holder.here(), machine=ELSEWHERE))
    # Another step of the same attempt.
    assert not RunLock(tmp_path).attempt()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert taken(tmp_path)
    # Another job's count says nothing.
    leave(tmp_path, replace(Holder.here(), machine=ELSEWHERE, job="13", restart_count=0))
    assert not RunLock(tmp_path).attempt()


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize(
    "text", ["", '{"machine": ["n', *(pytest.param(text, marks=pytest.mark.slow) for text in ("[]", '{"pid": 1}'))]
)
def test_a_lock_that_cannot_be_read_holds_as_one_of_nobody_knows_whom(tmp_path: Path, text: str) -> None:
    """It may have been created a moment ago."""
    (tmp_path / LOCK_FILE).write_text(text)
    lock = RunLock(tmp_path)
    assert not lock.attempt()
    time.sleep(1.2)
    assert lock.attempt()
    lock.release()


def test_tasks_of_an_array_are_told_what_to_do(
    locked: RunLock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with pytest.raises(HeldError, match="give every task of the job array a run_dir of its own"):
        RunLock(tmp_path).attempt()


# What happens to it.


@pytest.mark.usefixtures("brief")
def test_of_many_that_find_a_dead_one_a_single_one_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "_end", lambda line: None)
    for _ in range(3):
        leave(tmp_path, replace(Holder.here(), pid=dead_process()))
        locks = [RunLock(tmp_path) for _ in range(8)]
        ready = threading.Barrier(len(locks))
        won: list[RunLock] = []

        def attempt(lock: RunLock, ready: threading.Barrier = ready, won: list[RunLock] = won) -> None:
            ready.wait()
            try:
                if lock.attempt():
                    won.append(lock)
            except HeldError:
                pass

        threads = [threading.Thread(target=attempt, args=(lock,)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        won[0].release()
        assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("brief")
def test_one_that_was_taken_over_hears_of_it_and_leaves_the_other_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    monkeypatch.setattr(run_lock, "_end", heard.append)
    lock = RunLock(tmp_path)
    assert lock.attempt()
    signs = [(tmp_path / LOCK_FILE).stat().st_mtime_ns]
    while len(set(signs)) < 3:
        time.sleep(0.05)
        signs.append((tmp_path / LOCK_FILE).stat().st_mtime_ns)
    # Half a file is nobody.
    (tmp_path / LOCK_FILE).write_text("{")
    time.sleep(0.3)
    assert heard == []
    leave(tmp_path, replace(Holder.here(), machine=ELSEWHERE, job="12"))
    deadline = time.monotonic() + 20
    while not heard and time.monotonic() < deadline:
        time.sleep(0.05)
    assert re.match(rf"run_dir={tmp_path}: was taken over by process \d+ on n7, job 12", heard[0])
    lock.release()
    assert json.loads((tmp_path / LOCK_FILE).read_text())["job"] == "12"


@pytest.mark.usefixtures("brief")
def test_a_lock_that_somebody_removed_is_made_again(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    assert lock.attempt()
    (tmp_path / LOCK_FILE).unlink()
    deadline = time.monotonic() + 20
    while not (tmp_path / LOCK_FILE).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert RunLock(tmp_path).held() is not None
    lock.release()


def test_the_end_of_one_that_lost_its_lock_is_a_line_and_the_status_of_a_mistake(tmp_path: Path) -> None:
    script = f"""
import json, os, time
from pathlib import Path
from vdtrain.run import lock as run_lock
run_lock.HEARTBEAT_SECONDS = 0.1
lock = run_lock.RunLock(Path({str(tmp_path)!r}))
assert lock.attempt()
other = json.loads(lock.path.read_text()) | {{"token": "other", "machine": ["n7"]}}
lock.path.write_text(json.dumps(other))
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: run_dir={tmp_path}: was taken over by process")


# Real runs.


def command(folder: Path, *own: str) -> list[str]:
    arguments = [f"stage={STAGES[0]}", *overrides(folder), phases(BATCH, (32, 4000))]
    return [str(Path(sys.executable).with_name("vdtrain")), "train", *arguments, f"run_dir={folder}/run", *own]


def wait_for_steps(folder: Path, process: subprocess.Popen[str], after: float, timeout: float = 240) -> None:
    deadline = time.monotonic() + timeout
    while not any(record["time"] > after for record in last_metrics(folder / "run", 1)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)


def seen_from_another_machine(run_dir: Path) -> str | None:
    """What a process with a host name and process numbers of its own makes of the lock; None where none can be had."""
    imports = "from pathlib import Path; from vdtrain.run.lock import RunLock"
    script = f"{imports}; print(RunLock(Path({str(run_dir)!r})).held())"
    prefix = ["unshare", "--uts", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child"]
    try:
        if subprocess.run([*prefix, "true"], capture_output=True, timeout=20).returncode:
            return None
    except OSError:
        return None
    words = [*prefix, "sh", "-c", 'hostname n7 && exec "$@"', "sh", sys.executable, "-c", script]
    return subprocess.run(words, capture_output=True, text=True, timeout=240, check=True).stdout.strip()


@pytest.mark.slow
def test_two_writers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second start, a preflight and another machine beside a run: a line each. One that was killed is succeeded."""
    write_pairs(tmp_path / "data")
    began = time.time()
    first = subprocess.Popen(command(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    processes = [first]
    try:
        wait_for_steps(tmp_path, first, began)
        in_use = f"run_dir={tmp_path}/run: is in use by process {first.pid} on {os.uname().nodename}, since "
        assert (seen_from_another_machine(tmp_path / "run") or in_use).startswith(in_use)
        # It keeps its lock, and leaves the second one the processor.
        first.send_signal(signal.SIGSTOP)
        done = subprocess.run(command(tmp_path), capture_output=True, text=True, timeout=240)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: {in_use}")
        assert preflight(command(tmp_path)[2:]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {in_use}")
        assert len(read_events(tmp_path / "run")) == 1

        first.kill()
        assert first.wait() == -signal.SIGKILL
        assert (tmp_path / "run" / LOCK_FILE).exists()
        killed = time.time()
        second = subprocess.Popen(command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(second)
        wait_for_steps(tmp_path, second, killed)
        second.terminate()
        output, errors = second.communicate(timeout=120)
        assert second.returncode == 75, errors
        assert "continues from" in output
        assert not (tmp_path / "run" / LOCK_FILE).exists()
        steps = [record["step"] for record in read_metrics(tmp_path / "run")]
        assert steps == list(range(1, len(steps) + 1))
    finally:
        for process in processes:
            process.kill()
            process.communicate()
