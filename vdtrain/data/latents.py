"""Cached latents: for every sample of a manifest the moments that the image VAE's encoder gives for its centre crop."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vdtrain.data.manifest import Manifest, ManifestError
from vdtrain.data.shards import StreamError
from vdtrain.errors import unreadable
from vdtrain.files import sync

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
        resolution: side of the images in pixels.
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


# Whose latents are cached: what `vdtrain.data.stream.PairStream` calls its images.
MODALITY = "image"
DESCRIPTION_FILE = "latents.json"
OPEN_FILES = 256


class LatentFolder:
    """The files of one resolution, and beside them a description of what they have in common.

    Args:
        folder: with a folder of its own for every resolution.
    """

    def __init__(self, folder: str | Path, resolution: int) -> None:
        self.path = Path(folder) / str(resolution)
        self.setting = f"data.latent_cache.folder={folder}"

    def description(self) -> LatentDescription | None:
        """What is written there; None where nothing is.

        Raises:
            ManifestError: it cannot be read, or is of another layout.
        """
        path = self.path / DESCRIPTION_FILE
        try:
            return LatentDescription.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ManifestError(f"{self.setting}: {path} {unreadable(error, path, 'give another folder')}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ManifestError(
                f"{self.setting}: {path} cannot be used ({error}); remove {self.path}, or give another folder"
            ) from error

    def path_of(self, manifest: Manifest, shard: int) -> Path:
        """Where the latents of a shard are, or are to be."""
        return self.path / file_name(manifest.paths[shard], manifest.hashes[shard])

    def missing(self, manifest: Manifest, min_side: int) -> list[int]:
        """Numbers of the shards that have samples of that shortest side, in pixels, and no file: by one list of names.

        A file is made under its name once it is whole, and another shard's has another name.
        """
        names = self.names()
        return [
            int(shard)
            for shard in np.flatnonzero(manifest.counts(min_side))
            if file_name(manifest.paths[shard], manifest.hashes[shard]) not in names
        ]

    def names(self) -> set[str]:
        """Names of all that is in the folder."""
        try:
            return set(os.listdir(self.path))
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise ManifestError(f"{self.setting}: {unreadable(error, self.path, 'give another folder')}") from error


class LatentShards:
    """Reads cached moments, from any number of threads.

    Args:
        folder: what `python -m data_pipeline latents` wrote, on this machine or a disk that it shares.
        resolution: side of the images in pixels.
        vae: fingerprint of the encoder that they have to be of; None takes what is there.
        min_side: samples of this shortest side and more are to be in the cache; the resolution by default.

    Attributes:
        shape: of one sample's moments, e.g. (8, 32, 32).

    Raises:
        ManifestError: the latents of a shard are missing, or were made of other shards, or with another VAE.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: Manifest,
        resolution: int,
        *,
        vae: str | None = None,
        min_side: int | None = None,
    ) -> None:
        self._folder, self._manifest = LatentFolder(folder, resolution), manifest
        min_side = resolution if min_side is None else min_side
        description = self._folder.description()
        command = f"make them with `python -m data_pipeline latents data.latent_cache.resolutions=[{resolution}]`"
        if description is None:
            raise ManifestError(f"{self._folder.setting}: no latents of resolution {resolution}; {command}")
        if vae is not None and description.vae != vae:
            raise ManifestError(
                f"{self._folder.setting}: {self._folder.path} was made with another VAE ({description.vae}, and the "
                f"model's is {vae}); choose its model, give another folder, or remove it and {command}"
            )
        if description.min_side > min_side:
            raise ManifestError(
                f"{self._folder.setting}: {self._folder.path} has images from {description.min_side} pixels on, and "
                f"data.stream.min_side asks for those from {min_side}; remove it and {command}"
            )
        missing = self._folder.missing(manifest, min_side)
        if missing:
            names = self._folder.names()
            made = {name.rpartition("-")[0] + "-" for name in names}
            stale = sum(file_prefix(manifest.paths[shard]) in made for shard in missing)
            other = f" ({stale:,} of them were made anew since their latents were)" if stale else ""
            raise ManifestError(
                f"{self._folder.setting}: {self._folder.path} lacks the latents of {len(missing):,} of "
                f"{len(manifest.paths):,} shards{other}; {command}"
            )
        self.shape = description.shape
        self._description = description
        self._files: OrderedDict[int, LatentFile] = OrderedDict()
        self._lock = Lock()

    def is_bad(self, shard: int, row: int) -> bool:
        """Whether the image of a shard's row could not be encoded.

        Raises:
            StreamError: as `read`.
        """
        file = self._file(shard)
        return bool(file.bad[file.place(row)])

    def read(self, shard: int, rows: NDArray[np.int64], out: Tensor) -> None:
        """Moments of a shard's rows, numbered as in the manifest, into `out` [n, *shape] of any precision.

        Raises:
            StreamError: the file is damaged or of another shard, or a row's side was below the cache's `min_side`.
        """
        file = self._file(shard)
        found = np.empty((len(rows), *self.shape), FLOAT16)
        for place, row in enumerate(rows):
            file.read(int(row), found[place])
        out.copy_(torch.from_numpy(found))

    def _file(self, shard: int) -> LatentFile:
        with self._lock:
            if shard in self._files:
                self._files.move_to_end(shard)
                return self._files[shard]
        path = self._folder.path_of(self._manifest, shard)
        file = LatentFile(path, self._description, self._manifest.hashes[shard])
        with self._lock:
            self._files[shard] = file
            while len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        return file
