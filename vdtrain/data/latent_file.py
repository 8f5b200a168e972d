"""Files of cached latents, one beside each tar shard: the moments of its pictures at one resolution.

A file is safetensors, with three tensors for the n samples of the shard that are large enough, in their order:
`moments` float16 [n, *shape], first and at a fixed offset, so that one read gives one sample; `rows` int32 [n], their
numbers in the shard; `bad` uint8 [n], 1 where the picture could not be encoded and the moments are zeros.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vdtrain.data.shards import StreamError
from vdtrain.files import sync
from vdtrain.system_errors import unreadable

LAYOUT = 1
CROP = "centre"
SUFFIX = ".safetensors"
MOMENTS, ROWS, BAD = "moments", "rows", "bad"
FLOAT16 = np.dtype("<f2")
# The header is filled up with spaces to this size, so that moments begin with a page.
PAGE = 4096
LONGEST_HEADER = 1 << 20
REMEDY = "make it again with `python -m data_pipeline latents` and the same settings"

Moments = NDArray[np.float16]


@dataclass(frozen=True)
class LatentDescription:
    """What all files of one folder have in common.

    Attributes:
        resolution: side of the pictures in pixels.
        min_side: shortest side in pixels from which on a sample is in the file.
        shape: of one sample's moments, e.g. (8, 32, 32).
        vae: what the encoder was (`vdtrain.models.frozen_weights.fingerprint`).
        precision: bf16 or fp32, in which it ran.
    """

    resolution: int
    min_side: int
    shape: tuple[int, ...]
    vae: str
    precision: str

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape), "layout": LAYOUT, "crop": CROP, "dtype": "float16"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LatentDescription:
        """
        Raises:
            KeyError, TypeError, ValueError: the values are of another layout.
        """
        if (values["layout"], values["crop"], values["dtype"]) != (LAYOUT, CROP, "float16"):
            raise ValueError("another layout")
        numbers = {name: int(values[name]) for name in ("resolution", "min_side")}
        shape = tuple(map(int, values["shape"]))
        return cls(shape=shape, vae=str(values["vae"]), precision=str(values["precision"]), **numbers)


def file_prefix(path: str) -> str:
    """How the names of files for the shard at `path`, as it stands in the manifest, begin."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", path.removesuffix(".tar")).strip("-")[-80:]
    return f"{readable}-{hashlib.blake2b(path.encode(), digest_size=6).hexdigest()}-"


def file_name(path: str, sha256: str) -> str:
    """The name of the file for a shard: another one when the shard is made anew, so that a list of names tells it."""
    return f"{file_prefix(path)}{sha256[:16]}{SUFFIX}"


class LatentFileWriter:
    """Writes the file of one shard: moments as they come, the rest by `close`.

    Args:
        draft: where to write; it becomes `path` once it is whole and on the disk.
        sha256: of the shard.
        rows: int32 [n] numbers of the samples in the shard.
    """

    def __init__(
        self, path: Path, draft: Path, description: LatentDescription, sha256: str, rows: NDArray[np.int32]
    ) -> None:
        self.path, self.draft, self.rows = path, draft, rows.astype("<i4")
        self.bad: NDArray[np.uint8] = np.zeros(len(rows), np.uint8)
        self._header = _header(description, sha256, len(rows))
        self._row_bytes = prod(description.shape) * FLOAT16.itemsize
        draft.parent.mkdir(parents=True, exist_ok=True)
        self._file = draft.open("wb")
        self._file.write(self._header)

    def write(self, moments: Moments) -> None:
        """The next samples' moments, [k, *shape]."""
        self._file.write(np.ascontiguousarray(moments, FLOAT16).data)
        # Who looks at the draft's time sees that it is being worked at.
        self._file.flush()

    def close(self) -> None:
        """Finish the file and give it its name.

        Raises:
            ValueError: there are not as many moments as rows.
        """
        if self._file.tell() != len(self._header) + len(self.rows) * self._row_bytes:
            raise ValueError(f"{self.path}: {len(self.rows)} samples, and other than as many moments")
        self._file.write(self.rows.tobytes() + self.bad.tobytes())
        self._file.close()
        sync(self.draft)
        self.draft.replace(self.path)
        sync(self.path.parent)

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        self.draft.unlink(missing_ok=True)


class LatentFile:
    """One file, open to be read by any number of threads.

    Raises:
        StreamError: it is missing, truncated, of another shard or otherwise described.
    """

    def __init__(self, path: Path, description: LatentDescription, sha256: str) -> None:
        self.path = path
        self._descriptor = -1
        self._row_bytes = prod(description.shape) * FLOAT16.itemsize
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
            start = os.pread(self._descriptor, PAGE, 0)
            length = struct.unpack("<Q", start[:8])[0]
            if length > LONGEST_HEADER:
                raise ValueError("no header")
            self._start = 8 + length
            header = os.pread(self._descriptor, length, 8)
            count = int(json.loads(header)[ROWS]["shape"][0])
            if header != _header(description, sha256, count)[8:]:
                raise ValueError("made with other settings or of another shard")
            places = self._start + count * self._row_bytes
            tail = os.pread(self._descriptor, 5 * count + 1, places)
            if len(tail) != 5 * count:
                raise ValueError("truncated")
        except OSError as error:
            gone = isinstance(error, FileNotFoundError) and path.parent.is_dir()
            reason = f"is not there; {REMEDY}" if gone else unreadable(error, path, "see that it can be read")
            raise StreamError(f"{path}: {reason}") from error
        except (ValueError, KeyError, TypeError, IndexError, struct.error) as error:
            raise StreamError(f"{path}: not the latents of its shard ({error}); remove it and {REMEDY}") from error
        self.rows: NDArray[np.int32] = np.frombuffer(tail, "<i4", count)
        self.bad: NDArray[np.bool_] = np.frombuffer(tail, np.uint8, count, 4 * count).astype(bool)

    def __del__(self) -> None:
        # Not before the last thread that reads from it has let go.
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def place(self, row: int) -> int:
        """Where a sample of the shard stands in the file.

        Raises:
            StreamError: it is not in it.
        """
        place = int(np.searchsorted(self.rows, row))
        if place == len(self.rows) or self.rows[place] != row:
            raise StreamError(f"{self.path}: has no latent of sample {row}; remove it and {REMEDY}")
        return place

    def read(self, row: int, out: Moments) -> None:
        """Moments of a sample of the shard, into `out` [*shape], contiguous.

        Raises:
            StreamError: it is not in the file, or cannot be read.
        """
        place = self.place(row)
        try:
            count = os.preadv(self._descriptor, [out.data.cast("B")], self._start + place * self._row_bytes)
        except OSError as error:
            raise StreamError(f"{self.path}: {unreadable(error, self.path, 'see that it can be read')}") from error
        if count != self._row_bytes:
            raise StreamError(f"{self.path}: truncated; remove it and {REMEDY}")


def _header(description: LatentDescription, sha256: str, count: int) -> bytes:
    """The length, eight bytes, and what follows it up to the moments."""
    metadata = {name: json.dumps(value) for name, value in description.to_dict().items()}
    header: dict[str, Any] = {"__metadata__": {**metadata, "shard_sha256": sha256}}
    end = 0
    for name, dtype, shape, width in (
        (MOMENTS, "F16", [count, *description.shape], FLOAT16.itemsize),
        (ROWS, "I32", [count], 4),
        (BAD, "U8", [count], 1),
    ):
        begin, end = end, end + prod(shape) * width
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-(len(text) + 8) // PAGE) * PAGE - 8)
    return struct.pack("<Q", len(text)) + text
