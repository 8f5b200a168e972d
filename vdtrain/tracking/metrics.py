"""A run's figures: always a JSON-lines file in the run folder; W&B and TensorBoard if configured. See docs/metrics.md.

A line of the file has a "step". It is a record with the "loss" of each flow, or has "samples" and is an image with its
path, or the figures of a validation.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from vdtrain.config.schema import TrackingConfig
from vdtrain.files import ABSENT, append_line, atomic_write, opened

Line = Mapping[str, Any]
METRICS_FILE = "metrics.jsonl"
# Figures of a record that others than the tracker read; each may be absent. None is infinite, or NaN.
FIGURES = (
    *("phase", "resolution", "samples", "total_samples", "pairs_per_second", "data_wait"),
    *("skipped", "replaced", "failed_saves", "time"),
)
MOST = 1e18
# All processes wait for the one that opens the run on W&B, so an outage may delay them only this long.
INIT_SECONDS = 20.0
# Enough for a hundred records.
TAIL_BYTES = 1 << 18


class Sink(Protocol):
    """Where a tracker sends lines. A failure is one warning, and the sink then takes nothing more."""

    def send(self, lines: Sequence[Line]) -> None:
        """Send lines, oldest first."""

    def alert(self, title: str, text: str, line: Line) -> None:
        """Send an alert that belongs to a line."""

    def close(self) -> None:
        """Send what is left."""


class Tracker:
    """Writes a run's lines, on rank 0 only. Its failures never end a run.

    Args:
        run_dir: holds metrics.jsonl, the W&B run id and the offline W&B files, and TensorBoard's files.
        step: the step that the run continues from; later lines, of lost work, are dropped.
        warn: receives a line on figures that could not be written or sent.
        wandb_seconds: time limit for W&B to open the run.
        batch: samples of a step.
        init_from: the run that this one starts from; both are in one group.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrackingConfig,
        run_config: Mapping[str, Any],
        step: int,
        warn: Callable[[str], None] = print,
        wandb_seconds: float = INIT_SECONDS,
        batch: int = 1,
        init_from: str | None = None,
    ) -> None:
        self.path, self._warn, self._batch = run_dir / METRICS_FILE, warn, batch
        kept: list[dict[str, Any]] = []
        try:
            kept = [line for line in read_lines(run_dir) if line["step"] <= step]
            self._keep(kept)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            warn(f"{self.path}: cannot be written ({reason}); figures of lost steps may stay in it")
        self._kept = {(_kind(line), line["step"]) for line in kept}
        self._last: Line = next((line for line in reversed(kept) if _is_record(line)), {"step": step})
        for line in kept:
            line.setdefault("samples", line["step"] * batch)
        self._sinks: list[Sink] = []
        self.on_wandb = False
        if config.mode != "disabled":
            from vdtrain.tracking.wandb_run import WandbRun

            run = WandbRun(self.path, config, run_config, kept, warn, wandb_seconds, init_from)
            self.on_wandb = run.accepted
            self._sinks.append(run)
        if config.tensorboard:
            from vdtrain.tracking.tensorboard import TensorBoard

            self._sinks.append(TensorBoard(run_dir, self.path, run_config, kept, step * batch, warn))

    def log(self, record: Line) -> None:
        """Append a line with at least "step"; samples and time are added. A record has "loss", too."""
        if (_kind(record), record["step"]) in self._kept:
            # A start at this step repeats what belongs to it.
            return
        line = {**record, "time": round(time.time(), 3)}
        try:
            append_line(self.path, json.dumps(line))
        except OSError as error:
            self._warn(f"{self.path}: the figures of step {record['step']} were not written ({error.strerror})")
        for sink in self._sinks:
            sink.send([{"samples": record["step"] * self._batch, **line}])
        if "loss" in line:
            skipped = line.get("skipped", 0) - self._last.get("skipped", 0)
            self._last = line
            if skipped > 0:
                self.alert("steps were skipped", f"{skipped} up to step {line['step']}: loss or gradient not finite")

    def log_image(self, name: str, path: Path, samples: int) -> None:
        """Log an image file that stays where it is.

        Args:
            name: of the series of images, such as "samples/text-to-image".
        """
        relative = os.path.relpath(path, self.path.parent)
        self.log({"step": samples // self._batch, "samples": samples, "image": name, "path": relative})

    def alert(self, title: str, text: str) -> None:
        """Alert who watches the run from afar."""
        for sink in self._sinks:
            sink.alert(title, text, {"samples": self._last["step"] * self._batch, **self._last})

    def close(self) -> None:
        """Send what is left, and end the trackers."""
        for sink in self._sinks:
            sink.close()

    def _keep(self, lines: Iterable[Line]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        if not self.path.exists() or self.path.read_bytes() != text.encode():
            with atomic_write(self.path) as draft:
                draft.write_text(text, encoding="utf-8")


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All whole records of a run, by step; see `last_metrics`."""
    return [line for line in read_lines(run_dir) if _is_record(line)]


def read_lines(run_dir: Path) -> list[dict[str, Any]]:
    """All whole lines of a run, records and others, by step."""
    try:
        with opened(run_dir / METRICS_FILE) as file:
            return _lines(file.read().decode(errors="replace").splitlines())
    except FileNotFoundError:
        return []


def last_metrics(run_dir: Path, count: int) -> list[dict[str, Any]]:
    """The last `count` whole records of a run, oldest first, read from the end of the file.

    Truncated lines are skipped, and so are records of steps that the run repeated.
    """
    try:
        with opened(run_dir / METRICS_FILE) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except ValueError:
        return []
    except OSError as error:
        if error.errno in ABSENT | {errno.ELOOP}:
            return []
        raise
    return [line for line in _lines(lines[size > TAIL_BYTES :]) if _is_record(line)][-count:]


def flat(line: Line) -> dict[str, float]:
    """The numbers of a line under the names that trackers show (docs/metrics.md).

    {"learning_rates": {"global": 1e-4}} is {"learning_rate/global": 1e-4}.

    A table loses the s at its end, so that its parts stand below the figure that they are parts of.
    """
    found: dict[str, float] = {}
    for key, value in line.items():
        if key != "time":
            table = isinstance(value, Mapping) and key != "loss"
            found |= _named(key.removesuffix("s") if table else key, value)
    return found


def _named(name: str, value: Any) -> dict[str, float]:
    if isinstance(value, Mapping):
        parts = (_named(f"{name}/{key}", each) for key, each in value.items())
        return {key: each for part in parts for key, each in part.items()}
    return {name: value} if isinstance(value, int | float) else {}


def _kind(line: Line) -> str:
    """What a step has one line of."""
    if "image" in line:
        return f"image {line['image']}"
    return "record" if "loss" in line else "validation"


def _is_record(line: Line) -> bool:
    if not isinstance(line.get("loss"), dict):
        return False
    values = [line["step"], *(line.get(name, 0) for name in FIGURES), *line["loss"].values()]
    return all(isinstance(value, int | float) and abs(value) < MOST for value in values)


def _lines(texts: list[str]) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for text in texts:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if not isinstance(line, dict) or type(line.get("step")) is not int or abs(line["step"]) >= MOST:
            continue
        if not (_is_record(line) if "loss" in line else type(line.get("samples")) is int):
            continue
        while lines and lines[-1]["step"] > line["step"]:
            lines.pop()
        place = len(lines)
        while place and lines[place - 1]["step"] == line["step"]:
            place -= 1
            if _kind(lines[place]) == _kind(line):
                del lines[place]
        lines.append(line)
    return lines
