"""Show the progress of a run from the files in its folder, without PyTorch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from omegaconf import DictConfig

from vdtrain.config.command import run_command
from vdtrain.config.command_line import PlainArguments
from vdtrain.config.command_schema import StatusConfig
from vdtrain.errors import ConfigError, unreadable
from vdtrain.tracking.summary import RunSummary, age, ago, find_runs, summarise

USAGE = """\
Usage: vdtrain status [RUN_DIR] [SETTING=VALUE ...]

Show the progress of a run: phase, samples done, speed, time left, losses, last checkpoint, restarts, failures, and the
place of its figures. RUN_DIR is a run folder, or a folder of several runs, which get one line each. Everything is read
from the files there within a second, without GPU or PyTorch, so it works on a login node too.

Examples:
  vdtrain status
  vdtrain status runs/stage3_four_flow
  vdtrain status /scratch/runs watch=30
"""


def status(folder: Path) -> str:
    """The text about one run, or one line about each of several.

    Raises:
        ConfigError: the folder holds no run.
    """
    if not folder.exists():
        raise ConfigError(f"run_dir={folder}: does not exist; give the folder of a run, or of several runs")
    runs = find_runs(folder)
    if not runs:
        raise ConfigError(f"run_dir={folder}: holds no run and no folders of runs; give another folder")
    if runs == [folder]:
        return "\n".join(f"{name:<12}{text}" for name, text in _lines(summarise(folder)))
    rows = [_row(summarise(run)) for run in runs]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _lines(run: RunSummary) -> Iterator[tuple[str, str]]:
    record, checkpoint = run.record, run.checkpoint
    yield "stage", f"{run.stage}, phase {run.phase} of {run.phases} ({run.resolution} px)"
    yield "samples", f"{_share(run)}, step {run.step:,} of {run.total_steps:,}"
    if run.pairs_per_second:
        yield "speed", f"{run.pairs_per_second:,.1f} pairs/s, waiting for data {record.get('data_wait', 0):.0%}"
    yield "time left", _time_left(run)
    if record:
        losses = " | ".join(f"{name} {loss:.4f}" for name, loss in record["loss"].items())
        yield "losses", f"{losses} (step {record['step']:,})"
    for line in run.damages:
        yield "damaged", line
    if checkpoint is None:
        yield "checkpoint", "none yet"
    else:
        size = f"{checkpoint.bytes / 1e9:,.2f} GB"
        yield "checkpoint", f"step {checkpoint.step:,}, {ago(checkpoint.written)}, whole by its sizes, {size}"
        yield "", str(checkpoint.path)
    if run.starts:
        last = run.starts[-1]
        hosts = ", ".join(last.hosts[:4]) + (f" and {len(last.hosts) - 4} more" if len(last.hosts) > 4 else "")
        job = f", job {last.job}" if last.job else ""
        began = f"started {ago(last.time)} at step {last.step:,}"
        yield "restarts", f"{run.restarts}, last {began}" if run.restarts else f"none, {began}"
        yield "processes", f"{last.world_size} on {hosts}{job}"
    for name in ("skipped", "replaced", "failed_saves"):
        if record.get(name):
            texts = {"skipped": "skipped steps", "replaced": "bad samples replaced", "failed_saves": "failed saves"}
            yield "trouble", f"{record[name]:,} {texts[name]}"
    if run.dumps:
        yield "trouble", f"ended by an error on {len(run.dumps)} processes, see {run.dumps[0].parent}"
    if run.tracked is not None:
        yield "W&B", run.tracked
    yield "last line", "none yet" if run.last_log_time is None else ago(run.last_log_time)


def _row(run: RunSummary) -> list[str]:
    checkpoint = "no checkpoint" if run.checkpoint is None else f"checkpoint {run.checkpoint.step:,}"
    return [
        run.folder.name,
        _share(run),
        f"{run.pairs_per_second:,.1f} pairs/s" if run.pairs_per_second and not run.complete else "",
        _time_left(run),
        checkpoint,
        "no line yet" if run.last_log_time is None else f"last line {ago(run.last_log_time)}",
    ]


def _share(run: RunSummary) -> str:
    share = run.samples / run.total_samples if run.total_samples else 0.0
    return f"{run.samples:,} of {run.total_samples:,} ({share:.0%})"


def _time_left(run: RunSummary) -> str:
    if run.complete:
        return "complete"
    left = run.seconds_left
    if left is None:
        return "not known yet"
    # Larger images take longer; how much longer is not known before.
    return f"more than {age(left)}" if run.larger_phases else age(left)


def _watch(folder: Path, seconds: float) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    if not console.is_terminal:
        raise ConfigError(f"watch={seconds:g}: needs a terminal; leave it out")
    while True:
        text = status(folder)
        console.clear()
        console.print(text, markup=False)
        time.sleep(seconds)


def main(arguments: Sequence[str]) -> int:
    """Run `vdtrain status`; returns its exit status."""

    def action(config: StatusConfig, raw_config: DictConfig) -> int:
        folder = Path(config.run_dir)
        try:
            if config.watch is None:
                print(status(folder))
            else:
                _watch(folder, config.watch)
        except OSError as error:
            raise ConfigError(f"run_dir={folder}: {unreadable(error, folder, 'give another folder')}") from error
        return 0

    return run_command(USAGE, "status", StatusConfig, action, arguments, plain=PlainArguments(("run_dir",)))
