"""Builds a manifest step by step; it is written several times on the way, and is valid each time."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.index.repeated import rows_of
from data_pipeline.index.shard_reading import ShardScan
from vdtrain.data.manifest import (
    MEMBERS,
    READ_ERRORS,
    SAMPLES_FILES,
    SHARD_SCHEMA,
    SHARDS_FILE,
    Manifest,
    ManifestError,
    SamplesWriter,
    counted_sides,
    noted,
    read_shards,
    shortest_sides,
    write_shards,
)
from vdtrain.files import INCOMPLETE

# The list of a large set takes seconds to write. Each such time is followed by so many times as long without.
QUICK_SECONDS, REST = 0.5, 20
# In the metadata of SHARDS_FILE.
CAPTION = "data.index.caption"


@dataclass(frozen=True)
class Task:
    """A shard to read."""

    source: str
    path: Path
    name: str  # its path in the manifest
    bytes: int
    modified_ns: int
    decode: bool
    own: bool  # another program made it
    caption: str | None  # field of the JSON that holds the captions; None for members of text
    endings: Mapping[str, str]  # of the files of further modalities, with the modality of each


class ManifestBuilder:
    """Keeps unchanged shards of a manifest and adds new ones, in the order of the tasks.

    Args:
        before: the manifest's shards so far.
        tasks: one for each shard on the disk.
        caption: field of the JSON that holds the captions. Shards that were read with another one are not kept.
        contents: read shards again that an earlier version indexed without hashes of their images.
        endings: of the files of further modalities. Shards that were read with others are not kept.

    Attributes:
        shards: rows of SHARD_SCHEMA; some of them may no longer be listed.
        dropped: names of shards that are gone.
    """

    def __init__(
        self,
        manifest: Path,
        before: pa.Table,
        tasks: Sequence[Task],
        caption: str | None,
        contents: bool,
        endings: Mapping[str, str],
    ) -> None:
        self.manifest, self.shards, self._tasks = manifest, before, tasks
        self._settings = {CAPTION: caption, MEMBERS: json.dumps(endings, sort_keys=True) if endings else None}
        same = not len(before) or all(noted(manifest, name) == value for name, value in self._settings.items())
        wanted = {task.name: task for task in tasks}
        columns = ["path", "source", "bytes", "modified_ns", "decoded", "samples_file"]
        files = before["samples_file"].unique().to_pylist()
        found = {file: _columns(manifest / file) for file in files}
        whole = {file for file, names in found.items() if "shard" in names}
        lacking = {file for file, names in found.items() if contents and "content" not in names}
        self._rows: dict[str, int] = {}
        self._current: set[str] = set()
        self.dropped: list[str] = []
        for row, (name, source, size, modified_ns, decoded, file) in enumerate(
            zip(*(before[column].to_pylist() for column in columns), strict=True)
        ):
            task = wanted.get(name)
            if task is None:
                self.dropped.append(name)
            elif same and (task.source, task.bytes, task.modified_ns) == (source, size, modified_ns) and file in whole:
                self._rows[name] = row
                if decoded >= task.decode and file not in lacking:
                    self._current.add(name)
        numbers = [int(file.removesuffix(".parquet").split("-")[-1]) for file in files]
        # Numbers are not reused: a reader of the old manifest must not find other samples under a known name.
        self._next_file = max(numbers, default=-1) + 1
        self._writer: SamplesWriter | None = None
        self._rests_until = 0.0
        self._written = self.listed()["path"].equals(before["path"]) and (manifest / SHARDS_FILE).exists()
        self._remove_leftovers(before)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove all files that the manifest does not need: an interrupted run leaves no draft."""
        self._writer = None
        # Read again: an interruption may have come between the manifest's file and what this object knows of it.
        with suppress(OSError, ManifestError):
            self._remove_leftovers(read_shards(self.manifest))

    @property
    def waiting(self) -> int:
        """Number of shards added since the manifest was last written."""
        return len(self._writer.rows) if self._writer is not None else 0

    def missing(self) -> list[Task]:
        """Shards that must be read."""
        return [task for task in self._tasks if task.name not in self._current]

    def drop(self, task: Task) -> None:
        """Remove a shard from the manifest at the next `write`."""
        self._written &= self._rows.pop(task.name, None) is None

    def add(self, task: Task, scan: ShardScan) -> None:
        """Add a shard to the manifest at the next `write`."""
        if self._writer is None:
            self._writer = SamplesWriter(self.manifest, SAMPLES_FILES.replace("*", f"{self._next_file:05d}"))
            self._next_file += 1
        row = {
            "path": task.name,
            "source": task.source,
            "bytes": scan.bytes,
            "modified_ns": scan.modified_ns,
            "sha256": scan.sha256,
            "broken": json.dumps(scan.broken),
            "decoded": task.decode,
        }
        self._writer.add(row, scan.samples)

    def write(self, last: bool = True) -> None:
        """Write the manifest with all shards that were added and without those that were dropped.

        Args:
            last: False lets the list of shards wait if it has just taken long.
        """
        if self._writer is not None:
            self._writer.close()
            for number, row in enumerate(self._writer.rows, start=len(self.shards)):
                self._rows[row["path"]] = number
            self.shards = pa.concat_tables([self.shards, pa.Table.from_pylist(self._writer.rows, SHARD_SCHEMA)])
            self._writer, self._written = None, False
        if self._written or (not last and time.monotonic() < self._rests_until):
            return
        began = time.monotonic()
        self._publish()
        ended = time.monotonic()
        self._rests_until = ended + REST * max(0.0, ended - began - QUICK_SECONDS)
        self._written = True

    def leave_out(self, hashes: NDArray[np.int64]) -> None:
        """Let the samples whose images have one of `hashes`, and no others, not take part; this writes the manifest."""
        manifest, changed = Manifest(self.manifest), []
        for shard, name in enumerate(manifest.paths):
            rows = rows_of(manifest, shard, hashes)
            if np.array_equal(rows, manifest.left_out_rows(shard)):
                continue
            side = shortest_sides(manifest.columns(shard, ["width", "height", "caption"]))
            side[rows] = -1
            (before,) = self.shards.slice(self._rows[name], 1).to_pylist()
            changed.append({**before, **counted_sides(side), "left_out": rows.tolist()})
            self._rows[name] = len(self.shards) + len(changed) - 1
        if changed:
            self.shards = pa.concat_tables([self.shards, pa.Table.from_pylist(changed, SHARD_SCHEMA)])
            self._publish()

    def _publish(self) -> None:
        settings = {name: value for name, value in self._settings.items() if value is not None} or None
        write_shards(self.manifest, self.listed().replace_schema_metadata(settings))

    def listed(self) -> pa.Table:
        """The shards that the manifest lists, in the order of the tasks."""
        rows = [self._rows[task.name] for task in self._tasks if task.name in self._rows]
        return self.shards.take(pa.array(rows, pa.int64())).combine_chunks()

    def _remove_leftovers(self, shards: pa.Table) -> None:
        """Remove files of samples that no shard refers to, and drafts of interrupted runs."""
        named = set(shards["samples_file"].to_pylist())
        drafts = [f"{SAMPLES_FILES}{INCOMPLETE}", f"{SHARDS_FILE}*{INCOMPLETE}"]
        for file in [each for pattern in (SAMPLES_FILES, *drafts) for each in self.manifest.glob(pattern)]:
            if file.name not in named:
                file.unlink()


def _columns(file: Path) -> list[str]:
    """The columns of a file of samples; empty if it is incomplete."""
    try:
        return list(pq.read_schema(file).names)
    except READ_ERRORS:
        return []
