"""Finds pairs that a manifest lists more than once, e.g. because rows were downloaded into two folders."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vdtrain.data.manifest import Manifest
from vdtrain.progress import track

# Uids that are compared at once, 24 bytes each while they are sorted.
MAX_UIDS = 1 << 26
_DIGITS = np.zeros(256, np.uint64)
_DIGITS[list(b"0123456789abcdef")] = np.arange(16)
DIGITS = 16


@dataclass(frozen=True)
class Repeated:
    """Samples that are listed more than once.

    Attributes:
        samples: number of repeated samples, without the first of each uid; an estimate if `compared` is below 1.
        compared: share of all uids that were compared.
        example: two shards that share a uid.
    """

    samples: int
    compared: float
    example: tuple[str, str] | None


def repeated_uids(manifest: Manifest, max_uids: int = MAX_UIDS) -> Repeated:
    """Count the samples of a manifest with the uid of an earlier sample.

    Of more than `max_uids` samples, only those are compared whose uid starts with enough zero bits. Uids are hashes, so
    this is a random part, and it contains all or none of the samples with equal uids.
    """
    bits = max(0, (len(manifest) - 1).bit_length() - (max_uids - 1).bit_length())
    values = []
    for shard in track(range(len(manifest.paths)), "compare names", "shards"):
        names = _hash_values(manifest.columns(shard, ["uid"])["uid"].combine_chunks())
        values.append(names[names >> np.uint64(64 - bits) == 0] if bits else names)
    counts = np.cumsum([len(each) for each in values])
    every = np.concatenate([np.empty(0, np.uint64), *values])
    ordered = np.sort(every)
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    example = None
    if len(again):
        first, second = np.searchsorted(counts, np.flatnonzero(every == again[0])[:2], side="right")
        example = manifest.paths[first], manifest.paths[second]
    return Repeated(len(again) << bits, 2.0**-bits, example)


def _hash_values(uids: pa.Array) -> NDArray[np.uint64]:
    """The first 64 bits of hexadecimal uids."""
    first = pc.utf8_slice_codeunits(uids, 0, DIGITS)
    letters = np.frombuffer("".join(first.to_pylist()).encode(), np.uint8).reshape(len(uids), DIGITS)
    values = np.zeros(len(uids), np.uint64)
    for column in range(DIGITS):
        values = values << np.uint64(4) | _DIGITS[letters[:, column]]
    return values
