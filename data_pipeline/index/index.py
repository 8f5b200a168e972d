"""Tar shards to a manifest: every new shard is read once and checked, its whole samples are listed.

A shard that is damaged is left out and named, and the others are indexed. What is listed already is not read again: a
run that was interrupted, or that finds new shards, reads what is missing.
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

from data_pipeline.index.listing import Listing, Task
from data_pipeline.index.repeated import repeated_uids
from data_pipeline.index.shard_reading import Reading, ShardError, read_shard, statistics_file
from data_pipeline.run_lock import RunLockError, run_lock
from data_pipeline.workers import workers
from vdtrain.data.manifest import Manifest, read_shards
from vdtrain.progress import Progress

logger = logging.getLogger(__name__)

# Shards whose samples share a file; what an interruption loses at most.
FILE_SHARDS = 100
# What a line names, of things that can be many.
NAMED = 5


def index(
    sources: Mapping[str, Path],
    manifest: Path,
    *,
    processes: int = 1,
    decode: bool = False,
    file_shards: int = FILE_SHARDS,
) -> None:
    """Bring a manifest up to the shards below the sources' folders; it does not depend on the number of processes.

    Args:
        decode: decode every image; shards that were listed without are read again.
        file_shards: shards whose samples share a file; after each such file the manifest lists what was read so far.

    Raises:
        ShardError: no source has a shard, or another run is at work; or shards are damaged, and the manifest lists all
            the others.
        ManifestError: there is a manifest that cannot be read.
    """
    _check_folders(sources)
    try:
        with run_lock(manifest.with_name(manifest.name + ".lock")) as lock:
            _index(sources, manifest, processes, decode, file_shards, lock)
    except RunLockError as error:
        raise ShardError(f"data.manifest={manifest}: another index is at work there; wait for it or stop it") from error


def _index(
    sources: Mapping[str, Path], manifest: Path, processes: int, decode: bool, file_shards: int, lock: Path
) -> None:
    before = read_shards(manifest)
    tasks, unfinished = _find(sources, manifest, decode)
    _check_found(sources, manifest, before, tasks, unfinished)
    listing = Listing(manifest, before, tasks)
    damaged = 0
    new = listing.missing()
    with (
        workers(processes, "data.index.processes", lock) as run,
        Progress("index", sum(task.bytes for task in new) / 1e6, "MB") as progress,
    ):
        for number, (task, reading) in enumerate(zip(new, run(_read, new, ""), strict=True), start=1):
            progress.note = f"{number:,} of {len(new):,} shards"
            progress.advance(task.bytes / 1e6)
            if isinstance(reading, str):
                logger.warning("left out: %s", reading)
                damaged += 1
                listing.drop(task)
                continue
            listing.add(task, reading)
            if listing.waiting == file_shards:
                listing.write()
    listing.write()
    listing.remove_leftovers()
    _report(manifest, listing, unfinished, len(new) - damaged)
    if damaged:
        raise ShardError(
            f"{manifest}: {damaged:,} of {len(tasks):,} shards are left out, each named above with what to "
            "do; then index again"
        )


def _read(task: Task) -> Reading | str:
    """Read a shard; a line where it is damaged."""
    try:
        return read_shard(task.path, task.source, task.name, task.decode)
    except ShardError as error:
        return str(error)


def _find(sources: Mapping[str, Path], manifest: Path, decode: bool) -> tuple[list[Task], int]:
    """Shards whose download has finished, by source and path, and the number of tar files of which that is not so."""
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
                # The download takes shards away that it is about to attempt again.
                unfinished += 1
                continue
            name = os.path.relpath(path, manifest)
            tasks.append(Task(source, path, name, status.st_size, status.st_mtime_ns, decode))
    return tasks, unfinished


def _check_folders(sources: Mapping[str, Path]) -> None:
    """Raise a ShardError where one source's folder lies in another's."""
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
        # A disk that is not mounted looks like shards that were removed.
        if listed[source] and not folder.is_dir():
            raise ShardError(
                f"data.sources.{source}.shards={folder}: no such folder, and {manifest} lists {listed[source]:,} "
                "shards of it; bring it back, or take the source out of data.sources"
            )


def _report(manifest: Path, listing: Listing, unfinished: int, read: int) -> None:
    """Say what the manifest lists, what it leaves out, and what is listed twice."""
    shards = listing.listed()
    broken: Counter[str] = Counter()
    for line in shards["broken"].to_pylist():
        broken.update(json.loads(line))
    if listing.dropped:
        names = ", ".join(listing.dropped[:NAMED]) + (", ..." if len(listing.dropped) > NAMED else "")
        logger.warning("dropped: %s shards that are gone: %s", f"{len(listing.dropped):,}", names)
    if unfinished:
        logger.warning("passed over: %s .tar whose download has not finished", f"{unfinished:,}")
    if read or listing.dropped:
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
