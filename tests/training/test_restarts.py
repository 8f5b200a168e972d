"""Who is requeued and who is not, by the record of real runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_runs import JOB, STEPS, TinyRuns
from vdtrain.checkpoint.folder import CHECKPOINTS, latest_by_sizes
from vdtrain.run.restarts import RECORD_FILE, REQUEUE, START, main, read_events, record_start, refusal


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def stopped(tiny_runs: TinyRuns, tmp_path: Path) -> Path:
    """The run of stage 2 as the signal left it: one start, and steps since."""
    run = tmp_path / "run"
    shutil.copytree(tiny_runs.run(2), run)
    record = run / RECORD_FILE
    record.write_text(record.read_text().splitlines()[0] + "\n")
    return run


def saved_step(run: Path) -> int:
    found, damages = latest_by_sizes(run / CHECKPOINTS)
    assert found is not None
    assert damages == []
    return found.step


def test_every_start_is_recorded(tiny_runs: TinyRuns) -> None:
    (only,) = read_events(tiny_runs.run(1))
    first, second = read_events(tiny_runs.run(2))
    assert [event.kind for event in (only, first, second)] == [START] * 3
    assert only.step == first.step == 0
    assert 0 < second.step == saved_step(tiny_runs.run(2)) < STEPS
    for event in (only, first, second):
        assert (event.job, event.total_steps, event.max_restarts, event.world_size) == (JOB, STEPS, 50, 1)
        assert len(event.hosts) == 1
    assert only.time < first.time < second.time


def test_a_run_that_made_steps_is_requeued_once(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(stopped)]) == 0
    assert [(event.kind, event.step) for event in read_events(stopped)] == [(START, 0), (REQUEUE, saved_step(stopped))]
    # The job came back and ended before the trainer began.
    assert main([str(stopped)]) == 3
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert f"no checkpoint after step {saved_step(stopped)}" in shown.err


def test_a_run_that_was_killed_before_its_first_step_is_not_requeued(tiny_runs: TinyRuns) -> None:
    reason = refusal(tiny_runs.run(2))
    assert reason is not None
    assert f"no checkpoint after step {saved_step(tiny_runs.run(2))}" in reason


def test_a_damaged_checkpoint_is_no_progress(stopped: Path) -> None:
    assert refusal(stopped) is None
    newest = stopped / CHECKPOINTS / f"step-{saved_step(stopped):09d}"
    (newest / "rank-00000-of-00001.safetensors").write_bytes(b"half of it")
    assert "no checkpoint after step 0" in str(refusal(stopped))


def test_restarts_are_capped(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(stopped, limit=1) is None
    assert "max_restarts=0; submit it again to go on from step" in str(refusal(stopped, limit=0))
    # The record's own limit, and what Slurm counts: starts that the trainer never came to are among them.
    monkeypatch.setenv("SLURM_JOB_ID", JOB)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "49")
    assert refusal(stopped) is None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "50")
    assert "restarted 50 times, and max_restarts=50" in str(refusal(stopped))
    # A job that was submitted anew begins to count anew.
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert refusal(stopped, limit=1) is None


def test_starts_of_a_job_count_where_slurm_does_not(stopped: Path) -> None:
    for _ in range(2):
        record_start(stopped, 0, STEPS, max_restarts=2, world_size=1, hosts=["n1"])
    # Without a job these are another run's starts: 2 of them, so one restart.
    assert refusal(stopped) is None
    record_start(stopped, 0, STEPS, max_restarts=2, world_size=1, hosts=["n1"])
    assert "restarted 2 times, and max_restarts=2" in str(refusal(stopped))


def test_a_complete_run_and_one_that_never_began_are_not_requeued(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    assert f"complete at step {STEPS} of {STEPS}" in str(refusal(tiny_runs.run(1)))
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert "has not begun" in str(refusal(folder))
        assert main([str(folder)]) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_line_cut_short_is_passed_over(stopped: Path) -> None:
    with (stopped / RECORD_FILE).open("ab") as file:
        file.write(b'{"kind": "start", "step": 1, "ti')
    assert len(read_events(stopped)) == 1
    record_start(stopped, 1, STEPS, max_restarts=2, world_size=2, hosts=["n1", "n2", "n1"])
    assert [event.hosts for event in read_events(stopped)][1:] == [["n1", "n2"]]


def test_the_command_needs_no_pytorch(stopped: Path) -> None:
    script = (
        "import sys; from vdtrain.run.restarts import main; status = main(sys.argv[1:]); "
        "print(status, sorted({'torch', 'deepspeed', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(stopped)], capture_output=True, text=True, timeout=120)
    assert done.stdout == "0 []\n", done.stderr
    command = [sys.executable, "-m", "vdtrain.run.restarts", str(stopped), "--limit", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith(f"not requeued: {stopped}: ")
    assert done.stderr.count("\n") == 1
