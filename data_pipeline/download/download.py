"""Downloads the images of the selected rows into tar shards with img2dataset: one part of each source at a time.

img2dataset numbers shards by row and never retries a finished shard. If it is killed, it leaves partial shards and
processes behind, and it can exit with status 0 and nothing done. So each part has a recorded plan, its shards are
checked and counted as they appear, and a supervisor ends all processes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from data_pipeline import shards
from data_pipeline.download.part import Part, PartRun, Record
from data_pipeline.failures import DownloadStats
from data_pipeline.select.selection import read_selection
from vdtrain.config.data_schema import DownloadConfig, SourceConfig
from vdtrain.config.fields import check_values
from vdtrain.errors import ConfigError, install
from vdtrain.progress import Progress

ENGINES = {"multiprocessing": (), "pyspark": ("pyspark",), "ray": ("ray",)}
POLL_SECONDS = 0.2
FIND = "import sys; from importlib.util import find_spec as f; print(*(m for m in sys.argv[1:] if f(m) is None))"


def download(sources: Mapping[str, SourceConfig], config: DownloadConfig, allow_loopback: bool) -> None:
    """Download what is missing of this task's parts.

    Raises:
        ConfigError: a setting cannot work, a source has no selected rows, the plan of existing shards has changed,
            another download holds a part, too few images arrive, or shards are missing at the end.
    """
    check(config)
    parts = own_parts(sources, config)
    check_environment(config)
    tallies = {name: DownloadStats() for name in parts}
    counts = {name: sum(part.planned for part in waiting) for name, waiting in parts.items()}
    images = sum(part.rows for waiting in parts.values() for part in waiting)
    with Progress("download", images, "images") as progress:
        for step, running in enumerate(_steps(parts, config, allow_loopback, tallies)):
            total = sum((*tallies.values(), *(run.tally for run in running)), DownloadStats())
            if step == 0:
                progress.skip(total.count)
            progress.note = f"{total.success_share:.0%} fetched, failed: {total.failures(3)}"
            progress.show(total.count)
    for name, tally in tallies.items():
        print(f"{name}: {tally} in {counts[name]:,} shards")


def check(config: DownloadConfig) -> None:
    """Raise a ConfigError for a setting that cannot work."""
    check_values(config, "data.download.")
    if config.task >= config.tasks:
        raise ConfigError(
            f"data.download.task={config.task}: tasks count from 0 to {config.tasks - 1}, by data.download.tasks"
        )
    if config.cluster is not None and config.distributor == "multiprocessing":
        raise ConfigError(
            f"data.download.cluster={config.cluster}: multiprocessing has none; take "
            "data.download.distributor=pyspark or ray"
        )


def check_environment(config: DownloadConfig) -> None:
    """Raise a ConfigError if the interpreter or the engine is missing: img2dataset would do nothing."""
    python = config.python or sys.executable
    try:
        found = subprocess.run(
            [python, "-c", FIND, "img2dataset", *ENGINES[config.distributor]],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"data.download.python={python}: cannot be run ({error}); give a Python interpreter"
        ) from error
    if lacking := found.stdout.split():
        remedy = "install it there" if config.python else f"run {install(*lacking)}"
        raise ConfigError(
            f"data.download.distributor={config.distributor}: {python} lacks {' '.join(lacking)}; {remedy}, or name "
            "another interpreter by data.download.python"
        )
    home = os.environ.get("JAVA_HOME")
    if config.distributor == "pyspark" and not (shutil.which("java") or (home and Path(home, "bin/java").exists())):
        raise ConfigError("data.download.distributor=pyspark: no java on the path; install a Java runtime, 17 or later")


def own_parts(sources: Mapping[str, SourceConfig], config: DownloadConfig) -> dict[str, list[Part]]:
    """The parts of each source that this task downloads.

    Raises:
        ConfigError: select has not finished a source, or there is no such part.
    """
    parts: dict[str, list[Part]] = {}
    place = 0  # counts over all sources, so that the tasks' shares differ by one part at most
    known: set[int] = set()
    for name, source in sources.items():
        folder = Path(source.selected)
        selection = read_selection(folder)
        if selection is None:
            raise ConfigError(
                f"data.sources.{name}.selected={folder}: no selection.json there; run `python -m data_pipeline select`"
            )
        parts[name] = []
        for number, file in enumerate(selection.files(folder)):
            wanted = config.parts is None or number in config.parts
            if wanted and place % config.tasks == config.task:
                if not file.exists():
                    raise ConfigError(
                        f"data.sources.{name}.selected: {file} is missing; run `python -m data_pipeline select` again"
                    )
                parts[name].append(Part.of(name, file, Path(source.shards), config.samples_per_shard))
            known.add(number)
            place += 1
    if config.parts is not None and set(config.parts) - known:
        raise ConfigError(f"data.download.parts={config.parts}: there are parts 0 to {max(known, default=-1)}")
    return parts


def _steps(
    parts: Mapping[str, Sequence[Part]],
    config: DownloadConfig,
    allow_loopback: bool,
    tallies: dict[str, DownloadStats],
) -> Iterator[Sequence[PartRun]]:
    """Work through the parts, one of each source at a time; yields the runs at every poll, and adds to `tallies`."""
    waiting = {name: list(own) for name, own in parts.items()}
    running: dict[str, PartRun] = {}
    try:
        while any(waiting.values()) or running:
            for name, own in waiting.items():
                while own and name not in running:
                    part = own.pop(0)
                    outcome = _outcome(part, config)
                    if outcome is not None:
                        tallies[name] += outcome
                    else:
                        running[name] = PartRun(part, config, allow_loopback)
            for name, run in list(running.items()):
                if run.step():
                    tallies[name] += run.tally
                    run.close()
                    del running[name]
            yield list(running.values())
            time.sleep(POLL_SECONDS)
    finally:
        for run in running.values():
            run.close()


def _outcome(part: Part, config: DownloadConfig) -> DownloadStats | None:
    """The tally of a part that is done, or None if shards are missing or due for a retry."""
    if not shards.finished(part.folder):
        return None
    record = Record(part, config)
    return None if record.is_low(record.lowest, config) else record.outcome
