"""Lists of URLs and of hashes that must not be downloaded, as sorted 64-bit hashes that all processes share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.select.sources import schema_of
from vdtrain.config.compose import ConfigError
from vdtrain.config.data_schema import BlockListConfig, SourceConfig
from vdtrain.errors import not_utf8, unreadable

# Some 100 MB while a bucket of this many rows is sorted.
BUCKET_ROWS = 1 << 21


@dataclass(frozen=True)
class HashFiles:
    """The hashes of one unit of rows in its folder, grouped by bucket, in the order of the rows within each.

    Attributes:
        folder: the unit's.
        base: the number of the unit's first row among all rows.
    """

    folder: Path
    base: int

    def read(self, kind: str, bucket: int) -> tuple[np.ndarray, np.ndarray]:
        """Hashes (uint64) of a bucket and the numbers of their rows among all rows (int64), ascending."""
        start, end = np.load(self.folder / f"{kind}_offsets.npy", mmap_mode="r")[bucket : bucket + 2]
        hashes = np.load(self.folder / f"{kind}_hashes.npy", mmap_mode="r")[start:end]
        rows = np.load(self.folder / f"{kind}_rows.npy", mmap_mode="r")[start:end]
        return hashes, rows.astype(np.int64) + self.base


def hash_values(values: pa.Array) -> np.ndarray:
    """BLAKE2b-64 of strings without nulls, uint64."""
    blake2b = hashlib.blake2b
    digests = [blake2b(value, digest_size=8).digest() for value in values.cast(pa.binary()).to_pylist()]
    return np.frombuffer(b"".join(digests), np.uint64)


def bucket_bits(rows: int) -> int:
    """Bits of a hash that name its bucket, so that a bucket holds `BUCKET_ROWS` rows or fewer on average."""
    return max(0, -(-rows // BUCKET_ROWS) - 1).bit_length()


def write_hashes(folder: Path, kind: str, hashes: np.ndarray, rows: np.ndarray, bits: int) -> None:
    """Write a unit's hashes and the numbers of their rows within it, ascending, into the unit's folder."""
    # 16 bits are sorted by radix.
    buckets = (hashes >> np.uint64(63 - bits) >> np.uint64(1)).astype(np.uint16 if bits <= 16 else np.uint32)
    order = np.argsort(buckets, kind="stable")
    offsets = np.searchsorted(buckets[order], np.arange((1 << bits) + 1))
    np.save(folder / f"{kind}_hashes.npy", hashes[order])
    np.save(folder / f"{kind}_rows.npy", rows[order].astype(np.uint32))
    np.save(folder / f"{kind}_offsets.npy", offsets)


def repeated_rows(units: Sequence[HashFiles], kind: str, bucket: int, alive: np.ndarray | None = None) -> np.ndarray:
    """Rows of a bucket whose hash an earlier row has, int64, ascending.

    Args:
        alive: one bit per row, packed; rows without it are passed over.
    """
    read = [unit.read(kind, bucket) for unit in units]
    hashes = np.concatenate([hashes for hashes, _ in read])
    rows = np.concatenate([rows for _, rows in read])
    if alive is not None:
        living = has_bits(alive, rows)
        hashes, rows = hashes[living], rows[living]
    # Stable: among equal hashes the rows stay in their order, and all but the first are repeated.
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    return np.sort(rows[order[1:][ordered[1:] == ordered[:-1]]])


def has_bits(bits: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Whether the bits at some places are set, as booleans."""
    found: np.ndarray = (bits[places >> 3] >> (places & 7).astype(np.uint8) & 1).astype(bool)
    return found


def clear_bits(bits: np.ndarray, places: np.ndarray) -> None:
    """Clear the bits at some places."""
    np.bitwise_and.at(bits, places >> 3, ~(np.uint8(1) << (places & 7).astype(np.uint8)))


def count_bits(bits: np.ndarray) -> int:
    """How many bits are set."""
    return int(np.bitwise_count(bits).sum())


BATCH_LINES = 1 << 16
HASHES = ("hash", "md5", "phash")


@dataclass
class BlockLists:
    """Sorted hashes (uint64) of blocked URLs, and of blocked values by role: hash, md5 or phash."""

    urls: np.ndarray | None = None
    hashes: dict[str, np.ndarray] = field(default_factory=dict)

    def has_urls(self, urls: pa.Array) -> np.ndarray:
        """Whether each of some URLs is blocked, as booleans."""
        assert self.urls is not None
        return _contained(self.urls, hash_values(urls))

    def has_hashes(self, role: str, values: pa.Array) -> np.ndarray:
        """Whether each value of a role's column is blocked, as booleans; a null is not."""
        present = values.is_valid().to_numpy(zero_copy_only=False)
        blocked = np.zeros(len(values), bool)
        blocked[present] = _contained(self.hashes[role], hash_values(_normal(values.drop_null())))
        return blocked

    def save(self, folder: Path) -> None:
        """Write the lists to a folder that `load` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.urls is not None:
            np.save(folder / "url.npy", self.urls)
        for name, values in self.hashes.items():
            np.save(folder / f"{name}.npy", values)

    @classmethod
    def load(cls, folder: Path) -> BlockLists:
        """Lists in memory that all processes of a machine share."""
        arrays = {file.stem: np.load(file, mmap_mode="r") for file in sorted(folder.glob("*.npy"))}
        return cls(arrays.pop("url", None), arrays)


def read_block_lists(config: BlockListConfig, sources: Mapping[str, SourceConfig]) -> BlockLists:
    """Read the files that a configuration names.

    Raises:
        ConfigError: a file cannot be read or is empty, or no source has the column that a list is for.
    """
    lists = {role: files for role in HASHES if (files := getattr(config, role))}
    known = {role for name, source in sources.items() for role in schema_of(name, source.schema).roles}
    for role in lists:
        if role not in known:
            raise ConfigError(
                f"data.select.block_lists.{role}: no source has such a column; leave the list out, or add one that has"
            )
    setting = "data.select.block_lists"
    urls = _read(f"{setting}.url", config.url) if config.url else None
    return BlockLists(urls, {role: _read(f"{setting}.{role}", files) for role, files in lists.items()})


def _read(setting: str, files: Sequence[str]) -> np.ndarray:
    pieces = []
    for name in files:
        count = 0
        try:
            for values in _entries(setting, Path(name)):
                pieces.append(hash_values(values if setting.endswith(".url") else _normal(values)))
                count += len(values)
        except OSError as error:
            raise ConfigError(f"{setting}: {name} {unreadable(error, Path(name))}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{setting}: {name} {not_utf8(error, Path(name))}") from error
        except pa.ArrowInvalid as error:
            raise ConfigError(f"{setting}: {name} cannot be read ({error}); give another file") from error
        if count == 0:
            # An empty list blocks nothing, which nobody who gives one can mean.
            raise ConfigError(f"{setting}: {name} is empty; give another file, or leave it out")
    return np.unique(np.concatenate(pieces)) if pieces else np.empty(0, np.uint64)


def _entries(setting: str, file: Path) -> Iterator[pa.Array]:
    """The entries of a list in batches of strings, without white space around them and empty lines."""
    if file.suffix == ".parquet":
        with pq.ParquetFile(file) as parquet:
            if len(parquet.schema_arrow.names) != 1:
                raise ConfigError(
                    f"{setting}: {file} has the columns {', '.join(parquet.schema_arrow.names)}; leave the one to block"
                )
            for batch in parquet.iter_batches(BATCH_LINES):
                yield from _stripped(batch.column(0).cast(pa.string()))
        return
    with file.open(encoding="utf-8-sig") as lines:
        gathered: list[str] = []
        for line in lines:
            gathered.append(line)
            if len(gathered) == BATCH_LINES:
                yield from _stripped(pa.array(gathered, pa.string()))
                gathered = []
        yield from _stripped(pa.array(gathered, pa.string()))


def _stripped(values: pa.Array) -> Iterator[pa.Array]:
    stripped = pc.utf8_trim_whitespace(values.drop_null())
    yield stripped.filter(pc.not_equal(stripped, ""))


def _normal(values: pa.Array) -> pa.Array:
    """Hashes as text, in lower case: hexadecimal digits are written in both."""
    return pc.utf8_lower(values.cast(pa.string()))


def _contained(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    if len(ordered) == 0 or len(values) == 0:
        return np.zeros(len(values), bool)
    places = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return np.asarray(ordered[places] == values)
