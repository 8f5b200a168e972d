"""Which of billions of values have come before: 64-bit hashes in buckets on the disk, sorted bucket by bucket.

Two different values share a hash once in 2^64 pairs: among n = 2.7e9 rows n^2 / 2 / 2^64 = 0.2 rows are expected to be
dropped wrongly. A bucket is sorted in memory, and beside it there is one bit per row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

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
