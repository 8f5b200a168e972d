"""Tar shards to a manifest: every new shard is read once and checked, and its complete samples are listed.

A damaged shard is reported and left out. A shard that is listed already is not read again, so that a run after an
interruption, or with new shards, reads only what is missing.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from data_pipeline.index.builder import ManifestBuilder, Task
from data_pipeline.index.repeated import repeated_uids
from data_pipeline.index.shard_reading import ShardError, ShardScan, read_shard, statistics_file
from data_pipeline.workers import LOCK_SECONDS, workers
from vdtrain.data.manifest import Manifest, read_shards
from vdtrain.files import LockedError, locked
from vdtrain.progress import Progress

logger = logging.getLogger(__name__)

# Shards whose samples share a file. An interruption loses at most so many.
FILE_SHARDS = 100
# Names in a line about many shards.
NAMED = 5


def index(
    sources: Mapping[str, Path],
    manifest: Path,
    *,
    processes: int = 1,
    decode: bool = False,
    file_shards: int = FILE_SHARDS,
) -> None:
    """Update a manifest to the shards in the sources' folders; the number of processes does not change the result.

    Args:
        decode: decode every image; shards that were indexed without decoding are read again.
        file_shards: shards whose samples share a file; the manifest is written after each such file.

    Raises:
        ShardError: no source has a shard, another run is at work, or shards are damaged (the manifest then lists all
            the others).
        ManifestError: the existing manifest cannot be read.
    """
    _check_folders(sources)
    lock = manifest.with_name(manifest.name + ".lock")
    try:
        with locked(lock, LOCK_SECONDS):
            _index(sources, manifest, processes, decode, file_shards, lock)
    except LockedError as error:
        raise ShardError(
            f"data.manifest={manifest}: another index is writing there (process {error.holder}); wait for it or stop it"
        ) from error


def _index(
    sources: Mapping[str, Path], manifest: Path, processes: int, decode: bool, file_shards: int, lock: Path
) -> None:
    before = read_shards(manifest)
    tasks, unfinished = _find(sources, manifest, decode)
    _check_found(sources, manifest, before, tasks, unfinished)
    builder = ManifestBuilder(manifest, before, tasks)
    damaged = 0
    new = builder.missing()
    with (
        workers(processes, "data.index.processes", lock) as run,
        Progress("index", sum(task.bytes for task in new) / 1e6, "MB") as progress,
    ):
        for number, (task, scan) in enumerate(zip(new, run(_read, new, ""), strict=True), start=1):
            progress.note = f"{number:,} of {len(new):,} shards"
            progress.advance(task.bytes / 1e6)
            if isinstance(scan, str):
                logger.warning("left out: %s", scan)
                damaged += 1
                builder.drop(task)
                continue
            builder.add(task, scan)
            if builder.waiting == file_shards:
                builder.write()
    builder.write()
    builder.remove_leftovers()
    _report(manifest, builder, unfinished, len(new) - damaged)
    if damaged:
        raise ShardError(
            f"{manifest}: {damaged:,} of {len(tasks):,} shards are left out, each named above with what to "
            "do; then index again"
        )


def _read(task: Task) -> ShardScan | str:
    """Read a shard; returns an error message if it is damaged."""
    try:
        return read_shard(task.path, task.source, task.name, task.decode)
    except ShardError as error:
        return str(error)


def _find(sources: Mapping[str, Path], manifest: Path, decode: bool) -> tuple[list[Task], int]:
    """Shards whose download has finished, by source and path, and the number of unfinished tar files."""
    tasks: list[Task] = []
    unfinished = 0
    for source, folder in sources.items():
        found: list[Path] = []
        for place, _, names in os.walk(folder):
            there = set(names)
            for name in names:
                if name.endswith(".tar"):
                    finished = statistics_file(Path(name)).name in there
                    found += [Path(place, name)] if finished else []
                    unfinished += not finished
        for path in sorted(found):
            try:
                status = path.stat()
            except FileNotFoundError:
                # The download removes shards that it is about to retry.
                unfinished += 1
                continue
            name = os.path.relpath(path, manifest)
            tasks.append(Task(source, path, name, status.st_size, status.st_mtime_ns, decode))
    return tasks, unfinished


def _check_folders(sources: Mapping[str, Path]) -> None:
    """Raise a ShardError if one source's folder lies inside another's."""
    places = {source: folder.resolve() for source, folder in sources.items()}
    for source, other in itertools.permutations(places, 2):
        if places[source].is_relative_to(places[other]):
            raise ShardError(
                f"data.sources.{source}.shards={sources[source]}: lies in data.sources.{other}.shards="
                f"{sources[other]}; give each source a folder of its own"
            )


def _check_found(
    sources: Mapping[str, Path], manifest: Path, before: pa.Table, tasks: Sequence[Task], unfinished: int
) -> None:
    if not tasks:
        places = ", ".join(map(str, sources.values()))
        reason = f"none of {unfinished:,} .tar has finished its download" if unfinished else "no .tar"
        raise ShardError(f"data.sources: {reason} in {places}; run `python -m data_pipeline download` first")
    listed = Counter(before["source"].to_pylist())
    for source, folder in sources.items():
        # An unmounted disk looks like removed shards.
        if listed[source] and not folder.is_dir():
            raise ShardError(
                f"data.sources.{source}.shards={folder}: no such folder, and {manifest} lists {listed[source]:,} "
                "shards of it; bring it back, or take the source out of data.sources"
            )


def _report(manifest: Path, builder: ManifestBuilder, unfinished: int, read: int) -> None:
    """Print what the manifest lists, what it leaves out, and what is listed twice."""
    shards = builder.listed()
    broken: Counter[str] = Counter()
    for line in shards["broken"].to_pylist():
        broken.update(json.loads(line))
    if builder.dropped:
        names = ", ".join(builder.dropped[:NAMED]) + (", ..." if len(builder.dropped) > NAMED else "")
        logger.warning("dropped: %s shards that are gone: %s", f"{len(builder.dropped):,}", names)
    if unfinished:
        logger.warning("passed over: %s .tar whose download has not finished", f"{unfinished:,}")
    if read or builder.dropped:
        repeated = repeated_uids(Manifest(manifest))
        if repeated.example is not None:
            logger.warning(
                "listed more than once: %s%s samples, as in %s and %s; were the same rows downloaded twice?",
                "" if repeated.compared == 1 else "about ",
                f"{repeated.samples:,}",
                *repeated.example,
            )
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in broken.most_common()) or "none"
    total = sum(shards["samples"].to_pylist())
    print(f"{manifest}: {total:,} samples in {len(shards):,} shards, {read:,} of them new; left out: {left_out}")
