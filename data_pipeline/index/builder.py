"""Builds a manifest step by step; it is written several times on the way, and is valid each time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.index.shard_reading import ShardScan
from vdtrain.data.manifest import SAMPLES_FILES, SHARD_SCHEMA, SHARDS_FILE, SamplesWriter, write_shards
from vdtrain.files import INCOMPLETE


@dataclass(frozen=True)
class Task:
    """A shard to read; `name` is its path in the manifest."""

    source: str
    path: Path
    name: str
    bytes: int
    modified_ns: int
    decode: bool


class ManifestBuilder:
    """Keeps unchanged shards of a manifest and adds new ones, in the order of the tasks.

    Args:
        before: the manifest's shards so far.
        tasks: one for each shard on the disk.

    Attributes:
        shards: rows of SHARD_SCHEMA; some of them may no longer be listed.
        dropped: names of shards that are gone.
    """

    def __init__(self, manifest: Path, before: pa.Table, tasks: Sequence[Task]) -> None:
        self.manifest, self.shards, self._tasks = manifest, before, tasks
        wanted = {task.name: task for task in tasks}
        columns = ["path", "source", "bytes", "modified_ns", "decoded", "samples_file"]
        files = before["samples_file"].unique().to_pylist()
        whole = {file for file in files if _is_whole(manifest / file)}
        self._rows: dict[str, int] = {}
        self._current: set[str] = set()
        self.dropped: list[str] = []
        for row, (name, source, size, modified_ns, decoded, file) in enumerate(
            zip(*(before[column].to_pylist() for column in columns), strict=True)
        ):
            task = wanted.get(name)
            if task is None:
                self.dropped.append(name)
            elif (task.source, task.bytes, task.modified_ns) == (source, size, modified_ns) and file in whole:
                self._rows[name] = row
                if decoded >= task.decode:
                    self._current.add(name)
        numbers = [int(file.removesuffix(".parquet").split("-")[-1]) for file in files]
        # Numbers are not reused: a reader of the old manifest must not find other samples under a known name.
        self._next_file = max(numbers, default=-1) + 1
        self._writer: SamplesWriter | None = None
        self._written = self.listed()["path"].equals(before["path"]) and (manifest / SHARDS_FILE).exists()
        self.remove_leftovers(before)

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

    def write(self) -> None:
        """Write the manifest with all shards that were added and without those that were dropped."""
        if self._writer is not None:
            self._writer.close()
            for number, row in enumerate(self._writer.rows, start=len(self.shards)):
                self._rows[row["path"]] = number
            self.shards = pa.concat_tables([self.shards, pa.Table.from_pylist(self._writer.rows, SHARD_SCHEMA)])
            self._writer = None
        elif self._written:
            return
        write_shards(self.manifest, self.listed())
        self._written = True

    def listed(self) -> pa.Table:
        """The shards that the manifest lists, in the order of the tasks."""
        rows = [self._rows[task.name] for task in self._tasks if task.name in self._rows]
        return self.shards.take(pa.array(rows, pa.int64())).combine_chunks()

    def remove_leftovers(self, shards: pa.Table | None = None) -> None:
        """Remove files of samples that no shard refers to, and drafts of interrupted runs."""
        named = set((self.listed() if shards is None else shards)["samples_file"].to_pylist())
        for file in [*self.manifest.glob(SAMPLES_FILES), *self.manifest.glob(f"*{INCOMPLETE}")]:
            if file.name not in named:
                file.unlink()


def _is_whole(file: Path) -> bool:
    """Whether a file of samples is complete."""
    try:
        pq.read_metadata(file)
    except (OSError, pa.ArrowException):
        return False
    return True
