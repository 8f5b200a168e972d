"""Where a run's figures go: a JSON-lines file in the run folder always, Weights & Biases by configuration."""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vdtrain.config import TrackingConfig

METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb_id"
WANDB_URL_FILE = "wandb_url"
# Enough for some hundred records.
TAIL_BYTES = 1 << 17


class TrackerError(RuntimeError):
    """W&B is gone; the run goes on without it."""


class Tracker:
    """Writes one record per log interval. Only rank 0 has one.

    Args:
        run_dir: holds metrics.jsonl, the W&B run id and the offline W&B files.
        step: the step that the run continues from; later records, of work that was lost, are dropped.
    """

    def __init__(self, run_dir: Path, config: TrackingConfig, run_config: Mapping[str, Any], step: int) -> None:
        self.path = run_dir / METRICS_FILE
        kept = [record for record in read_metrics(run_dir) if record["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(temporary, self.path)
        self._wandb = None
        if config.mode != "disabled":
            self._wandb = self._start_wandb(run_dir, config, run_config)

    @staticmethod
    def _start_wandb(run_dir: Path, config: TrackingConfig, run_config: Mapping[str, Any]) -> Any:
        import wandb

        id_file = run_dir / WANDB_ID_FILE
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        run = wandb.init(
            project=config.project,
            entity=config.entity,
            mode=config.mode,  # type: ignore[arg-type]
            dir=str(run_dir),
            id=id_file.read_text().strip(),
            name=run_dir.name,
            resume="allow",
            config=dict(run_config),
            settings=wandb.Settings(silent=True, console="off"),
        )
        if config.mode == "online" and run.url:
            (run_dir / WANDB_URL_FILE).write_text(run.url + "\n")
        return run

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a record with at least "step" and "loss", and the time of day.

        Raises:
            OSError: it cannot be written; nothing of it is left in the file.
            TrackerError: W&B did not take it; it is in the file, and W&B gets no more.
        """
        size = self.path.stat().st_size
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({**record, "time": round(time.time(), 3)}) + "\n")
        except OSError:
            os.truncate(self.path, size)
            raise
        if self._wandb is not None:
            flat = {f"loss/{name}": value for name, value in record["loss"].items()}
            flat |= {key: value for key, value in record.items() if key != "loss"}
            with self._wandb_may_be_gone():
                self._wandb.log(flat, step=record["step"])

    def close(self) -> None:
        """End the W&B run.

        Raises:
            TrackerError: it could not be ended in order.
        """
        if self._wandb is not None:
            with self._wandb_may_be_gone():
                self._wandb.finish()

    @contextlib.contextmanager
    def _wandb_may_be_gone(self) -> Iterator[None]:
        """W&B's own process ends at a SIGTERM to all processes of a job, amid the last steps of a run that saves."""
        import wandb

        try:
            yield
        except Exception as error:
            self._wandb = None
            # It would try again, and say so, when this process ends.
            with contextlib.suppress(Exception):
                wandb.teardown()
            raise TrackerError(f"W&B takes no more of this run ({error}); its figures are in {self.path}") from error


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All whole records of a run; lines cut short by a kill are left out."""
    path = run_dir / METRICS_FILE
    return _records(path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else [])


def last_metrics(run_dir: Path, count: int) -> list[dict[str, Any]]:
    """The last whole records of a run, oldest first, without reading all of them."""
    path = run_dir / METRICS_FILE
    if not path.exists():
        return []
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return _records(lines[size > TAIL_BYTES :])[-count:]


def _records(lines: list[str]) -> list[dict[str, Any]]:
    records = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records
