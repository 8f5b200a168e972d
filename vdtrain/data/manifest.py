"""The manifest: what lies where in the tar shards, one row per shard and one per sample.

A manifest is a folder with `shards.parquet`, one row per shard, and files `samples-*.parquet`, in which every shard has
a row group of its own: a reader holds the shards' rows and fetches the samples of a few shards at a time. Files of
samples are only ever added; a manifest changes when `shards.parquet`, which names them, is replaced by one rename.
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
from vdtrain.files import sync


def pair_uid(source: str, url: str, caption: str) -> str:
    """32 hexadecimal digits: BLAKE2b-128 of the source's name, the URL and the cleaned caption."""
    identity = "\n".join((source, url, caption))
    return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()


SHARDS_FILE = "shards.parquet"
SAMPLES_FILES = "samples-*.parquet"

SAMPLE_SCHEMA: pa.Schema = pa.schema(
    [
        pa.field("uid", pa.string()),  # vdtrain.data.manifest.pair_uid
        pa.field("shard", pa.string()),  # as in shards.parquet
        pa.field("key", pa.string()),  # of the sample inside its shard
        pa.field("offset", pa.int64()),  # of the image file's bytes in the tar
        pa.field("size", pa.int32()),
        pa.field("orientation", pa.int8()),  # in which the image is stored: EXIF's 1 (upright) to 8
        pa.field("width", pa.int32()),  # once it is turned upright
        pa.field("height", pa.int32()),
        pa.field("caption", pa.string()),
        pa.field("caption_hash", pa.uint64()),  # 64-bit hash of the caption
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
        # How many samples have which shortest side: those large enough for a phase are counted without reading them.
        pa.field("sides", pa.list_(pa.int32())),
        pa.field("side_counts", pa.list_(pa.int32())),
        pa.field("broken", pa.string()),  # JSON: reason -> samples left out
        pa.field("decoded", pa.bool_()),  # whether every image was decoded, and not its header alone
        pa.field("samples_file", pa.string()),
        pa.field("row_group", pa.int32()),
    ]
)
SHARD_COLUMNS = ["path", "source", "bytes", "samples", "sides", "side_counts", "sha256", "samples_file", "row_group"]


class ManifestError(ValueError):
    """A manifest that cannot be used; the message is one line."""


@dataclass(frozen=True)
class ShardRows:
    """What a reader needs of one shard's n samples, in their order in the tar.

    Attributes:
        offset, size: int64 [n] place of the image bytes.
        side: int32 [n] shortest side in pixels.
        orientation: int8 [n] in which the images are stored: EXIF's 1 (upright) to 8.
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
    """A manifest's shards in memory; their samples are read when they are asked for. Safe to use from several threads.

    Args:
        folder: written by `python -m data_pipeline index`.
        root: folder or address (http, https, s3, gs, ...) that the shards' paths are relative to; the manifest's own
            folder by default.

    Attributes:
        paths: of the shards, as they stand in the manifest.
        shards: their places, under `root`: paths or addresses.
        sources: int32 [S] number of each shard's source, in `source_names`.
        bytes, samples: int64 [S] size of each tar, number of its samples.

    Raises:
        ManifestError: it is missing, damaged, or of an earlier layout.
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
        """Changes when a shard is added, removed or made anew, and with it the order of the samples."""
        described = zip(self.paths, self.hashes, self.samples.tolist(), strict=True)
        return hashlib.blake2b(repr(list(described)).encode(), digest_size=8).hexdigest()

    def counts(self, min_side: int) -> NDArray[np.int64]:
        """int64 [S]: how many samples of each shard have a shortest side of `min_side` pixels or more."""
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
        """Whether a shard's file is another one than was indexed, by size and time; None of one at an address."""
        if "://" in self.shards[shard]:
            return None
        written = int(self._column("modified_ns")[shard].as_py())
        try:
            status = os.stat(self.shards[shard])
        except OSError:
            return True
        return (status.st_size, status.st_mtime_ns) != (int(self.bytes[shard]), written)

    def decoded(self, shard: int | None = None) -> bool:
        """Whether every image of a shard, or of all, was decoded when it was indexed."""
        found = self._column("decoded")
        return bool(found[shard].as_py()) if shard is not None else all(found.to_pylist())

    def _column(self, name: str) -> pa.ChunkedArray:
        return _read_shard_columns(self.folder, [name])[name]


INDEX = "`python -m data_pipeline index` with the same settings of data"


class SamplesWriter:
    """Adds a file of samples to a manifest, a row group per shard; `close` makes it whole under its name.

    Args:
        folder: of the manifest.
        name: of the file, one that the folder does not have.

    Attributes:
        rows: of the shards in it, once it is closed to be added to the manifest's.
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
            shard: its columns of SHARD_SCHEMA, without those that the samples tell.
            samples: columns of SAMPLE_SCHEMA.
        """
        self._writer.write_table(samples.cast(SAMPLE_SCHEMA), row_group_size=max(1, len(samples)))
        shortest = np.minimum(samples["width"].to_numpy(), samples["height"].to_numpy())
        sides, counts = np.unique(shortest, return_counts=True)
        counted = {"samples": len(samples), "sides": sides.tolist(), "side_counts": counts.tolist()}
        self.rows.append({**shard, **counted, "samples_file": self.path.name, "row_group": len(self.rows)})

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()
        sync(self._draft)
        self._draft.rename(self.path)
        sync(self.path.parent)


def read_shards(folder: Path) -> pa.Table:
    """The shards of a manifest, with the columns of SHARD_SCHEMA; empty where there is none yet.

    Raises:
        ManifestError: there is one that cannot be read.
    """
    if not (folder / SHARDS_FILE).exists():
        return SHARD_SCHEMA.empty_table()
    return _read_shard_columns(folder, SHARD_SCHEMA.names).cast(SHARD_SCHEMA)


def write_shards(folder: Path, shards: pa.Table) -> None:
    """Replace the manifest's list of shards: the manifest is the old one before, and the new one after."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{SHARDS_FILE}.incomplete"
    pq.write_table(shards, draft, compression="zstd")
    sync(draft)
    draft.replace(folder / SHARDS_FILE)
    sync(folder)


def _read_shard_columns(folder: Path, columns: Sequence[str]) -> pa.Table:
    place = f"data.manifest={folder}: {SHARDS_FILE}"
    try:
        with pq.ParquetFile(folder / SHARDS_FILE) as file:
            missing = [column for column in columns if column not in file.schema_arrow.names]
            if missing:
                raise ManifestError(f"{place} is of another layout, without {', '.join(missing)}; {_anew(folder)}")
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
    """What is wrong with a file of a manifest: only one that is damaged or gone is to be made anew."""
    found = system_error(error)
    if found is not None and found.errno not in (None, errno.ENOENT, errno.EINVAL):
        return unreadable(found, path)
    if isinstance(error, FileNotFoundError):
        return f"is not there; run {INDEX}, which reads its shards again"
    return f"cannot be read ({one_line(error)}); {_anew(path.parent)}"


def _anew(folder: Path) -> str:
    return f"remove the folder {folder} and make it anew with {INDEX}"


def _join(root: str, path: str) -> str:
    """A shard's location: its path is relative to the root, unless it is an address or absolute itself."""
    if "://" in path or path.startswith("/"):
        return path
    if "://" not in root:
        return os.path.normpath(os.path.join(root, path))
    # As a browser would: the root is a folder, and each ../ leaves one.
    scheme, rest = root.rstrip("/").split("://", 1)
    parts = rest.split("/")
    for step in path.split("/"):
        if step == "..":
            parts = parts[:-1] if len(parts) > 1 else parts
        elif step not in ("", "."):
            parts.append(step)
    return f"{scheme}://{'/'.join(parts)}"
