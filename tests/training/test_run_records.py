"""A folder whose records tell of checkpoints that are not to be seen is not begun anew; one that never had any is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny_runs import STAGES, STEPS, TinyRuns
from vdtrain.checkpoint.folder import CHECKPOINTS, LATEST_FILE, candidates
from vdtrain.commands.preflight import main as preflight
from vdtrain.commands.train import main as train
from vdtrain.config.schema import TrackingConfig
from vdtrain.run.restarts import RECORD_FILE
from vdtrain.tracking.metrics import METRICS_FILE, Tracker, read_metrics
from vdtrain.tracking.summary import SAVED_FILE, lost_checkpoints, note_saved


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS", "SLURM_JOB_ID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(tiny_runs: TinyRuns, tmp_path: Path) -> Path:
    """A copy of stage 1's run, which is complete."""
    return Path(shutil.copytree(tiny_runs.run(1), tmp_path / "run"))


def unmounted(run: Path) -> str:
    """The checkpoints are on another disk, by a link."""
    shutil.rmtree(run / CHECKPOINTS)
    (run / CHECKPOINTS).symlink_to("/scratch/of/last/week")
    return "is a link to /scratch/of/last/week, which is not there"


def removed(run: Path) -> str:
    shutil.rmtree(run / CHECKPOINTS)
    return f"{run}/{CHECKPOINTS} is not there"


def emptied(run: Path) -> str:
    removed(run)
    (run / CHECKPOINTS).mkdir()
    return f"{run}/{CHECKPOINTS} holds no whole one; mount"


def all_damaged(run: Path) -> str:
    for checkpoint in candidates(run / CHECKPOINTS):
        (checkpoint / "rank-00000-of-00001.safetensors").write_bytes(b"half")
    return "4 bytes instead of"


@pytest.mark.parametrize("lose", [unmounted, removed, emptied, all_damaged])
def test_what_is_not_to_be_seen_is_not_begun_anew(
    tiny_runs: TinyRuns, run: Path, lose: Callable[[Path], str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (run / SAVED_FILE).is_file()
    expected = lose(run)
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    arguments = [f"stage={STAGES[0]}", *tiny_runs.overrides, f"run_dir={run}"]
    assert train(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: run_dir={run}: {SAVED_FILE} tells of checkpoints up to step {STEPS}, and ")
    assert expected in line
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    assert preflight(arguments) == 2
    assert line in capsys.readouterr().err.splitlines()
    # The remedy.
    shutil.rmtree(run)
    assert preflight(arguments) == 0


def test_runs_of_a_version_without_that_record_are_told_by_the_others(run: Path) -> None:
    shutil.rmtree(run / CHECKPOINTS)
    (run / SAVED_FILE).unlink()
    # Saved every two steps: at step 5 the save of step 2 was over.
    assert f"{METRICS_FILE} tells of checkpoints up to step {STEPS}" in str(lost_checkpoints(run, 1000))
    # Its own configuration counts; without one, the present.
    (run / "config.yaml").unlink()
    assert f"up to step {STEPS}" in str(lost_checkpoints(run, 2))
    assert lost_checkpoints(run, 3) is None
    with (run / RECORD_FILE).open("a") as file:
        file.write(json.dumps({"kind": "requeue", "step": 4}) + "\n")
    assert f"{RECORD_FILE} tells of checkpoints up to step 4" in str(lost_checkpoints(run, 3))


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(run: Path) -> None:
    shutil.rmtree(run / CHECKPOINTS)
    (run / SAVED_FILE).unlink()
    records = read_metrics(run)
    # Of two saves, none came to its end: a full disk.
    text = "".join(json.dumps({**record, "failed_saves": record["step"] // 2}) + "\n" for record in records)
    (run / METRICS_FILE).write_text(text)
    assert lost_checkpoints(run, 2) is None
    # Amid the first.
    (run / METRICS_FILE).write_text("".join(json.dumps(record) + "\n" for record in records[:3]))
    assert lost_checkpoints(run, 2) is None
    assert lost_checkpoints(run / "nowhere", 2) is None


def test_a_pointer_to_what_is_not_there_is_a_record(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINTS).mkdir()
    (tmp_path / CHECKPOINTS / LATEST_FILE).write_text("step-000000012\n")
    assert "up to step 12" in str(lost_checkpoints(tmp_path, 2))


def test_a_damaged_note_is_a_note(tmp_path: Path) -> None:
    note_saved(tmp_path, 7)
    assert "up to step 7" in str(lost_checkpoints(tmp_path, 2))
    (tmp_path / SAVED_FILE).write_text("")
    assert SAVED_FILE in str(lost_checkpoints(tmp_path, 2))


def test_figures_are_cut_back_to_the_step_that_a_run_goes_on_from_and_no_further(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": {}}) for step in range(1, 7)]
    # A machine that went down left half a line, and the run went on.
    lines.insert(2, '{"step": 3, "lo')
    (tmp_path / METRICS_FILE).write_text("\n".join(lines) + "\n")
    Tracker(tmp_path, TrackingConfig("none", "disabled", "", None), {}, step=5).close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
