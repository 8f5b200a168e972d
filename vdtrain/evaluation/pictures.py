"""Folders of pictures: generated ones have the size of the evaluation, and real ones are cropped to it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vdtrain.config.compose import ConfigError
from vdtrain.data.decode import CENTRE, FORMATS, IMAGE_ERRORS, DecodeError, decode, stored_orientation
from vdtrain.errors import one_line, unreadable
from vdtrain.evaluation.named import PICTURES

# The last chunk of a PNG file; without it the file was cut short.
PNG_END = b"IEND"


def list_pictures(folder: Path, setting: str) -> dict[str, Path]:
    """The pictures below a folder, by their paths in it, in order; hidden files and folders are passed over.

    Raises:
        ConfigError: it is no folder, cannot be read, or has no picture.
    """
    place = f"{setting}={folder}"
    if not folder.is_dir():
        raise ConfigError(f"{place}: {'is a file' if folder.exists() else 'no such folder'}; give a folder of pictures")
    found = {}
    try:
        for top, folders, names in os.walk(folder, followlinks=True):
            folders[:] = sorted(each for each in folders if not each.startswith("."))
            for name in names:
                path = Path(top, name)
                if path.suffix.lower() in PICTURES and not name.startswith("."):
                    found[path.relative_to(folder).as_posix()] = path
    except OSError as error:
        raise ConfigError(f"{place}: {unreadable(error, folder, 'give another folder')}") from error
    if not found:
        raise ConfigError(f"{place}: has no pictures ({', '.join(PICTURES)}); give a folder of pictures")
    return dict(sorted(found.items()))


def check_generated(paths: Sequence[Path], side: int, setting: str, workers: int) -> None:
    """Refuse pictures that are broken or not squares of `side` pixels, by their headers and ends alone.

    Raises:
        ConfigError: names the first of them.
    """

    def problem(path: Path) -> str | None:
        try:
            with Image.open(path) as image:
                size, form = image.size, image.format
            if size != (side, side):
                return (
                    f"is {size[0]} x {size[1]} and not resolution={side}; set resolution to the size of all, or make "
                    "them anew"
                )
            if form == "PNG":
                with path.open("rb") as file:
                    file.seek(-min(32, path.stat().st_size), os.SEEK_END)
                    if PNG_END not in file.read():
                        return "is cut short; make it again"
        except IMAGE_ERRORS as error:
            return f"cannot be read ({one_line(error)}); make it again"
        return None

    with ThreadPoolExecutor(workers) as pool:
        problems = list(pool.map(problem, paths))
    for path, found in zip(paths, problems, strict=True):
        if found is not None:
            raise ConfigError(f"{setting}: {path}: {found}")


def read_real(paths: Sequence[Path], side: int, setting: str, workers: int) -> Tensor:
    """Pictures uint8 [B, 3, side, side], cropped at their centre as the stream of training crops.

    Raises:
        ConfigError: one is missing or damaged.
    """

    def read(path: Path) -> Tensor:
        try:
            data = path.read_bytes()
            return torch.from_numpy(decode(data, side, CENTRE, stored_orientation(data) or 1))
        except DecodeError as error:
            raise ConfigError(f"{setting}: {path}: {one_line(error)}; give a whole file of {FORMATS}") from error
        except OSError as error:
            raise ConfigError(f"{setting}: {path}: {unreadable(error, path, 'put it back')}") from error

    with ThreadPoolExecutor(workers) as pool:
        pictures = list(pool.map(read, paths))
    return torch.stack(pictures).permute(0, 3, 1, 2).contiguous()


def stamp(path: Path) -> Any:
    """Size and time of a file, by which another content is recognised."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns
