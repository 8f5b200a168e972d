"""Cached latents: for every sample of a manifest the moments that the image VAE's encoder gives for its centre crop.

One safetensors file per shard, memory-mapped by readers: moments float16 [n, *shape], the samples' row numbers in the
shard int32 [n], and a mark for images that could not be decoded uint8 [n]. Its metadata tell the encoder's settings and
the shard's checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vdtrain.data.manifest import Manifest, ManifestError
from vdtrain.data.shards import StreamError
from vdtrain.errors import unreadable
from vdtrain.files import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

LAYOUT = 2
CROP = "centre"
SUFFIX = ".safetensors"
MOMENTS, ROWS, BAD = "moments", "rows", "bad"
COMMAND = "python -m data_pipeline latents"
REMEDY = f"encode its images again with `{COMMAND}` and the same settings"

Moments = NDArray[np.float16]


@dataclass(frozen=True)
class LatentDescription:
    """What all files of one folder have in common.

    Attributes:
        resolution: side of the images in pixels.
        min_side: images with a shorter side, in pixels, are left out.
        shape: of one sample's moments, e.g. (8, 32, 32).
        vae: fingerprint of the encoder (`vdtrain.models.frozen_weights.fingerprint`).
        precision: bf16 or fp32, in which the encoder ran.
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
        if values["layout"] != LAYOUT:
            raise ValueError(f"its layout is {values['layout']}, this version reads layout {LAYOUT}")
        numbers = {name: int(values[name]) for name in ("resolution", "min_side")}
        shape = tuple(map(int, values["shape"]))
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
    bad: NDArray[np.bool_],
    moments: Moments,
) -> None:
    """Write the file of one shard, whole or not at all.

    Args:
        sha256: of the shard.
        rows: [n] ascending numbers of the samples in the shard.
        bad: [n] whether the image could not be encoded.
        moments: [n, *shape].
    """
    # safetensors writes memory as it lies, and encoders give channels last.
    tensors: dict[str, NDArray[Any]] = {MOMENTS: np.ascontiguousarray(moments), ROWS: rows, BAD: bad.astype(np.uint8)}
    with atomic_write(path) as draft:
        save_file(tensors, draft, _metadata(description, sha256))


def _metadata(description: LatentDescription, sha256: str) -> dict[str, str]:
    # One entry: safetensors writes several in any order, and equal files would differ.
    return {"latents": json.dumps({**description.to_dict(), "shard_sha256": sha256})}


class LatentFile:
    """One memory-mapped file, read by any number of threads.

    Raises:
        StreamError: it is missing, truncated, of another shard or made with other settings.
    """

    def __init__(self, path: Path, description: LatentDescription, sha256: str) -> None:
        self.path = path
        try:
            # safetensors words the system's errors differently.
            path.open("rb").close()
            with safe_open(path, "pt") as file:
                if file.metadata() != _metadata(description, sha256):
                    raise ValueError("made with other settings or of another shard")
                self.moments: Tensor = file.get_tensor(MOMENTS)
                self.rows: NDArray[np.int32] = file.get_tensor(ROWS).numpy()
                self.bad: NDArray[np.uint8] = file.get_tensor(BAD).numpy()
        except OSError as error:
            gone = isinstance(error, FileNotFoundError) and path.parent.is_dir()
            reason = f"is not there; {REMEDY}" if gone else unreadable(error, path, "check that it can be read")
            raise StreamError(f"{path}: {reason}") from error
        except (SafetensorError, ValueError) as error:
            raise StreamError(f"{path}: not the latents of its shard ({error}); remove it and {REMEDY}") from error

    def places(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where samples of the shard are in the file.

        Raises:
            StreamError: the file lacks one of them.
        """
        places = np.searchsorted(self.rows, rows)
        absent = self.rows.take(places, mode="clip") != rows
        if absent.any():
            raise StreamError(f"{self.path}: has no latent of sample {rows[absent][0]}; remove it and {REMEDY}")
        return places


# Key of the images in a batch of `vdtrain.data.stream.PairStream`.
MODALITY = "image"
DESCRIPTION_FILE = "latents.json"
OPEN_FILES = 256


class LatentFolder:
    """The files of one resolution and their description.

    Args:
        folder: has a subfolder for each resolution.
    """

    def __init__(self, folder: str | Path, resolution: int) -> None:
        self.path = Path(folder) / str(resolution)
        self.setting = f"data.latent_cache.folder={folder}"

    def description(self) -> LatentDescription | None:
        """The description of the files; None if there is none yet.

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
                f"{self.setting}: {path} cannot be used ({error}); remove {self.path} and encode again with "
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
        self._files: OrderedDict[int, LatentFile] = OrderedDict()
        self._lock = Lock()

    def is_bad(self, shard: int, row: int) -> bool:
        """Whether the image of a shard's row could not be encoded.

        Raises:
            StreamError: as `read`.
        """
        file = self._file(shard)
        return bool(file.bad[file.places(np.array([row]))[0]])

    def read(self, shard: int, rows: NDArray[np.int64], out: Tensor) -> None:
        """Moments of a shard's rows, numbered as in the manifest, into `out` [n, *shape] of any precision.

        Raises:
            StreamError: the file is damaged or of another shard, or lacks a row.
        """
        file = self._file(shard)
        out.copy_(file.moments[file.places(rows)])

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
