"""Files of each modality: how the inputs of a command line are read, and where results are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vdtrain.compose import ConfigError


@dataclass(frozen=True)
class Medium:
    """Reading and writing of one modality.

    Attributes:
        read: (inputs as typed, resolution in pixels) -> a batch, in the form that the modality's encoders take.
        write: (samples, output folder, settings to keep with them) -> the files written.
    """

    read: Callable[[Sequence[str], int], Any]
    write: Callable[[Any, Path, Mapping[str, Any]], list[Path]]


def read_pictures(paths: Sequence[str], resolution: int) -> torch.Tensor:
    """Picture files as uint8 [B, 3, resolution, resolution]: shortest side resized (bicubic), centre cropped.

    Raises:
        ConfigError: a file that is missing or no picture.
    """
    pictures = []
    for path in paths:
        try:
            with Image.open(path) as file:
                picture = file.convert("RGB")
        except OSError as error:
            raise ConfigError(f"inputs: {path}: {error}; give a picture file") from error
        scale = resolution / min(picture.size)
        size = (max(resolution, round(picture.width * scale)), max(resolution, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
        cropped = picture.crop((left, top, left + resolution, top + resolution))
        pictures.append(
            torch.frombuffer(bytearray(cropped.tobytes()), dtype=torch.uint8).view(resolution, resolution, 3)
        )
    return torch.stack(pictures).permute(0, 3, 1, 2).contiguous()


def write_pictures(samples: torch.Tensor, folder: Path, settings: Mapping[str, Any]) -> list[Path]:
    """uint8 [B, 3, H, W] as numbered PNG files, the settings in their metadata."""
    from PIL.PngImagePlugin import PngInfo

    metadata = PngInfo()
    metadata.add_text("vdtrain", json.dumps(dict(settings)))
    files = []
    for index, picture in enumerate(samples.permute(0, 2, 3, 1).cpu().numpy()):
        file = folder / f"{index:04d}.png"
        Image.fromarray(picture).save(file, pnginfo=metadata)
        files.append(file)
    return files


def write_captions(samples: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> list[Path]:
    """Captions, one to a line, in captions.txt."""
    file = folder / "captions.txt"
    file.write_text("".join(f"{caption}\n" for caption in samples))
    return [file]


MEDIA = {
    "image": Medium(read_pictures, write_pictures),
    "text": Medium(lambda captions, resolution: list(captions), write_captions),
}
