"""A run's figures: always a JSON-lines file in the run folder, and Weights & Biases if configured."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from vdtrain.config.schema import TrackingConfig
from vdtrain.files import append_line, atomic_write
from vdtrain.run.wandb_run import INIT_SECONDS, start_run

METRICS_FILE = "metrics.jsonl"
# Enough for some hundred records.
TAIL_BYTES = 1 << 17


class Tracker:
    """Writes one record per log interval, on rank 0 only. Its failures never end a run.

    Args:
        run_dir: holds metrics.jsonl, the W&B run id and the offline W&B files.
        step: the step that the run continues from; later records, of lost work, are dropped.
        warn: receives a line on figures that could not be written or sent.
        wandb_seconds: time limit for W&B to open the run.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrackingConfig,
        run_config: Mapping[str, Any],
        step: int,
        warn: Callable[[str], None] = print,
        wandb_seconds: float = INIT_SECONDS,
    ) -> None:
        self.path, self._warn = run_dir / METRICS_FILE, warn
        kept = [record for record in read_metrics(run_dir) if record["step"] <= step]
        try:
            self._keep(kept)
        except OSError as error:
            warn(f"{self.path}: cannot be written ({error.strerror}); figures of lost steps may stay in it")
        self._wandb = None
        if config.mode != "disabled":
            self._wandb = start_run(run_dir, self.path, config, run_config, kept, warn, wandb_seconds)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a record with at least "step" and "loss"; the time is added."""
        record = {**record, "time": round(time.time(), 3)}
        try:
            append_line(self.path, json.dumps(record))
        except OSError as error:
            self._warn(f"{self.path}: the figures of step {record['step']} were not written ({error.strerror})")
        if self._wandb is not None:
            self._wandb.send([record])

    def close(self) -> None:
        """End the W&B run."""
        if self._wandb is not None:
            self._wandb.close()

    def _keep(self, records: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(record) + "\n" for record in records)
        if not self.path.exists() or self.path.read_bytes() != text.encode():
            with atomic_write(self.path) as draft:
                draft.write_text(text, encoding="utf-8")


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All whole records of a run, by step; see `last_metrics`."""
    path = run_dir / METRICS_FILE
    return _records(path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else [])


def last_metrics(run_dir: Path, count: int) -> list[dict[str, Any]]:
    """The last `count` whole records of a run, oldest first, read from the end of the file.

    Truncated lines are skipped, and so are records of steps that the run repeated.
    """
    path = run_dir / METRICS_FILE
    if not path.exists():
        return []
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return _records(lines[size > TAIL_BYTES :])[-count:]


def _records(lines: list[str]) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(record, dict) or not isinstance(record.get("step"), int) or "loss" not in record:
            continue
        while records and records[-1]["step"] >= record["step"]:
            records.pop()
        records.append(record)
    return records
