"""Pictures of a metadata set into tar shards, by img2dataset in a process group that ends when this one does.

img2dataset takes any URL, leaves half-written shards behind when it is stopped, and can exit well with nothing done.
So the URLs are checked first, shards without statistics are removed before, and what came of it is counted after.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from data_pipeline.sources import Columns, metadata_files, resolve_columns
from data_pipeline.url_list import write_url_list
from vdtrain.data_config import DownloadConfig, SourceConfig

OPT_OUT = ("noai", "noimageai", "noindex", "noimageindex", "noml")
# Reads from a pipe that only the parent holds open: when the parent is gone, however it went, the group is killed.
END_WITH_PARENT = 'exec 3<&0; (read -r line <&3; kill -KILL 0) & exec "$@" 3<&- </dev/null'


class DownloadError(RuntimeError):
    """A download that did not do what was planned; the message is one line."""


@dataclass(frozen=True)
class Job:
    """One source's download: `planned` shards out of the parquet files in `urls`."""

    name: str
    shards: Path
    urls: Path
    columns: Columns
    planned: int


def download(sources: Mapping[str, SourceConfig], config: DownloadConfig, allow_loopback: bool) -> None:
    """Download sources beside each other; run again after any interruption, it does what is missing.

    Raises:
        ConfigError: metadata missing or of another schema, or a plan that shards were made by has changed.
        DownloadError: another download holds a folder, img2dataset failed, or shards are missing at its end.
    """
    with ExitStack() as locks:
        jobs = []
        for name, source in sources.items():
            setting = f"data.sources.{name}"
            files = metadata_files(f"{setting}.metadata", source.metadata)
            columns = resolve_columns(setting, source.schema, files[0])
            shards = Path(source.shards)
            shards.parent.mkdir(parents=True, exist_ok=True)
            locks.enter_context(_locked(shards))
            urls = shards.with_name(shards.name + ".urls")
            rows = write_url_list(urls, files, columns, config, allow_loopback, begun=bool(finished(shards)))
            jobs.append(Job(name, shards, urls, columns, planned=-(-rows // config.samples_per_shard)))
        _run([job for job in jobs if len(finished(job.shards)) < job.planned], config)
        problems = [problem for job in jobs if (problem := _problem(job))]
    if problems:
        raise DownloadError("; ".join(problems) + "; run it again")


def finished(shards: Path) -> list[Path]:
    """Statistics files of the shards that are complete."""
    return sorted(shards.glob("*_stats.json"))


def summary(statistics: Sequence[Path]) -> str:
    """Counts over shards, with the reasons of what failed."""
    reasons: Counter[str] = Counter()
    for file in statistics:
        reasons.update(json.loads(file.read_text())["status_dict"])
    total, good = sum(reasons.values()), reasons.pop("success", 0)
    failures = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common(5))
    return f"{good:,} of {total:,} pictures in {len(statistics):,} shards" + (
        f"; failed: {failures}" if failures else ""
    )


def _command(job: Job, config: DownloadConfig) -> list[str]:
    options = {
        "url_list": job.urls,
        "input_format": "parquet",
        "url_col": job.columns.url,
        "caption_col": job.columns.caption,
        "save_additional_columns": json.dumps(list(job.columns.kept)),
        "output_format": "webdataset",
        "output_folder": job.shards,
        "distributor": config.distributor,
        "processes_count": config.processes,
        "thread_count": config.threads,
        "number_sample_per_shard": config.samples_per_shard,
        "oom_shard_count": 6,
        "image_size": config.image_size,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "skip_reencode": True,
        "encode_quality": config.encode_quality,
        "min_image_size": config.min_image_size,
        "max_aspect_ratio": config.max_aspect_ratio,
        "timeout": config.timeout,
        "retries": config.retries,
        "disallowed_header_directives": json.dumps(list(OPT_OUT)),
        "enable_wandb": False,
    }
    return [sys.executable, "-m", "img2dataset.main", *(f"--{key}={value}" for key, value in options.items())]


def _run(jobs: Sequence[Job], config: DownloadConfig) -> None:
    """Run img2dataset for every job to its end, showing the shards as they come."""
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(disable=not sys.stdout.isatty()))
        running = {}
        for job in jobs:
            _remove_unfinished(job.shards)
            running[job] = stack.enter_context(_img2dataset(job, config))
        tasks = {job: progress.add_task(f"download {job.name}", total=job.planned) for job in jobs}
        while running:
            time.sleep(0.2)
            for job, process in list(running.items()):
                progress.update(tasks[job], completed=len(finished(job.shards)))
                if process.poll() is None:
                    continue
                del running[job]
                if process.returncode != 0:
                    log = _log(job)
                    lines = log.read_text().splitlines() or ["no output"]
                    raise DownloadError(
                        f"{job.name}: img2dataset ended with status {process.returncode}: {lines[-1]} (see {log})"
                    )


@contextmanager
def _img2dataset(job: Job, config: DownloadConfig) -> Iterator[subprocess.Popen[bytes]]:
    """img2dataset in a process group that ends with this block, and with this process however it ends."""
    environment = {
        **os.environ,
        "NO_ALBUMENTATIONS_UPDATE": "1",  # it would ask the package index at every import
        "OPENCV_IO_MAX_IMAGE_PIXELS": str(config.max_image_pixels),  # refuses a decompression bomb before decoding it
        "OMP_NUM_THREADS": "1",
    }
    command = ["sh", "-c", END_WITH_PARENT, "sh", *_command(job, config)]
    with _log(job).open("w") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            # Its workers outlive it when it is killed, and would go on writing.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def _log(job: Job) -> Path:
    return job.shards.with_name(job.shards.name + ".log")


def _problem(job: Job) -> str | None:
    """What a job left to be done again, or None after saying what it made. Shards without one picture are removed."""
    done = finished(job.shards)
    if len(done) < job.planned:
        return f"{job.shards}: {job.planned - len(done)} of {job.planned} shards are missing (see {_log(job)})"
    # A server or a network that was away fails every picture, and img2dataset would never try such a shard again.
    empty = [file for file in done if json.loads(file.read_text())["successes"] == 0]
    if empty:
        reasons = summary(empty)
        for file in empty:
            file.unlink()
        _remove_unfinished(job.shards)
        return f"{job.shards}: {reasons}; see that the addresses can be reached"
    print(f"{job.name}: {summary(done)}")
    return None


def _remove_unfinished(shards: Path) -> None:
    """Remove what an interrupted run left of shards that have no statistics yet."""
    done = {file.name.removesuffix("_stats.json") for file in finished(shards)}
    for file in [*shards.glob("*.tar"), *shards.glob("*.parquet")]:
        if file.stem not in done:
            file.unlink()


@contextmanager
def _locked(shards: Path) -> Iterator[None]:
    with shards.with_name(shards.name + ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DownloadError(f"{shards}: another download is writing there; wait for it or stop it") from error
        yield
