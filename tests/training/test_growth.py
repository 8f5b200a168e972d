"""A stage on hardware of any size: micro-batches that divide, enough open files, the launcher's two names."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.settings import phases
from tests.tiny_runs import BATCH, STAGES, TinyRuns
from vdtrain.commands.train import main as train
from vdtrain.tracking.metrics import read_metrics


def test_a_micro_batch_is_the_largest_that_divides_and_the_log_shows_it(
    tiny_runs: TinyRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS", "SLURM_JOB_ID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    losses = []
    for limit in (3, 2):
        run = tmp_path / str(limit)
        settings = [*tiny_runs.overrides, phases(BATCH, (32, 2)), f"hardware.micro_batch_size={{32: {limit}}}"]
        assert train([f"stage={STAGES[0]}", *settings, "stage.init_from=null", f"run_dir={run}"]) == 0
        shown = capsys.readouterr().out
        assert "micro-batches of each process: 2 x 2 pairs at 32 pixels" in shown
        assert "state are whole on the one process (hardware.zero_stage=1 is for several)" in shown
        losses.append([record["loss"] for record in read_metrics(run)])
    assert losses[0] == losses[1]


def test_a_run_may_open_as_many_files_as_the_system_allows(tiny_runs: TinyRuns) -> None:
    # The run is complete; the limit is raised before that is known.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(900, hard), hard))
    try:
        assert train([f"stage={STAGES[0]}", *tiny_runs.overrides]) == 0
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_both_names_of_the_training_module_start_it() -> None:
    settings = ["stage=stage1_single_flow", "model=tiny", "data=shapes", "hardware=cpu", "--cfg", "job"]
    printed = [
        subprocess.run(
            [sys.executable, "-m", *name, *settings], capture_output=True, text=True, timeout=120, check=True
        )
        for name in (["vdtrain", "train"], ["vdtrain.train"])
    ]
    assert printed[0].stdout == printed[1].stdout
    assert "stage1_single_flow" in printed[0].stdout
