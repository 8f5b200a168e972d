"""Finds pairs and images that a manifest lists more than once.

Pairs repeat because rows were downloaded into two folders, images because servers send a placeholder for a missing one.
Images are compared by a hash of their bytes in the tar. The download encodes one and the same file to the same bytes
every time; other sizes and other encodings of a picture are not found.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vdtrain.data.manifest import Manifest
from vdtrain.progress import track

# Hashes that are compared at once, 24 bytes each while they are sorted; more are divided by their first bits.
MAX_HASHES = 1 << 25
# The reason under which samples are counted that are left out.
REPEATED_IMAGE = "repeated image"
# Most frequent images that are named.
NAMED = 3


def left_out(shards: pa.Table, manifest: Manifest) -> Counter[str]:
    """Samples that a manifest leaves out, by reason; `shards` are its rows of `read_shards`."""
    found: Counter[str] = Counter()
    for line in shards["broken"].to_pylist():
        found.update(json.loads(line))
    return found + Counter({REPEATED_IMAGE: int(manifest.left_out.sum())})


class Frequent(NamedTuple):
    """An image that comes several times: its first place, by numbers of the shard and of the row."""

    times: int
    shard: int
    row: int


@dataclass(frozen=True)
class RepeatedImages:
    """Images that are listed more than once."""

    images: int  # number of different ones
    samples: int  # number of the samples that have them
    unknown: int  # samples of shards that an earlier version indexed, without the hashes
    frequent: list[Frequent]  # the most frequent images, the most frequent one first
    above: NDArray[np.int64]  # ascending hashes of the images that come more often than allowed

    def text(self, manifest: Manifest) -> str:
        """The counts and the most frequent images in a line."""
        named = []
        for times, shard, row in self.frequent:
            key = manifest.columns(shard, ["key"])["key"][row].as_py()
            named.append(f"{times:,} x {manifest.paths[shard]}, key {key}")
        found = f"{self.images:,} in {self.samples:,} samples" + (f"; most often {'; '.join(named)}" if named else "")
        earlier = " samples were indexed by an earlier version and are not compared"
        return found + (f"; {self.unknown:,}{earlier}" if self.unknown else "")


def repeated_images(manifest: Manifest, allowed: int | None = None, max_hashes: int = MAX_HASHES) -> RepeatedImages:
    """Count the images that a manifest lists more than once.

    Hashes beyond `max_hashes` are kept in temporary files, 8 bytes a sample. What is kept in memory beside them is 8
    bytes for each different image that comes more often than allowed.

    Args:
        allowed: how often an image may come; None for any number.
    """
    images = samples = known = 0
    above = [np.empty(0, np.int64)]
    top = np.empty((0, 2), np.int64)
    for hashes in _parts(manifest, max_hashes):
        hashes.sort()
        starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]])[: len(hashes)])
        counts = np.diff(starts, append=len(hashes))
        found, counts = hashes[starts[counts > 1]], counts[counts > 1]
        known, images, samples = known + len(hashes), images + len(found), samples + int(counts.sum())
        if allowed is not None:
            above.append(found[counts > allowed])
        top = np.concatenate([top, np.stack([counts, found], -1)])
        # The hash decides between equal counts, so that the order of the shards does not matter.
        top = top[np.lexsort((top[:, 1], -top[:, 0]))[:NAMED]]
    unknown = int(manifest.samples.sum()) - known
    return RepeatedImages(images, samples, unknown, _places(manifest, top), np.sort(np.concatenate(above)))


def rows_of(manifest: Manifest, shard: int, hashes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers of a shard's rows whose image has one of some hashes, in ascending order."""
    contents = manifest.contents(shard)
    if not len(hashes) or contents is None:
        return np.empty(0, np.int64)
    places = np.minimum(np.searchsorted(hashes, contents), len(hashes) - 1)
    return np.flatnonzero(hashes[places] == contents)


def _places(manifest: Manifest, top: NDArray[np.int64]) -> list[Frequent]:
    """The first place of each of some images, by rows of count and hash."""
    found: dict[int, Frequent] = {}
    wanted = np.sort(top[:, 1])
    for shard in range(len(manifest.paths) if len(top) else 0):
        rows = rows_of(manifest, shard, wanted)
        contents = manifest.contents(shard) if len(rows) else None
        if contents is not None:
            for row in rows.tolist():
                found.setdefault(int(contents[row]), Frequent(0, shard, row))
        if len(found) == len(top):
            break
    return [found[content]._replace(times=count) for count, content in top.tolist()]


def _parts(manifest: Manifest, max_hashes: int) -> Iterator[NDArray[np.int64]]:
    """The hashes of all images, in parts of some `max_hashes`; equal ones are in the same part."""
    bits = max(0, (int(manifest.samples.sum()) - 1).bit_length() - (max_hashes - 1).bit_length())
    shards = track(range(len(manifest.paths)), "compare images", "shards")
    each = (contents for shard in shards if (contents := manifest.contents(shard)) is not None)
    if not bits:
        yield np.concatenate([np.empty(0, np.int64), *each])
        return
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        paths = [Path(folder, str(part)) for part in range(1 << bits)]
        files = [stack.enter_context(path.open("wb")) for path in paths]
        for contents in each:
            parts = contents.view(np.uint64) >> np.uint64(64 - bits)
            for part in np.unique(parts).tolist():
                files[part].write(contents[parts == part].tobytes())
        stack.close()
        for path in paths:
            yield np.fromfile(path, np.int64)


# Uids that are compared at once, 24 bytes each while they are sorted.
MAX_UIDS = 1 << 26
_DIGITS = np.zeros(256, np.uint64)
_DIGITS[list(b"0123456789abcdef")] = np.arange(16)
DIGITS = 16


@dataclass(frozen=True)
class Repeated:
    """Samples that are listed more than once."""

    samples: int  # number of repeated samples, without the first of each uid; an estimate if `compared` is below 1
    compared: float  # share of all uids that were compared
    example: tuple[str, str] | None  # two shards that share a uid


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
