"""Pictures of a metadata set into tar shards, by img2dataset in a process group that ends when this one does.

img2dataset takes any URL, leaves half-written shards behind when it is stopped, and can exit well with nothing done.
So the URLs are checked first, shards without statistics are removed before, and what came of it is counted after.
"""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import Progress

from data_pipeline.sources import Columns, metadata_files, resolve_columns
from vdtrain.config import DownloadConfig, SourceConfig

OPT_OUT = ("noai", "noimageai", "noindex", "noimageindex", "noml")
LOCAL_NAMES = ("localhost", "localhost.localdomain")


class DownloadError(RuntimeError):
    """A download that did not do what was planned; the message is one line."""


def download(name: str, source: SourceConfig, config: DownloadConfig) -> None:
    """Download one source; run again after any interruption, it does what is missing.

    Raises:
        ConfigError: metadata missing or of another schema.
        DownloadError: another download holds the folder, img2dataset failed, or shards are missing at its end.
    """
    setting = f"data.sources.{name}"
    files = metadata_files(f"{setting}.metadata", source.metadata)
    columns = resolve_columns(setting, source.schema, files[0])
    shards = Path(source.shards)
    shards.parent.mkdir(parents=True, exist_ok=True)
    with _locked(shards):
        urls = shards.with_name(shards.name + ".urls")
        rows = _checked_urls(files, columns, urls, config.allow_loopback)
        planned = -(-rows // config.samples_per_shard)
        if len(finished(shards)) < planned:
            _remove_unfinished(shards)
            _run(_command(urls, shards, columns, config), shards, planned, name, config.max_image_pixels)
        done = finished(shards)
        if len(done) < planned:
            raise DownloadError(f"{setting}: img2dataset left {planned - len(done)} of {planned} shards; run it again")
        print(f"{name}: {summary(done)}")


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


def url_problem(url: str | None, allow_loopback: bool) -> str | None:
    """Why a URL must not be fetched, or None: only http and https, and no address inside one's own network."""
    try:
        parts = urlsplit(url or "")
        host = parts.hostname
    except ValueError:
        return "malformed URL"
    if parts.scheme not in ("http", "https") or not host:
        return "not http or https"
    if host in LOCAL_NAMES:
        return None if allow_loopback else "loopback host"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    if address.is_loopback:
        return None if allow_loopback else "loopback host"
    return None if address.is_global else "private address"


def _checked_urls(files: Sequence[Path], columns: Columns, folder: Path, allow_loopback: bool) -> int:
    """Write the rows whose URL may be fetched to `folder`, file by file; their number. Written once and kept."""
    marker = folder / "checked.json"
    fingerprint = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    if marker.exists() and (earlier := json.loads(marker.read_text()))["files"] == fingerprint:
        return int(earlier["rows"])
    if folder.exists() and any(folder.iterdir()) and marker.exists():
        # img2dataset numbers its shards by row: other rows under the same numbers would mix two sets.
        raise DownloadError(f"{folder}: the metadata has changed since the download began; give another shards folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wanted = [columns.url, columns.caption, *columns.kept]
    refused: Counter[str] = Counter()
    rows = 0
    for number, file in enumerate(files):
        with pq.ParquetFile(file) as parquet:
            schema = pa.schema([parquet.schema_arrow.field(column) for column in wanted])
            with pq.ParquetWriter(folder / f"{number:05d}.parquet", schema) as writer:
                for batch in parquet.iter_batches(columns=wanted):
                    problems = [url_problem(url, allow_loopback) for url in batch.column(columns.url).to_pylist()]
                    refused.update(problem for problem in problems if problem)
                    kept = batch.filter(pa.array([problem is None for problem in problems]))
                    writer.write_batch(kept.select(wanted))
                    rows += len(kept)
    draft = marker.with_suffix(".tmp")
    draft.write_text(json.dumps({"files": fingerprint, "rows": rows, "refused": refused}))
    os.replace(draft, marker)
    if refused:
        print(f"{folder}: refused {dict(refused)}")
    return rows


def _command(urls: Path, shards: Path, columns: Columns, config: DownloadConfig) -> list[str]:
    options = {
        "url_list": urls,
        "input_format": "parquet",
        "url_col": columns.url,
        "caption_col": columns.caption,
        "save_additional_columns": json.dumps(list(columns.kept)),
        "output_format": "webdataset",
        "output_folder": shards,
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


def _run(command: Sequence[str], shards: Path, planned: int, name: str, max_pixels: int) -> None:
    """Run img2dataset to its end, showing the shards as they come; whatever happens here, its processes end."""
    log = shards.with_name(shards.name + ".log")
    environment = {
        **os.environ,
        "NO_ALBUMENTATIONS_UPDATE": "1",  # it would ask the package index at every import
        "OPENCV_IO_MAX_IMAGE_PIXELS": str(max_pixels),  # refuses a decompression bomb before decoding it
        "OMP_NUM_THREADS": "1",
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            with Progress(disable=not sys.stdout.isatty()) as progress:
                task = progress.add_task(f"download {name}", total=planned)
                while process.poll() is None:
                    progress.update(task, completed=len(finished(shards)))
                    time.sleep(0.2)
        finally:
            # Its workers outlive it when it is killed, and would go on writing.
            with _ignoring_missing():
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode != 0:
        lines = log.read_text().splitlines() or ["no output"]
        raise DownloadError(f"{name}: img2dataset ended with status {process.returncode}: {lines[-1]} (see {log})")


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


@contextmanager
def _ignoring_missing() -> Iterator[None]:
    try:
        yield
    except ProcessLookupError:
        return
