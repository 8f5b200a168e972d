"""The manifest: an index of the tar shards, with one row per shard and one per sample.

A manifest is a folder with `shards.parquet`, one row per shard, and files `samples-*.parquet`, one row per sample.
Every shard has its own row group there. A reader keeps the shards' rows and reads the samples of a few shards at a
time. Files of samples are only added. `shards.parquet` names them; a rename replaces it, which changes the manifest.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vdtrain.errors import one_line, system_error, unreadable
from vdtrain.files import atomic_write, sync


def pair_uid(source: str, url: str, caption: str) -> str:
    """32 hexadecimal digits: BLAKE2b-128 of the source's name, the URL and the cleaned caption."""
    identity = "\n".join((source, url, caption))
    return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()


SHARDS_FILE = "shards.parquet"
SAMPLES_FILES = "samples-*.parquet"
INDEX = "`python -m data_pipeline index` with the same settings of data"

SAMPLE_SCHEMA: pa.Schema = pa.schema(
    [
        pa.field("uid", pa.string()),  # vdtrain.data.manifest.pair_uid
        pa.field("shard", pa.string()),  # as in shards.parquet
        pa.field("key", pa.string()),  # of the sample inside its shard
        pa.field("offset", pa.int64()),  # of the image's bytes in the tar
        pa.field("size", pa.int32()),
        pa.field("orientation", pa.int8()),  # of the stored image: EXIF's 1 (upright) to 8
        pa.field("width", pa.int32()),  # of the upright image
        pa.field("height", pa.int32()),
        pa.field("caption", pa.string()),
    ]
)
SHARD_SCHEMA: pa.Schema = pa.schema(
    [
        pa.field("path", pa.string()),  # relative to the manifest's folder
        pa.field("source", pa.string()),
        pa.field("bytes", pa.int64()),
        pa.field("modified_ns", pa.int64()),
        pa.field("sha256", pa.string()),
        pa.field("samples", pa.int32()),
        # Number of samples for each shortest side, to count those large enough for a phase without reading them.
        pa.field("sides", pa.list_(pa.int32())),
        pa.field("side_counts", pa.list_(pa.int32())),
        pa.field("broken", pa.string()),  # JSON: reason -> number of omitted samples
        pa.field("decoded", pa.bool_()),  # true: every image was decoded, false: only the headers
        pa.field("samples_file", pa.string()),
        pa.field("row_group", pa.int32()),
    ]
)
SHARD_COLUMNS = ["path", "source", "bytes", "samples", "sides", "side_counts", "sha256", "samples_file", "row_group"]


class ManifestError(ValueError):
    """A manifest cannot be used. The message is one line."""


@dataclass(frozen=True)
class ShardRows:
    """The columns that a reader needs of one shard's n samples, in their order in the tar.

    Attributes:
        offset, size: int64 [n] of the image bytes.
        side: int32 [n] shortest side in pixels.
        orientation: int8 [n] of the stored images: EXIF's 1 (upright) to 8.
        captions: pyarrow strings [n].
    """

    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    side: NDArray[np.int32]
    orientation: NDArray[np.int8]
    captions: pa.Array

    def __len__(self) -> int:
        return len(self.offset)


class Manifest:
    """A manifest's shards in memory; samples are read on request. Several threads may use it.

    Args:
        folder: written by `python -m data_pipeline index`.
        root: folder or address (http, https, s3, gs, ...) that the shards' paths are relative to; the manifest's own
            folder by default.

    Attributes:
        paths: of the shards, as in the manifest.
        shards: paths or addresses of the shards, under `root`.
        sources: int32 [S] number of each shard's source, in `source_names`.
        bytes, samples: int64 [S] size of each tar in bytes, and number of its samples.

    Raises:
        ManifestError: it is missing or damaged, or has an earlier layout.
    """

    def __init__(self, folder: Path, root: str | None = None) -> None:
        self.folder = folder
        table = _read_shard_columns(folder, SHARD_COLUMNS)
        self.paths: list[str] = table["path"].to_pylist()
        self.shards = [_join(str(folder) if root is None else root, path) for path in self.paths]
        encoded = table["source"].combine_chunks().dictionary_encode()
        self.source_names: list[str] = encoded.dictionary.to_pylist()
        self.sources: NDArray[np.int32] = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int32)
        self.bytes: NDArray[np.int64] = table["bytes"].to_numpy()
        self.samples: NDArray[np.int64] = table["samples"].to_numpy().astype(np.int64)
        self.hashes: list[str] = table["sha256"].to_pylist()
        self._files: list[str] = table["samples_file"].to_pylist()
        self._row_groups: NDArray[np.int32] = table["row_group"].to_numpy()
        self._sides, self._side_counts = table["sides"].combine_chunks(), table["side_counts"].combine_chunks()
        self._footers: dict[str, pq.FileMetaData] = {}
        self._lock = Lock()

    def __len__(self) -> int:
        """Number of samples."""
        return int(self.samples.sum())

    @property
    def identity(self) -> str:
        """16 hexadecimal digits. Like the order, they change when a shard is added, removed or made again."""
        described = zip(self.paths, self.hashes, self.samples.tolist(), strict=True)
        return hashlib.blake2b(repr(list(described)).encode(), digest_size=8).hexdigest()

    def counts(self, min_side: int) -> NDArray[np.int64]:
        """int64 [S]: number of samples of each shard whose shortest side has at least `min_side` pixels."""
        lengths = np.diff(self._sides.offsets.to_numpy())
        owners = np.repeat(np.arange(len(self.paths)), lengths)
        enough = self._sides.flatten().to_numpy() >= min_side
        weights = self._side_counts.flatten().to_numpy() * enough
        return np.bincount(owners, weights, minlength=len(self.paths)).astype(np.int64)

    def rows(self, shard: int) -> ShardRows:
        """The samples of a shard.

        Raises:
            ManifestError: its file of samples is missing or damaged.
        """
        table = self.columns(shard, ["offset", "size", "orientation", "width", "height", "caption"])
        return ShardRows(
            table["offset"].to_numpy(),
            table["size"].to_numpy().astype(np.int64),
            np.minimum(table["width"].to_numpy(), table["height"].to_numpy()),
            table["orientation"].to_numpy(),
            table["caption"].combine_chunks(),
        )

    def columns(self, shard: int, columns: Sequence[str]) -> pa.Table:
        """Columns of SAMPLE_SCHEMA of a shard's samples.

        Raises:
            ManifestError: its file of samples is missing or damaged.
        """
        name, group = self._files[shard], int(self._row_groups[shard])
        try:
            with self._lock:
                if name not in self._footers:
                    self._footers[name] = pq.read_metadata(self.folder / name)
                footer = self._footers[name]
            with pq.ParquetFile(self.folder / name, metadata=footer) as file:
                table: pa.Table = file.read_row_group(group, columns=list(columns), use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise ManifestError(
                f"data.manifest={self.folder}: {name} {_unreadable(error, self.folder / name)}"
            ) from error
        return table

    def changed(self, shard: int) -> bool | None:
        """Whether a shard's file differs from the indexed one in size or time; None for a shard at an address."""
        if "://" in self.shards[shard]:
            return None
        written = int(self._column("modified_ns")[shard].as_py())
        try:
            status = os.stat(self.shards[shard])
        except OSError:
            return True
        return (status.st_size, status.st_mtime_ns) != (int(self.bytes[shard]), written)

    def decoded(self, shard: int | None = None) -> bool:
        """Whether indexing decoded every image of a shard, or of all shards."""
        found = self._column("decoded")
        return bool(found[shard].as_py()) if shard is not None else all(found.to_pylist())

    def _column(self, name: str) -> pa.ChunkedArray:
        return _read_shard_columns(self.folder, [name])[name]


class SamplesWriter:
    """Writes a file of samples, one row group per shard; `close` publishes it under its name.

    Args:
        folder: of the manifest.
        name: of the file; the folder must not have it yet.

    Attributes:
        rows: of the file's shards; the caller adds them to `shards.parquet` after `close`.
    """

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / name
        self.rows: list[dict[str, Any]] = []
        self._draft = folder / f"{name}.incomplete"
        self._writer = pq.ParquetWriter(self._draft, SAMPLE_SCHEMA, compression="zstd")

    def add(self, shard: Mapping[str, Any], samples: pa.Table) -> None:
        """Write the samples of a shard.

        Args:
            shard: its columns of SHARD_SCHEMA, except those that follow from the samples.
            samples: columns of SAMPLE_SCHEMA.
        """
        self._writer.write_table(samples.cast(SAMPLE_SCHEMA), row_group_size=max(1, len(samples)))
        shortest = np.minimum(samples["width"].to_numpy(), samples["height"].to_numpy())
        sides, counts = np.unique(shortest, return_counts=True)
        counted = {"samples": len(samples), "sides": sides.tolist(), "side_counts": counts.tolist()}
        self.rows.append({**shard, **counted, "samples_file": self.path.name, "row_group": len(self.rows)})

    def close(self) -> None:
        """Finish the file and publish it."""
        self._writer.close()
        sync(self._draft)
        self._draft.rename(self.path)
        sync(self.path.parent)


def read_shards(folder: Path) -> pa.Table:
    """The shards of a manifest, with the columns of SHARD_SCHEMA; empty if the manifest does not exist yet.

    Raises:
        ManifestError: it exists and cannot be read.
    """
    if not (folder / SHARDS_FILE).exists():
        return SHARD_SCHEMA.empty_table()
    return _read_shard_columns(folder, SHARD_SCHEMA.names).cast(SHARD_SCHEMA)


def write_shards(folder: Path, shards: pa.Table) -> None:
    """Replace the manifest's list of shards atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / SHARDS_FILE) as draft:
        pq.write_table(shards, draft, compression="zstd")


def _read_shard_columns(folder: Path, columns: Sequence[str]) -> pa.Table:
    place = f"data.manifest={folder}: {SHARDS_FILE}"
    try:
        with pq.ParquetFile(folder / SHARDS_FILE) as file:
            missing = [column for column in columns if column not in file.schema_arrow.names]
            if missing:
                raise ManifestError(f"{place} has another layout, without {', '.join(missing)}; {_anew(folder)}")
            return file.read(columns=list(columns))
    except FileNotFoundError as error:
        if folder.is_dir() or not folder.is_symlink():
            raise ManifestError(f"{place} is not there; make it with {INDEX}, or give another folder") from error
        raise ManifestError(f"{place} {_unreadable(error, folder)}") from error
    except (OSError, pa.ArrowException) as error:
        if folder.is_file():
            raise ManifestError(
                f"data.manifest={folder}: is a file; give the folder that holds {SHARDS_FILE}"
            ) from error
        raise ManifestError(f"{place} {_unreadable(error, folder / SHARDS_FILE)}") from error


def _unreadable(error: Exception, path: Path) -> str:
    """Cause and remedy for a file of a manifest. Only a damaged or missing file must be indexed again."""
    found = system_error(error)
    if found is not None and found.errno not in (None, errno.ENOENT, errno.EINVAL):
        return unreadable(found, path)
    if isinstance(error, FileNotFoundError):
        return f"is not there; run {INDEX}, which reads its shards again"
    return f"cannot be read ({one_line(error)}); {_anew(path.parent)}"


def _anew(folder: Path) -> str:
    return f"remove the folder {folder} and make it again with {INDEX}"


def _join(root: str, path: str) -> str:
    """A shard's location: its path is relative to the root unless it is absolute or an address."""
    if "://" in path or path.startswith("/"):
        return path
    if "://" not in root:
        return os.path.normpath(os.path.join(root, path))
    # As in a browser: the root is a folder, and each ../ goes up one folder.
    scheme, rest = root.rstrip("/").split("://", 1)
    parts = rest.split("/")
    for step in path.split("/"):
        if step == "..":
            parts = parts[:-1] if len(parts) > 1 else parts
        elif step not in ("", "."):
            parts.append(step)
    return f"{scheme}://{'/'.join(parts)}"
