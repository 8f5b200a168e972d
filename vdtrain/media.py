"""Files of each modality: how inputs are read and results are written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from vdtrain.data.decode import IMAGE_ERRORS
from vdtrain.errors import ConfigError, one_line, unreadable


@dataclass(frozen=True)
class ModalityIO:
    """Reading and writing of one modality.

    Attributes:
        read: (inputs as typed, height and width in pixels) -> a batch for the encoders of the modality.
        write: (samples, output folder, settings to keep with them) -> the files written.
    """

    read: Callable[[Sequence[str], tuple[int, int]], Any]
    write: Callable[[Any, Path, Mapping[str, Any]], list[Path]]


def read_images(paths: Sequence[str], size: tuple[int, int]) -> torch.Tensor:
    """Image files as uint8 [B, 3, H, W]: resized (bicubic) to cover `size` (H, W), then cropped at the centre.

    Raises:
        ConfigError: a file that is missing or not an image.
    """
    images = []
    for path in paths:
        height, width = size
        fitted = ImageOps.fit(_open(path).convert("RGB"), (width, height), Image.Resampling.BICUBIC)
        images.append(torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8).view(height, width, 3))
    return torch.stack(images).permute(0, 3, 1, 2).contiguous()


def read_mask(path: str) -> torch.Tensor:
    """A mask file as float32 [1, H, W] in 0..1: white keeps a place, black hides it.

    Raises:
        ConfigError: a file that is missing or not an image.
    """
    grey = _open(path).convert("L")
    return torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(1, grey.height, grey.width) / 255


def _open(path: str) -> Image.Image:
    try:
        with Image.open(os.path.expanduser(path)) as file:
            file.load()
            return ImageOps.exif_transpose(file)
    except (*IMAGE_ERRORS, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise ConfigError(f"{path}: {unreadable(error, Path(path), 'give an image file')}") from error
        raise ConfigError(f"{path}: {one_line(error)}; give an image file") from error


def write_images(samples: torch.Tensor, folder: Path, settings: Mapping[str, Any]) -> list[Path]:
    """Write uint8 [B, 3, H, W] as numbered PNG files with the settings in their metadata."""
    from PIL.PngImagePlugin import PngInfo

    metadata = PngInfo()
    metadata.add_text("vdtrain", json.dumps(dict(settings)))
    files = []
    for index, image in enumerate(samples.permute(0, 2, 3, 1).cpu().numpy()):
        file = folder / f"{index:04d}.png"
        Image.fromarray(image).save(file, pnginfo=metadata)
        files.append(file)
    return files


def write_captions(samples: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> list[Path]:
    """Write captions.txt, one caption on each line."""
    file = folder / "captions.txt"
    file.write_text("".join(f"{caption}\n" for caption in samples), encoding="utf-8")
    return [file]


# The module of a further modality adds its files here; it is imported before any file is read.
MODALITY_IO = {
    "image": ModalityIO(read_images, write_images),
    "text": ModalityIO(lambda captions, size: list(captions), write_captions),
}
