"""A run's record of its starts, and the decision whether its batch job should be requeued.

    python -m vdtrain.run.restarts RUN_DIR [--limit N]     # exit status 0: requeue; 3: do not, with the reason

Needs no PyTorch: a batch script asks between a signal and the end of its time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vdtrain.checkpoint.folder import CHECKPOINTS, latest_by_sizes
from vdtrain.config.compose import ConfigError
from vdtrain.errors import unreadable, unwritable
from vdtrain.files import append_line, opened, sync
from vdtrain.run.ranks import number
from vdtrain.run.signals import quietly

RECORD_FILE = "restarts.jsonl"
START, REQUEUE = "start", "requeue"
REFUSED = 3
# Of a number in the record.
MOST = 1e18


@dataclass(frozen=True)
class Event:
    """A line of the record: a start of the trainer, or a decision to requeue its job.

    Attributes:
        step: of the checkpoint that the start, or the next start, continues from; 0 at the beginning of a stage.
        time: seconds since 1970.
        job: Slurm's job id, which survives a requeue; None outside Slurm.
        total_steps, max_restarts, hosts, world_size: of a start only.
        changed: settings that differ from the start before, each with what it was and what it is.
        environment: commit, versions and device of a start.
    """

    kind: str
    step: int
    time: float = field(default_factory=time.time)
    job: str | None = None
    restart_count: int = 0
    total_steps: int = 0
    max_restarts: int = 0
    world_size: int = 0
    hosts: list[str] = field(default_factory=list)
    changed: dict[str, list[Any]] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)


def slurm_job() -> tuple[str | None, int]:
    """The Slurm job of this process, and how often Slurm has restarted it.

    Raises:
        ConfigError: Slurm's count is not a number.
    """
    return os.environ.get("SLURM_JOB_ID"), number("SLURM_RESTART_COUNT")


def record_start(
    run_dir: Path,
    step: int,
    total_steps: int,
    max_restarts: int,
    world_size: int,
    hosts: Sequence[str],
    changed: Mapping[str, list[Any]] | None = None,
    environment: Mapping[str, Any] | None = None,
) -> None:
    """Record that the trainer starts at `step`; one process of the run calls it.

    Raises:
        OSError: it cannot be written.
    """
    _append(
        run_dir,
        START,
        step,
        total_steps=total_steps,
        max_restarts=max_restarts,
        world_size=world_size,
        hosts=list(dict.fromkeys(hosts)),
        changed=dict(changed or {}),
        environment=dict(environment or {}),
    )


def restarts(events: Sequence[Event], job: str | None = None, count: int = 0) -> int:
    """How often a job (outside Slurm: the run) has been restarted.

    Args:
        count: Slurm's own count for the asking job.
    """
    own = [event for event in events if event.job == job]
    starts = sum(event.kind == START for event in own)
    requeued = sum(event.kind == REQUEUE for event in own)
    return max(count, starts - 1, requeued, *(event.restart_count for event in own), 0)


def refusal(run_dir: Path, limit: int | None = None) -> str | None:
    """A line on why the job must not be restarted; None if it may be.

    It must not if the stage is complete, if the limit is reached, or if no later checkpoint was published since the
    last start or requeue. Such a run would crash again and again.

    Args:
        limit: of restarts; by default max_restarts of the run's last start.
    """
    events = read_events(run_dir)
    starts = [event for event in events if event.kind == START]
    if not starts:
        return f"{run_dir}: the trainer has not begun there, so it would not the next time; see the job's log"
    if limit is None:
        limit = starts[-1].max_restarts
    latest, _ = latest_by_sizes(run_dir / CHECKPOINTS)
    step, total = 0 if latest is None else latest.step, starts[-1].total_steps
    if step >= total:
        return f"{run_dir}: complete at step {step} of {total}"
    job, count = slurm_job()
    done = restarts(events, job or starts[-1].job, count)
    if done >= limit:
        return f"{run_dir}: restarted {done} times, and max_restarts={limit}; submit it again to go on from step {step}"
    if step <= events[-1].step:
        return (
            f"{run_dir}: no checkpoint after step {events[-1].step}, where it was last started; see the job's log, and "
            "lower checkpoint.every_steps if it ran until it was stopped"
        )
    return None


def note_requeue(run_dir: Path) -> None:
    """Record that the job is requeued, and the step that it will continue from.

    Raises:
        OSError: it cannot be written.
    """
    latest, _ = latest_by_sizes(run_dir / CHECKPOINTS)
    _append(run_dir, REQUEUE, 0 if latest is None else latest.step)


def _append(run_dir: Path, kind: str, step: int, **about: Any) -> None:
    path, (job, count) = run_dir / RECORD_FILE, slurm_job()
    event = Event(kind, step, job=job, restart_count=count, **about)
    new = not path.exists()
    append_line(path, json.dumps(asdict(event)), durable=True)
    if new:
        sync(run_dir)


def read_events(run_dir: Path) -> list[Event]:
    """The record, oldest first; truncated lines are skipped."""
    events: list[Event] = []
    try:
        with opened(run_dir / RECORD_FILE) as file:
            lines = file.read().decode(errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return events
    known = {each.name for each in fields(Event)}
    for line in lines:
        try:
            values: dict[str, Any] = json.loads(line)
            event = Event(**{key: value for key, value in values.items() if key in known})
        except (ValueError, TypeError, AttributeError, RecursionError):
            continue
        counts = (event.step, event.restart_count, event.total_steps, event.max_restarts, event.world_size)
        numbers = all(isinstance(each, int | float) and 0 <= each < MOST for each in (*counts, event.time))
        tables = isinstance(event.changed, dict) and isinstance(event.environment, dict)
        pairs = tables and all(isinstance(each, list) and len(each) == 2 for each in event.changed.values())
        if numbers and pairs and isinstance(event.hosts, list):
            events.append(replace(event, hosts=[str(host) for host in event.hosts]))
    return events


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m vdtrain.run.restarts`."""
    parser = argparse.ArgumentParser(
        prog="python -m vdtrain.run.restarts",
        description=f"Is the job of a run to be requeued? Exit status 0: yes, and it is noted; {REFUSED}: no.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--limit", type=int, metavar="N", help="of restarts (default: the run's max_restarts)")
    arguments = parser.parse_args(argv)
    record = arguments.run_dir / RECORD_FILE
    try:
        reason = refusal(arguments.run_dir, arguments.limit)
    except ConfigError as error:
        reason = str(error)
    except OSError as error:
        reason = f"{record}: {unreadable(error, record, 'submit the job again')}"
    if reason is None:
        try:
            note_requeue(arguments.run_dir)
        except OSError as error:
            reason = f"{record}: {unwritable(error, record, 'submit the job again')}"
    if reason is not None:
        print(f"not requeued: {reason}", file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(quietly(main))
