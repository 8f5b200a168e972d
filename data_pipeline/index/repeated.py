"""Pairs that a manifest lists more than once, as it does after the same rows were downloaded into two folders."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vdtrain.data.manifest import Manifest
from vdtrain.progress import track

# Names that are compared at once, 24 bytes each while they are sorted.
MAX_UIDS = 1 << 26
_DIGITS = np.zeros(256, np.uint64)
_DIGITS[list(b"0123456789abcdef")] = np.arange(16)
DIGITS = 16


@dataclass(frozen=True)
class Repeated:
    """What is listed more than once.

    Attributes:
        samples: beyond the first of each name.
        compared: share of all names that were looked at, a random one; `samples` is scaled up from it.
        example: two shards that have a name in common.
    """

    samples: int
    compared: float
    example: tuple[str, str] | None


def repeated_uids(manifest: Manifest, max_uids: int = MAX_UIDS) -> Repeated:
    """Count the samples of a manifest whose name another one before it has.

    Of more than `max_uids` samples those are compared whose names begin with enough bits of zero: names are hashes, and
    those that are alike are all among them or none.
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
    """The first 64 bits of names of hexadecimal digits."""
    first = pc.utf8_slice_codeunits(uids, 0, DIGITS)
    letters = np.frombuffer("".join(first.to_pylist()).encode(), np.uint8).reshape(len(uids), DIGITS)
    values = np.zeros(len(uids), np.uint64)
    for column in range(DIGITS):
        values = values << np.uint64(4) | _DIGITS[letters[:, column]]
    return values
