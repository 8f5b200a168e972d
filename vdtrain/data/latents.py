"""Cached latents: for every sample of a manifest the moments that the image VAE's encoder gives for its centre crop."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vdtrain.data.latent_file import FLOAT16, LatentDescription, LatentFile, file_name, file_prefix
from vdtrain.data.manifest import Manifest, ManifestError
from vdtrain.system_errors import unreadable

# Whose latents are cached: what `vdtrain.data.stream.PairStream` calls its pictures.
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
        resolution: side of the pictures in pixels.
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
                f"{self._folder.setting}: {self._folder.path} has pictures from {description.min_side} pixels on, and "
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
        """Whether the picture of a shard's row could not be encoded.

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
