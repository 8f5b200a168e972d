"""The manifest: an index of the tar shards, with one row per shard and one per sample.

A manifest is a folder with `shards.parquet`, one row per shard, and files `samples-*.parquet`, one row per sample.
Every shard has its own row group there. A reader keeps the shards' rows and reads the samples of a few shards at a
time. Files of samples are only added. `shards.parquet` names them; a rename replaces it, which changes the manifest.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vdtrain.errors import one_line, system_error, unreadable
from vdtrain.files import atomic_write, sync


def pair_uid(source: str, url: str, caption: str) -> str:
    """32 hexadecimal digits: BLAKE2b-128 of the source's name, the URL and the cleaned caption."""
    identity = "\n".join((source, url, caption))
    return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()


# In the metadata of SHARDS_FILE: the setting of that name, as JSON.
MEMBERS = "data.index.members"
# Ends the name of the file beside a folder of shards that our download made.
PLAN = ".plan.json"


def downloaded(shard: str | Path) -> bool:
    """Whether `python -m data_pipeline download` made a shard, which keeps its plan beside the shard's folder."""
    folder = Path(shard).absolute().parent
    return folder.with_name(folder.name + PLAN).exists()


def content_hash(image: bytes) -> int:
    """A signed number of 64 bits: BLAKE2b of an image's CRC-32, its length and its last bytes.

    A cryptographic hash of all bytes would take as long as everything else that indexing does for a sample.
    """
    ends = zlib.crc32(image).to_bytes(4, "little") + len(image).to_bytes(8, "little") + image[-HASHED_BYTES:]
    return int.from_bytes(hashlib.blake2b(ends, digest_size=8).digest(), "little", signed=True)


# Bytes at an image's end that its hash is made of.
HASHED_BYTES = 1024
SHARDS_FILE = "shards.parquet"
SAMPLES_FILES = "samples-*.parquet"
# Of pyarrow as it reads a damaged file: names of columns may no longer be UTF-8.
READ_ERRORS = (OSError, pa.ArrowException, UnicodeDecodeError)
INDEX = "`python -m data_pipeline index` with the same settings of data"

SAMPLE_SCHEMA: pa.Schema = pa.schema(
    [
        pa.field("uid", pa.string()),  # pair_uid
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
# What is written. Manifests of earlier versions lack the content_hash of the image's bytes, and the files of further
# modalities. A sample without an image has a width of 0, and place and hash of the first of those files.
MEMBER: pa.DataType = pa.struct([("modality", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
STORED_SCHEMA: pa.Schema = SAMPLE_SCHEMA.append(pa.field("content", pa.int64())).append(
    pa.field("members", pa.list_(MEMBER))
)
SHARD_SCHEMA: pa.Schema = pa.schema(
    [
        pa.field("path", pa.string()),  # relative to the manifest's folder
        pa.field("source", pa.string()),
        pa.field("bytes", pa.int64()),
        pa.field("modified_ns", pa.int64()),
        pa.field("sha256", pa.string()),
        pa.field("samples", pa.int32()),
        # Number of samples for each shortest side, to count those large enough for a phase without reading them. A
        # sample that is no pair of image and caption has 0.
        pa.field("sides", pa.list_(pa.int32())),
        pa.field("side_counts", pa.list_(pa.int32())),
        pa.field("broken", pa.string()),  # JSON: reason -> number of omitted samples
        pa.field("decoded", pa.bool_()),  # true: every image was decoded, false: only the headers
        pa.field("samples_file", pa.string()),
        pa.field("row_group", pa.int32()),
        # Rows that do not take part, because their image comes too often. Null in manifests of earlier versions.
        pa.field("left_out", pa.list_(pa.int32())),
    ]
)
# Columns that manifests of earlier versions lack.
LATER_COLUMNS = ("left_out",)
# What a reader needs.
SHARD_COLUMNS = [name for name in SHARD_SCHEMA.names if name not in ("broken", "decoded")]
# Columns that may have nulls.
NULLABLE = (*LATER_COLUMNS, "content", "members")
TAR_BLOCK = 512
# Footers of files of samples that a reader keeps: each takes more than a megabyte, and a large set has thousands.
FOOTERS = 32
# Rows of a list of shards: more than that are damage, and would fill the memory.
MOST_SHARDS = 10_000_000
# Characters of a library's message that are shown.
SHOWN = 300


class ManifestError(ValueError):
    """A manifest cannot be used. The message is one line."""


@dataclass(frozen=True)
class ShardRows:
    """The columns that a reader needs of one shard's n samples, in their order in the tar.

    Attributes:
        offset, size: int64 [n] of the image bytes.
        side: int32 [n] shortest side in pixels; -1 for a sample that does not take part, 0 for one that lacks its image
            or its caption.
        orientation: int8 [n] of the stored images: EXIF's 1 (upright) to 8.
        captions, keys: pyarrow strings [n]; a key begins the image's file name in the tar.
        pictured: bool [n] whether there is an image.
        members: by further modality, int64 (offset, size) [n] of its files; a size of -1 without one.
    """

    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    side: NDArray[np.int32]
    orientation: NDArray[np.int8]
    captions: pa.Array
    keys: pa.Array
    pictured: NDArray[np.bool_]
    members: Mapping[str, tuple[NDArray[np.int64], NDArray[np.int64]]]

    def __len__(self) -> int:
        return len(self.offset)

    def has(self, modality: str) -> NDArray[np.bool_]:
        """bool [n]: which samples have a modality."""
        if modality == "text":
            return pc.not_equal(self.captions, "").to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]
        if modality == "image":
            return self.pictured
        return self.members[modality][1] >= 0 if modality in self.members else np.zeros(len(self), np.bool_)

    def of(self, modality: str) -> ShardRows | None:
        """The same rows with the places of a further modality's files; None if no row has one."""
        if modality not in self.members:
            return None
        offset, size = self.members[modality]
        return replace(self, offset=offset, size=size)


class Manifest:
    """A manifest's shards in memory; samples are read on request. Several threads may use it.

    Args:
        folder: written by `python -m data_pipeline index`.
        root: folder or address (http, https, s3, gs, ...) that the shards' paths are relative to; the manifest's own
            folder by default.

    Attributes:
        paths: of the shards, as in the manifest.
        shards: paths or addresses of the shards, under `root`.
        root: see above.
        sources: int32 [S] number of each shard's source, in `source_names`.
        bytes, modified, samples: int64 [S] size of each tar in bytes, its time in nanoseconds, and its rows.
        left_out: int64 [S] number of the rows that do not take part.

    Raises:
        ManifestError: it is missing or damaged, or has an earlier layout.
    """

    def __init__(self, folder: Path, root: str | None = None) -> None:
        self.folder = folder
        table = _checked(_read_shard_columns(folder, SHARD_COLUMNS), folder)
        self.paths: list[str] = table["path"].to_pylist()
        self.root = str(folder) if root is None else root
        self.shards = [_join(self.root, path) for path in self.paths]
        encoded = table["source"].combine_chunks().dictionary_encode()
        self.source_names: list[str] = encoded.dictionary.to_pylist()
        self.sources: NDArray[np.int32] = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int32)
        self.bytes: NDArray[np.int64] = table["bytes"].to_numpy()
        self.modified: NDArray[np.int64] = table["modified_ns"].to_numpy()
        self.samples: NDArray[np.int64] = table["samples"].to_numpy().astype(np.int64)
        self.hashes: list[str] = table["sha256"].to_pylist()
        self._files: list[str] = table["samples_file"].to_pylist()
        self._row_groups: NDArray[np.int32] = table["row_group"].to_numpy()
        self._sides, self._side_counts = table["sides"].combine_chunks(), table["side_counts"].combine_chunks()
        self._left_out = table["left_out"].combine_chunks()
        self.left_out: NDArray[np.int64] = pc.list_value_length(self._left_out).fill_null(0).to_numpy().astype(np.int64)
        self._footer = lru_cache(FOOTERS)(lambda name: pq.read_metadata(folder / name))

    def __len__(self) -> int:
        """Number of samples that take part."""
        return int(self.samples.sum() - self.left_out.sum())

    @property
    def modalities(self) -> list[str]:
        """The modalities beside images and captions whose files were indexed."""
        try:
            return sorted(set(json.loads(noted(self.folder, MEMBERS) or "{}").values()))
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise _damaged(error, self.folder) from error

    @property
    def identity(self) -> str:
        """16 hexadecimal digits. Like the order, they change when a shard is added, removed or made again."""
        described = zip(self.paths, self.hashes, (self.samples - self.left_out).tolist(), strict=True)
        return hashlib.blake2b(repr(list(described)).encode(), digest_size=8).hexdigest()

    def counts(self, min_side: int) -> NDArray[np.int64]:
        """int64 [S]: pairs of image and caption of each shard whose shortest side has at least `min_side` pixels."""
        return self._counted(self._sides.flatten().to_numpy() >= max(1, min_side))

    def partial(self) -> NDArray[np.int64]:
        """int64 [S]: number of samples of each shard that lack their image or their caption."""
        return self._counted(self._sides.flatten().to_numpy() == 0)

    def _counted(self, chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        lengths = np.diff(self._sides.offsets.to_numpy())
        owners = np.repeat(np.arange(len(self.paths)), lengths)
        weights = self._side_counts.flatten().to_numpy() * chosen
        return np.bincount(owners, weights, minlength=len(self.paths)).astype(np.int64)

    def rows(self, shard: int) -> ShardRows:
        """The samples of a shard; a ManifestError if their file is missing or damaged."""
        table = self.columns(shard, ["offset", "size", "orientation", "width", "height", "caption", "key", "members"])
        side = shortest_sides(table)
        side[self.left_out_rows(shard)] = -1
        return ShardRows(
            table["offset"].to_numpy(),
            table["size"].to_numpy().astype(np.int64),
            side,
            table["orientation"].to_numpy(),
            table["caption"].combine_chunks(),
            table["key"].combine_chunks(),
            table["width"].to_numpy() > 0,
            _members(table),
        )

    def left_out_rows(self, shard: int) -> NDArray[np.int32]:
        """Numbers of a shard's rows that do not take part."""
        rows = self._left_out[shard].values
        return np.empty(0, np.int32) if rows is None else rows.to_numpy()

    def contents(self, shard: int) -> NDArray[np.int64] | None:
        """int64 [n] hashes of a shard's images, of all rows; None if they are unknown, as in earlier versions."""
        table = self.columns(shard, ["content"])
        known = "content" in table.column_names and not table["content"].null_count
        return table["content"].to_numpy() if known else None

    def columns(self, shard: int, columns: Sequence[str]) -> pa.Table:
        """Columns of STORED_SCHEMA of a shard's samples; a ManifestError if their file is missing or damaged."""
        name, group = self._files[shard], int(self._row_groups[shard])
        try:
            footer = self._footer(name)
            if group >= footer.num_row_groups or footer.row_group(group).num_rows != self.samples[shard]:
                raise pa.ArrowInvalid(f"{self.paths[shard]} has other rows than in {SHARDS_FILE}")
            with pq.ParquetFile(self.folder / name, metadata=footer) as file:
                table: pa.Table = file.read_row_group(group, columns=list(columns), use_threads=False)
            if absent := set(columns) - {*table.column_names, *NULLABLE}:
                raise pa.ArrowInvalid(f"no column {min(absent)}")
            table = _fitting(table, STORED_SCHEMA)
            self._check_places(table, shard)
        except READ_ERRORS as error:
            raise ManifestError(
                f"data.manifest={self.folder}: {name} {_unreadable(error, self.folder / name)}"
            ) from error
        return table

    def _check_places(self, table: pa.Table, shard: int) -> None:
        """Raise an ArrowInvalid if images would be outside their tar."""
        if {"offset", "size"} <= set(table.column_names) and len(table):
            start, size = table["offset"].to_numpy(), table["size"].to_numpy()
            inside = (start >= TAR_BLOCK) & (size >= 0) & (start <= self.bytes[shard] - size.astype(np.int64))
            if not inside.all():
                raise pa.ArrowInvalid(f"row {inside.argmin()} of {self.paths[shard]} has a place outside the tar")
        for offset, size in _members(table).values():
            there = size >= 0
            if ((offset < TAR_BLOCK) | (offset > self.bytes[shard] - size))[there].any():
                raise pa.ArrowInvalid(f"{self.paths[shard]} has a file with a place outside the tar")
        if "orientation" in table.column_names and not np.isin(table["orientation"].to_numpy(), range(1, 9)).all():
            raise pa.ArrowInvalid(f"{self.paths[shard]} has an orientation that is not 1 to 8")

    def decoded(self, shard: int | None = None) -> bool:
        """Whether indexing decoded every image of a shard, or of all shards."""
        found = _read_shard_columns(self.folder, ["decoded"])["decoded"].to_pylist()
        return bool(all(found) if shard is None else found[shard])


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
        self._writer = pq.ParquetWriter(self._draft, STORED_SCHEMA, compression="zstd")

    def add(self, shard: Mapping[str, Any], samples: pa.Table) -> None:
        """Write the samples of a shard.

        Args:
            shard: its columns of SHARD_SCHEMA, except those that follow from the samples.
            samples: columns of STORED_SCHEMA; `content` and `members` may be missing.
        """
        for name in ("content", "members"):
            if name not in samples.column_names:
                samples = samples.append_column(name, pa.nulls(len(samples), STORED_SCHEMA.field(name).type))
        self._writer.write_table(samples.cast(STORED_SCHEMA), row_group_size=max(1, len(samples)))
        counted = {"samples": len(samples), **counted_sides(shortest_sides(samples))}
        self.rows.append({**shard, **counted, "samples_file": self.path.name, "row_group": len(self.rows)})

    def close(self) -> None:
        """Finish the file and publish it."""
        self._writer.close()
        sync(self._draft)
        self._draft.rename(self.path)
        sync(self.path.parent)


def shortest_sides(samples: pa.Table) -> NDArray[np.int32]:
    """int32 [n] shortest sides in pixels; 0 for a sample that lacks its image or its caption."""
    side = np.minimum(samples["width"].to_numpy(), samples["height"].to_numpy())
    side[pc.equal(samples["caption"], "").to_numpy()] = 0
    found: NDArray[np.int32] = side
    return found


def _members(samples: pa.Table) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """See `ShardRows.members`."""
    if "members" not in samples.column_names or samples["members"].null_count == len(samples):
        return {}
    column = samples["members"].combine_chunks()
    rows, files = pc.list_parent_indices(column).to_numpy(), column.flatten()
    modalities = files.field("modality").to_numpy(zero_copy_only=False)
    found = {}
    for modality in sorted(set(modalities.tolist())):
        own = modalities == modality
        offset, size = np.zeros(len(samples), np.int64), np.full(len(samples), -1, np.int64)
        offset[rows[own]], size[rows[own]] = files.field("offset").to_numpy()[own], files.field("size").to_numpy()[own]
        found[modality] = offset, size
    return found


def counted_sides(side: NDArray[np.int32]) -> dict[str, list[int]]:
    """The columns that count a shard's samples by their shortest side, int32 [n]; negative ones do not take part."""
    sides, counts = np.unique(side[side >= 0], return_counts=True)
    return {"sides": sides.tolist(), "side_counts": counts.tolist()}


def read_shards(folder: Path) -> pa.Table:
    """The shards of a manifest, with the columns of SHARD_SCHEMA; empty if the manifest does not exist yet.

    Raises:
        ManifestError: it exists and cannot be read.
    """
    if not (folder / SHARDS_FILE).exists():
        return SHARD_SCHEMA.empty_table()
    return _checked(_read_shard_columns(folder, SHARD_SCHEMA.names), folder)


def noted(folder: Path, setting: str) -> str | None:
    """A setting that a manifest was made with; None if the manifest does not name it.

    Raises:
        ManifestError: the manifest cannot be read.
    """
    try:
        value = (pq.read_schema(folder / SHARDS_FILE).metadata or {}).get(setting.encode())
    except READ_ERRORS as error:
        raise ManifestError(
            f"data.manifest={folder}: {SHARDS_FILE} {_unreadable(error, folder / SHARDS_FILE)}"
        ) from error
    return None if value is None else value.decode(errors="replace")


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
            if not set(missing) <= set(LATER_COLUMNS):
                raise ManifestError(f"{place} has another layout, without {', '.join(missing)}; {_anew(folder)}")
            if file.metadata.num_rows > MOST_SHARDS:
                raise pa.ArrowInvalid(f"{file.metadata.num_rows:,} rows are too many")
            table: pa.Table = file.read(columns=list(columns))
            for column in missing:
                table = table.append_column(column, pa.nulls(len(table), SHARD_SCHEMA.field(column).type))
            return table.select(columns)
    except FileNotFoundError as error:
        if folder.is_dir() or not folder.is_symlink():
            raise ManifestError(f"{place} is not there; make it with {INDEX}, or give another folder") from error
        raise ManifestError(f"{place} {_unreadable(error, folder)}") from error
    except READ_ERRORS as error:
        if folder.is_file():
            raise ManifestError(
                f"data.manifest={folder}: is a file; give the folder that holds {SHARDS_FILE}"
            ) from error
        raise ManifestError(f"{place} {_unreadable(error, folder / SHARDS_FILE)}") from error


def _checked(shards: pa.Table, folder: Path) -> pa.Table:
    """Rows of shards in the types of SHARD_SCHEMA; a ManifestError if they cannot be a manifest's."""
    try:
        table = _fitting(shards, SHARD_SCHEMA)
        sides, counts = table["sides"].combine_chunks(), table["side_counts"].combine_chunks()
        listed = np.diff(sides.offsets.to_numpy())
        if (listed != np.diff(counts.offsets.to_numpy())).any() or sides.flatten().null_count:
            raise pa.ArrowInvalid("sides and side_counts differ")
        numbers = [*(table[name].to_numpy() for name in ("bytes", "samples", "row_group")), counts.flatten().to_numpy()]
        if any((each < 0).any() for each in numbers):
            raise pa.ArrowInvalid("a negative number")
        if "left_out" in table.column_names:
            left_out = table["left_out"].combine_chunks()
            owners = pc.list_parent_indices(left_out).to_numpy()
            rows = left_out.flatten().to_numpy()
            if ((rows < 0) | (rows >= table["samples"].to_numpy()[owners])).any():
                raise pa.ArrowInvalid("left_out names rows that are not there")
        owners = np.repeat(np.arange(len(table)), listed)
        if (np.bincount(owners, counts.flatten().to_numpy(), len(table)) > table["samples"].to_numpy()).any():
            raise pa.ArrowInvalid("side_counts exceed samples")
        if any(Path(name).name != name for name in table["samples_file"].unique().to_pylist()):
            raise pa.ArrowInvalid("a file of samples outside the folder")
        for text in table["broken"].unique().to_pylist() if "broken" in table.column_names else ():
            if not all(isinstance(count, int) for count in json.loads(text).values()):
                raise pa.ArrowInvalid("broken has no counts")
    except (pa.ArrowException, ValueError, AttributeError, RecursionError) as error:
        raise _damaged(error, folder) from error
    return table


def _fitting(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table in the types of a schema; raises an ArrowException if it does not fit, or has nulls."""
    for name in table.column_names:
        if name in schema.names and table[name].null_count and name not in NULLABLE:
            raise pa.ArrowInvalid(f"column {name} has nulls")
    fitting = table.cast(pa.schema([schema.field(name) for name in table.column_names]))
    # Among others, whether text is UTF-8.
    fitting.validate(full=True)
    return fitting


def _damaged(error: Exception, folder: Path) -> ManifestError:
    told = f"{SHARDS_FILE} is damaged ({one_line(error)[:SHOWN]}); {_anew(folder)}"
    return ManifestError(f"data.manifest={folder}: {told}")


def _unreadable(error: Exception, path: Path) -> str:
    """Cause and remedy for a file of a manifest. Only a damaged or missing file must be indexed again."""
    found = system_error(error)
    if found is not None and found.errno not in (None, errno.ENOENT, errno.EINVAL):
        return unreadable(found, path)
    if isinstance(error, FileNotFoundError):
        return f"is not there; run {INDEX}, which reads its shards again"
    return f"cannot be read ({one_line(error)[:SHOWN]}); {_anew(path.parent)}"


def _anew(folder: Path) -> str:
    return f"move the folder {folder} away and make it again with {INDEX}"


def _join(root: str, path: str) -> str:
    """A shard's location: its path is relative to the root unless it is absolute or an address."""
    if "://" in path or path.startswith("/"):
        return path
    root = root.removeprefix("file://")
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
