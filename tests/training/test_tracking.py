from __future__ import annotations

import json
from pathlib import Path

import pytest

from vdtrain.config import TrackingConfig
from vdtrain.training.meters import log_line
from vdtrain.training.tracking import METRICS_FILE, Tracker, read_metrics


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


def test_offline_wandb_keeps_one_run_over_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (0, 10):
        tracker = Tracker(tmp_path, tracking("offline"), {"seed": 0}, step=step)
        tracker.log(record(step + 10))
        tracker.close()
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert runs
    assert {run.name.rsplit("-", 1)[1] for run in runs} == {(tmp_path / "wandb_id").read_text()}
    assert all(list(run.glob("*.wandb")) for run in runs)


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
            "memory_gb": 61.2,
            "skipped": 0,
            "replaced": 0,
        }
    )
    parts = ("step 120", "256 px", "245,760/36,400,000", "image-to-image 0.2500", "text-to-image 0.5000")
    parts += ("grad 0.310", "lr 1.00e-04", "812.5 pairs/s", "data wait 3%", "61.20 GB")
    assert all(part in line for part in parts)
    assert "skipped" not in line
    assert "bad samples" not in line
