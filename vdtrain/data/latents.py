"""Cached latents: for every sample of a manifest the moments that the image VAE's encoder gives for its centre crop.

One safetensors file per shard, of which readers read single rows: moments float16 [n, *shape], the images' offsets in
the tar int64 [n], a mark for images that could not be decoded uint8 [n], a checksum of each sample's moments int32 [n],
and the samples' row numbers in the shard int32 [n]. Its metadata tell the encoder's settings and the shard's checksum.

A sample is found by its offset: an index with other settings lists other samples of the same shard, and numbers them
anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from vdtrain.data.decode import DecodeError
from vdtrain.data.manifest import Manifest, ManifestError
from vdtrain.data.shards import OpenFiles, read_into
from vdtrain.errors import one_line, unreadable
from vdtrain.files import SHAPE_ERRORS, atomic_write, read_json
from vdtrain.storage.patience import StreamError

if TYPE_CHECKING:
    from torch import Tensor

LAYOUT = 2
CROP = "centre"
SUFFIX = ".safetensors"
MOMENTS, ROWS, OFFSETS, BAD, CHECKS = "moments", "rows", "offsets", "bad", "checks"
# Moments of a working encoder are far below it; NaN and infinity are above it.
LARGEST = 1000
# Numbers of one sample: those of an image of 16,384 pixels at an eighth of its side.
MOST_MOMENTS = 8 * 2048 * 2048
COMMAND = "python -m data_pipeline latents"
OTHERWISE = "remove it or, if the shards were indexed with other settings since, all files of"
REMEDY = f"encode its images again with `{COMMAND}` and the same settings"

Moments = NDArray[np.float16]


@dataclass(frozen=True)
class LatentDescription:
    """What all files of one folder have in common."""

    resolution: int  # side of the images in pixels
    min_side: int  # images with a shorter side, in pixels, are left out
    shape: tuple[int, ...]  # of one sample's moments, e.g. (8, 32, 32)
    vae: str  # fingerprint of the encoder (`vdtrain.models.frozen_weights.fingerprint`)
    precision: str  # bf16 or fp32, in which the encoder ran

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape), "layout": LAYOUT, "crop": CROP, "dtype": "float16"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LatentDescription:
        """From JSON; one of `vdtrain.files.SHAPE_ERRORS` if the values are of another layout."""
        if values["layout"] != LAYOUT:
            raise ValueError(f"its layout is {values['layout']}, this version reads layout {LAYOUT}")
        numbers = {name: int(values[name]) for name in ("resolution", "min_side")}
        shape = tuple(map(int, values["shape"]))
        if not 0 < math.prod(shape) <= MOST_MOMENTS or min(shape) < 1:
            raise ValueError(f"its shape is {shape}"[:100])
        return cls(shape=shape, vae=str(values["vae"]), precision=str(values["precision"]), **numbers)


def file_prefix(path: str) -> str:
    """The part of a file's name that follows from the path of its shard in the manifest."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", path.removesuffix(".tar")).strip("-")[-80:]
    return f"{readable}-{hashlib.blake2b(path.encode(), digest_size=6).hexdigest()}-"


def file_name(path: str, sha256: str) -> str:
    """The name of a shard's file; it changes with the shard, so that a list of names shows which files are missing."""
    return f"{file_prefix(path)}{sha256[:16]}{SUFFIX}"


def write_latents(
    path: Path,
    description: LatentDescription,
    sha256: str,
    rows: NDArray[np.int32],
    offsets: NDArray[np.int64],
    bad: NDArray[np.bool_],
    moments: Moments,
) -> None:
    """Write the file of one shard, whole or not at all.

    Args:
        sha256: of the shard.
        rows: [n] ascending numbers of the samples in the shard.
        offsets: [n] of their images in the tar.
        bad: [n] whether the image could not be encoded.
        moments: [n, *shape].
    """
    # safetensors writes memory as it lies, and encoders give channels last.
    moments = np.ascontiguousarray(moments)
    checks = np.fromiter((checksum(each) for each in moments), np.int32, len(moments))
    tensors: dict[str, NDArray[Any]] = {MOMENTS: moments, ROWS: rows, OFFSETS: offsets, CHECKS: checks}
    tensors[BAD] = bad.astype(np.uint8)
    with atomic_write(path) as draft:
        save_file(tensors, draft, _metadata(description, sha256))


def checksum(moments: Moments) -> int:
    """CRC-32 of a sample's moments, as int32."""
    return zlib.crc32(moments.data) - (1 << 31)


def out_of_range(moments: Moments) -> NDArray[np.bool_]:
    """[n] Whether a sample's moments [n, ...] are beyond any latent's, or not finite."""
    # Without their sign, the bits of float16 are ordered as the numbers are, and integers compare several times faster.
    bits = moments.view(np.uint16).reshape(len(moments), -1) & 0x7FFF
    beyond: NDArray[np.bool_] = bits.max(axis=1, initial=0) > np.float16(LARGEST).view(np.uint16)
    return beyond


def _metadata(description: LatentDescription, sha256: str) -> dict[str, str]:
    # One entry: safetensors writes several in any order, and equal files would differ.
    return {"latents": json.dumps({**description.to_dict(), "shard_sha256": sha256})}


# Types of numpy by their names in a header; other ones are in no file of latents.
KINDS: dict[str, np.dtype[Any]] = {
    name: np.dtype(kind) for name, kind in (("F16", np.float16), ("I64", np.int64), ("I32", np.int32), ("U8", np.uint8))
}
HEADER_BYTES = 1 << 20


class Column(NamedTuple):
    """Where a tensor lies in a file."""

    kind: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int


def read_header(file: int) -> tuple[dict[str, str], dict[str, Column]]:
    """Metadata and tensors of a safetensors file.

    It is read and not mapped: a disk's error in mapped memory ends the process.

    Raises:
        OSError: it cannot be read.
        ValueError, KeyError, ...: `vdtrain.files.SHAPE_ERRORS`; it is no such file, or is truncated.
    """
    size = os.fstat(file).st_size
    length = int.from_bytes(_bytes(file, 0, 8), "little")
    if length > min(HEADER_BYTES, size - 8):
        raise ValueError("no header")
    try:
        header = json.loads(bytes(_bytes(file, 8, length)))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    metadata, columns = dict(header.pop("__metadata__", {})), {}
    for name, each in header.items():
        column = Column(KINDS[each["dtype"]], tuple(map(int, each["shape"])), 8 + length + int(each["data_offsets"][0]))
        if min((*column.shape, column.offset)) < 0 or column.offset + _size(column) > size:
            raise ValueError(f"{name} ends after the file")
        columns[name] = column
    return metadata, columns


def _size(column: Column) -> int:
    return column.kind.itemsize * math.prod(column.shape)


def _bytes(file: int, offset: int, size: int) -> memoryview:
    memory = memoryview(bytearray(size))
    if read_into(file, memory, offset) < size:
        raise ValueError("it ends too early")
    return memory


def _values(file: int, column: Column) -> NDArray[Any]:
    return np.frombuffer(_bytes(file, column.offset, _size(column)), column.kind).reshape(column.shape)


class LatentFile:
    """What is in the file of a shard, and where; its moments stay on the disk.

    Args:
        file: descriptor of the open file.
        offsets: int64 [m] of the images of the shard's rows in the manifest.

    Raises:
        OSError: it cannot be read.
        StreamError: it is truncated, of another shard or made with other settings.
    """

    def __init__(
        self, path: Path, file: int, description: LatentDescription, sha256: str, offsets: NDArray[np.int64]
    ) -> None:
        self.path = path
        try:
            metadata, columns = read_header(file)
            if metadata != _metadata(description, sha256):
                raise ValueError("made with other settings or of another shard")
            self.moments = columns[MOMENTS]
            self.rows: NDArray[np.int32] = _values(file, columns[ROWS])
            self.bad: NDArray[np.uint8] = _values(file, columns[BAD])
            # Earlier versions wrote none of these two.
            self.checks: NDArray[np.int32] | None = _values(file, columns[CHECKS]) if CHECKS in columns else None
            stored: NDArray[np.int64] | None = _values(file, columns[OFFSETS]) if OFFSETS in columns else None
            self._check_shapes(description.shape, stored)
            # int64 [m]: for each of the shard's rows the place of its moments here; -1 without any.
            self.places = np.full(len(offsets), -1)
            if stored is None:
                self.places[self.rows] = np.arange(len(self.rows))
            elif len(stored):
                by_offset = np.argsort(stored)
                found = np.minimum(np.searchsorted(stored, offsets, sorter=by_offset), len(stored) - 1)
                same = stored[by_offset[found]] == offsets
                self.places[same] = by_offset[found[same]]
        except SHAPE_ERRORS as error:
            reason = one_line(error)[:200]
            raise StreamError(f"{path}: not the latents of its shard ({reason}); remove it and {REMEDY}") from error

    def _check_shapes(self, shape: tuple[int, ...], offsets: NDArray[np.int64] | None) -> None:
        """Raise a ValueError if the tensors are not what `write_latents` writes."""
        count = len(self.rows) if self.rows.ndim == 1 else -1
        columns: dict[str, tuple[NDArray[Any] | None, Any]] = {
            ROWS: (self.rows, np.int32),
            BAD: (self.bad, np.uint8),
            CHECKS: (self.checks, np.int32),
            OFFSETS: (offsets, np.int64),
        }
        for name, (column, kind) in columns.items():
            if column is not None and (column.dtype != kind or column.shape != (count,)):
                raise ValueError(f"{name} is {column.dtype} {column.shape}")
        if self.moments.kind != np.float16 or self.moments.shape != (count, *shape):
            raise ValueError(f"{MOMENTS} is {self.moments.kind} {self.moments.shape}")
        if (np.diff(self.rows, prepend=-1) <= 0).any():
            raise ValueError(f"{ROWS} do not ascend")

    def read(self, file: int, row: int) -> Moments:
        """The moments [*shape] of a sample of the shard.

        Raises:
            OSError: they cannot be read.
            StreamError: the file lacks it.
            DecodeError: its image could not be encoded, or the moments are damaged.
        """
        place = int(self.places[row])
        if place < 0:
            raise StreamError(
                f"{self.path}: has no latent of sample {row}; {OTHERWISE} {self.path.parent}, and {REMEDY}"
            )
        if self.bad[place]:
            raise DecodeError("no latent: its image could not be decoded")
        kind, (_, *shape), offset = self.moments
        one = Column(kind, tuple(shape), offset)
        try:
            found: Moments = _values(file, one._replace(offset=offset + place * _size(one)))
        except ValueError as error:
            raise StreamError(f"{self.path}: {error}; remove it and {REMEDY}") from error
        if self.checks is not None and checksum(found) != self.checks[place]:
            raise DecodeError(f"damaged latent: {self.path} does not hold what was written; remove it and {REMEDY}")
        if out_of_range(found[None])[0]:
            raise DecodeError(f"latent out of range: beyond {LARGEST} in {self.path}; remove it and {REMEDY}")
        return found


# Key of the images in a batch of `vdtrain.data.stream.PairStream`.
MODALITY = "image"
DESCRIPTION_FILE = "latents.json"
OPEN_FILES = 256


class LatentFolder:
    """The files of one resolution and their description, in a subfolder of the folder."""

    def __init__(self, folder: str | Path, resolution: int) -> None:
        self.path = Path(folder) / str(resolution)
        self.setting = f"data.latent_cache.folder={folder}"

    def description(self) -> LatentDescription | None:
        """The description of the files, None without one; a ManifestError if it is unreadable or of another layout."""
        path = self.path / DESCRIPTION_FILE
        try:
            return LatentDescription.from_dict(read_json(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ManifestError(f"{self.setting}: {path} {unreadable(error, path, 'give another folder')}") from error
        except SHAPE_ERRORS as error:
            raise ManifestError(
                f"{self.setting}: {path} cannot be used ({one_line(error)}); remove {self.path} and encode again with "
                f"`{COMMAND}`, or give another folder"
            ) from error

    def path_of(self, manifest: Manifest, shard: int) -> Path:
        """The file of a shard, whether it exists or not."""
        return self.path / file_name(manifest.paths[shard], manifest.hashes[shard])

    def missing(self, manifest: Manifest, min_side: int) -> list[int]:
        """Numbers of the shards without a file that have images with a shortest side of `min_side` pixels or more."""
        names = self.names()
        return [
            int(shard)
            for shard in np.flatnonzero(manifest.counts(min_side))
            if file_name(manifest.paths[shard], manifest.hashes[shard]) not in names
        ]

    def names(self) -> set[str]:
        """Names of everything in the folder."""
        try:
            return set(os.listdir(self.path))
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise ManifestError(f"{self.setting}: {unreadable(error, self.path, 'give another folder')}") from error


class LatentShards:
    """Reads cached moments, from any number of threads.

    Args:
        folder: written by `python -m data_pipeline latents`.
        resolution: side of the images in pixels.
        vae: fingerprint that the encoder must have; None accepts any.
        min_side: the cache must hold all samples with a shortest side of so many pixels; the resolution by default.
        shards: numbers of the shards that it must hold; all by default.

    Attributes:
        shape: of one sample's moments, e.g. (8, 32, 32).

    Raises:
        ManifestError: latents are missing, or were made from other shards or with another VAE.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: Manifest,
        resolution: int,
        *,
        vae: str | None = None,
        min_side: int | None = None,
        shards: Iterable[int] | None = None,
    ) -> None:
        self._folder, self._manifest = LatentFolder(folder, resolution), manifest
        min_side = resolution if min_side is None else min_side
        description = self._folder.description()
        command = f"make them with `python -m data_pipeline latents data.latent_cache.resolutions=[{resolution}]`"
        if description is None:
            raise ManifestError(f"{self._folder.setting}: no latents of resolution {resolution}; {command}")
        if vae is not None and description.vae != vae:
            raise ManifestError(
                f"{self._folder.setting}: {self._folder.path} was built with VAE {description.vae}, but the model's "
                f"VAE is {vae}; choose its model, give another folder, or remove it and {command}"
            )
        if description.min_side > min_side:
            raise ManifestError(
                f"{self._folder.setting}: {self._folder.path} was built with min_side={description.min_side}, but "
                f"this run asks for data.stream.min_side={min_side}; remove it and {command}"
            )
        missing = self._folder.missing(manifest, min_side)
        if shards is not None:
            missing = sorted(set(missing).intersection(shards))
        if missing:
            names = self._folder.names()
            made = {name.rpartition("-")[0] + "-" for name in names}
            stale = sum(file_prefix(manifest.paths[shard]) in made for shard in missing)
            other = f" ({stale:,} of them have changed since they were encoded)" if stale else ""
            raise ManifestError(
                f"{self._folder.setting}: {self._folder.path} lacks the latents of {len(missing):,} of "
                f"{len(manifest.paths):,} shards{other}; {command}"
            )
        self.shape = description.shape
        self._description = description
        self._open = OpenFiles(OPEN_FILES)
        self._names: dict[int, str] = {}
        self._files: OrderedDict[int, LatentFile] = OrderedDict()
        self._lock = Lock()

    def name(self, shard: int) -> str:
        """The path of a shard's file."""
        if shard not in self._names:
            self._names[shard] = str(self._folder.path_of(self._manifest, shard))
        return self._names[shard]

    def close(self) -> None:
        """Close the files; nothing is read afterwards."""
        self._open.close()

    def read(self, shard: int, row: int, out: Tensor) -> None:
        """Moments of a shard's row, numbered as in the manifest, into `out` [*shape] of any precision.

        Raises:
            StreamError: the file is missing, of another shard, or lacks the row.
            DecodeError: the sample has no usable moments.
        """
        # Late, because the command that writes latents imports this file before its settings are checked.
        import torch

        path = self.name(shard)
        try:
            with self._open.borrow(path) as file:
                found = self._file(shard, Path(path), file).read(file, row)
        except OSError as error:
            self._open.drop(path)
            with self._lock:
                self._files.pop(shard, None)
            raise StreamError(f"{path}: {_unreadable(error, Path(path))}") from error
        out.copy_(torch.from_numpy(found))

    def _file(self, shard: int, path: Path, file: int) -> LatentFile:
        with self._lock:
            if shard in self._files:
                self._files.move_to_end(shard)
                return self._files[shard]
        offsets = self._manifest.columns(shard, ["offset"])["offset"].to_numpy()
        found = LatentFile(path, file, self._description, self._manifest.hashes[shard], offsets)
        with self._lock:
            self._files[shard] = found
            while len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        return found


def _unreadable(error: OSError, path: Path) -> str:
    gone = isinstance(error, FileNotFoundError) and path.parent.is_dir()
    return f"is not there; {REMEDY}" if gone else unreadable(error, path, "check that it can be read")
