from __future__ import annotations

import json
import os
import resource
import subprocess
from pathlib import Path

import pytest

from tests.programs import program
from vdtrain.config.schema import TrackingConfig
from vdtrain.tracking.metrics import (
    METRICS_FILE,
    Tracker,
    last_metrics,
    read_metrics,
)
from vdtrain.tracking.reporting import log_line

# A run whose W&B process gets the SIGTERM that Slurm sends to all processes of a job.
WITHOUT_WANDB = """
import os, signal, sys
from pathlib import Path
from vdtrain.config.schema import TrackingConfig
from vdtrain.tracking.metrics import Tracker

tracker = Tracker(Path(sys.argv[1]), TrackingConfig(name="offline", mode="offline", project="test", entity=None), {}, 0)
states = [path.read_text().rpartition(")") for path in Path("/proc").glob("[0-9]*/stat")]
(service,) = [int(state[0].split()[0]) for state in states if int(state[2].split()[1]) == os.getpid()]
os.kill(service, signal.SIGTERM)
os.waitid(os.P_PID, service, os.WEXITED | os.WNOWAIT)
for step in (1, 2, 3, None):
    tracker.close() if step is None else tracker.log({"step": step, "loss": {"text-to-image": 1.0}})
"""


def tracking(mode: str) -> TrackingConfig:
    return TrackingConfig(name=mode, mode=mode, project="test", entity=None)


def record(step: int) -> dict[str, object]:
    return {"step": step, "loss": {"text-to-image": 1.0 / step}, "gradient_norm": 0.5}


def test_a_resumed_run_drops_the_records_of_lost_steps(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, tracking("disabled"), {}, step=0)
    for step in (10, 20, 30):
        tracker.log(record(step))
    tracker.close()
    tracker = Tracker(tmp_path, tracking("disabled"), {}, step=20)
    tracker.log(record(30))
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [10, 20, 30]


def test_a_line_cut_short_is_not_read(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text(json.dumps(record(10)) + "\n" + json.dumps(record(20))[:15])
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [10]


def test_lines_that_cannot_be_read_are_passed_over(tmp_path: Path) -> None:
    """And so are records of lost steps, where a full disk kept them from being taken away."""
    lines = [json.dumps(record(step)) for step in (10, 20, 30, 20)]
    lines[1:1] = ["[]", '"word"', '{"loss": {}}', '{"step": 3}', "", '{"step": 20, "lo']
    (tmp_path / METRICS_FILE).write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [10, 20]
    assert [entry["step"] for entry in last_metrics(tmp_path, 5)] == [10, 20]


def test_a_disk_that_takes_no_figures_is_a_line(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, tracking("disabled"), {}, step=0)
    tracker.log(record(10))
    (tmp_path / METRICS_FILE).write_text((tmp_path / METRICS_FILE).read_text() + '{"step": 20, "lo')
    with (tmp_path / METRICS_FILE).open("a") as torn:
        size = torn.tell()
    lines: list[str] = []
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limit[1]))
    try:
        tracker = Tracker(tmp_path, tracking("disabled"), {}, 10, lines.append)
        tracker.log(record(30))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [line.partition(": ")[0] for line in lines] == [str(tmp_path / METRICS_FILE)] * 2
    assert lines[0].endswith("cannot be written (File too large); figures of lost steps may stay in it")
    assert lines[1].endswith("the figures of step 30 were not written (File too large)")
    assert (tmp_path / METRICS_FILE).stat().st_size == size
    # The line that was cut short is ended before the next one.
    tracker.log(record(40))
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [10, 40]


def test_offline_wandb_keeps_one_run_over_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (0, 10):
        tracker = Tracker(tmp_path, tracking("offline"), {"seed": 0}, step=step)
        tracker.log(record(step + 10))
        tracker.close()
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert runs
    # offline-run-TIME-ID; a second one in the same second has a number at its end.
    assert {run.name.split("-")[3] for run in runs} == {(tmp_path / "wandb_id").read_text()}
    assert all(list(run.glob("*.wandb")) for run in runs)


def test_a_run_outlives_wandbs_process(tmp_path: Path) -> None:
    """In a process of its own, for W&B keeps its process for as long as that of the run."""
    # Where W&B's process of this one listens is among them.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    command = [program("python"), "-c", WITHOUT_WANDB, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    assert line.startswith("W&B takes no more of this run (")
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3]


def test_the_log_line_says_what_matters() -> None:
    line = log_line(
        {
            "step": 120,
            "resolution": 256,
            "samples": 245_760,
            "total_samples": 36_400_000,
            "loss": {"image-to-image": 0.25, "text-to-image": 0.5},
            "gradient_norm": 0.31,
            "learning_rate": 1e-4,
            "pairs_per_second": 812.5,
            "data_wait": 0.031,
            "time_shares": {"encode": 0.2, "backward": 0.5},
            "tflops": 361.6,
            "peak_share": 0.457,
            "memory_gb": 61.2,
            "skipped": 0,
            "replaced": 0,
        }
    )
    parts = ("step 120", "256 px", "245,760/36,400,000", "image-to-image 0.2500", "text-to-image 0.5000")
    parts += ("grad 0.310", "lr 1.00e-04", "812.5 pairs/s", "362 TFLOP/s (46%)")
    parts += ("data wait 3%, encode 20%, backward 50%", "61.20 GB")
    assert all(part in line for part in parts)
    assert "skipped" not in line
    assert "bad samples" not in line
