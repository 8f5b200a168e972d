"""Samples of each modality as people have them: what is read, what is written, what Python returns."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vdtrain.data.decode import FORMATS, HEAD_BYTES, IMAGE_ERRORS, DecodeError, decode_whole, image_format, rgb
from vdtrain.errors import ConfigError, one_line, unreadable
from vdtrain.files import atomic_write, open_regular
from vdtrain.grid import Pictures
from vdtrain.models.frozen_weights import ASSET, ASSETS

CAPTIONS = "captions"
CAPTIONS_FILE = f"{CAPTIONS}.txt"
NUMBERED = re.compile(r"(\d{4,9})\.[a-z0-9]+")
NUMBERED_CAPTIONS = re.compile(rf"{CAPTIONS}(?:-(\d{{4,9}}))?\.txt")
# The number of the first sample, among the settings that are kept with samples.
FIRST = "first"
# What Python returns: Pillow's images; bytes as the stream has them; diffusers' names for values in 0..1; latents.
PICTURES, BYTES, TENSOR, ARRAY, LATENTS = OUTPUT_TYPES = ("pil", "tensor", "pt", "np", "latent")
AN_IMAGE = "a file name, a PIL image, or a tensor or an array, uint8 or in 0..1"


@dataclass(frozen=True)
class ModalityIO:
    """Reading and writing of one modality.

    Attributes:
        read: (samples as given, height and width in pixels) -> a batch for the encoders of the modality. A sample is
            a word of the command line, or what else Python users have. Raises a ValueError for what is no sample.
        write: (samples, output folder, settings to keep with them) -> the files written.
        show: a batch -> what people look at in Python.
    """

    read: Callable[[Sequence[Any], tuple[int, int]], Any]
    write: Callable[[Any, Path, Mapping[str, Any]], list[Path]]
    show: Callable[[Any], Any] = lambda samples: samples


def batch_of(modality: str, given: Any, size: tuple[int, int], setting: str = "inputs") -> Any:
    """One sample or several, in any form that people have, as a batch for the encoders of the modality.

    Args:
        given: for "text" a caption; for "image" a file name, a PIL image, an array [H, W, 3] or a tensor [3, H, W],
            uint8 or floating point in 0..1; or a list of these, or a batch [B, ...]. Tensors keep their size, and all
            other images are resized and cropped to `size`. A tensor of another modality must be a batch.
        size: height and width in pixels.
        setting: names the samples in errors.

    Raises:
        ConfigError: there is no sample, or one is not of the modality.
    """
    try:
        if isinstance(given, Tensor) and modality != "text":
            return _pixels(given if given.ndim == 4 else given[None]) if modality == "image" else given
        samples = _several(given)
        if not samples:
            raise ValueError("empty; give at least one")
        if modality != "text" and all(isinstance(each, Tensor) for each in samples):
            if len(shapes := {tuple(each.shape) for each in samples}) > 1:
                raise ValueError(f"tensors of shapes {sorted(shapes)}; give tensors of one shape, or PIL images")
            return _pixels(torch.stack(samples)) if modality == "image" else torch.stack(samples)
        return MODALITY_IO[modality].read(samples, size) if modality in MODALITY_IO else given
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{setting}: {error}") from error


def presented(modality: str, samples: Any, output_type: str) -> Any:
    """A batch of samples as one of `OUTPUT_TYPES`. Captions are a list of texts in all of them."""
    if not isinstance(samples, Tensor) or output_type in (BYTES, LATENTS):
        return samples
    if output_type == PICTURES:
        return MODALITY_IO[modality].show(samples) if modality in MODALITY_IO else samples
    values = samples.float() / 255 if samples.dtype == torch.uint8 else samples
    if output_type == TENSOR:
        return values
    return (values.permute(0, 2, 3, 1) if modality == "image" else values).cpu().numpy()


def read_captions(given: Sequence[Any], size: tuple[int, int]) -> list[str]:
    """Captions to the letter.

    Raises:
        ValueError: one is not a text, or has characters that are none.
    """
    for index, each in enumerate(given):
        if not isinstance(each, str):
            raise ValueError(f"number {index} is {_kind(each)} and not a caption; give text, or take another flow")
        if not is_text(each):
            raise ValueError(f"number {index} is {each!r:.60}, which UTF-8 cannot write; correct its characters")
    return list(given)


def is_text(given: Any) -> bool:
    """Whether something is a text that tokenizers take: half of a surrogate pair, from broken JSON, is no character."""
    return isinstance(given, str) and given.encode("utf-8", "replace").decode() == given


def next_number(folder: Path, modality: str) -> int:
    """The number that follows those of a modality's samples in a folder.

    Raises:
        ConfigError: the folder cannot be read.
    """
    number = 0
    try:
        for path in folder.iterdir() if folder.is_dir() else ():
            if modality != "text" and (found := NUMBERED.fullmatch(path.name)):
                number = max(number, int(found[1]) + 1)
            elif modality == "text" and (found := NUMBERED_CAPTIONS.fullmatch(path.name)):
                with path.open("rb") as file:
                    number = max(number, int(found[1] or 0) + max(1, sum(1 for _ in file)))
    except OSError as error:
        raise ConfigError(f"output_dir={folder}: {unreadable(error, folder, 'choose another folder')}") from error
    return number


def read_images(given: Sequence[Any], size: tuple[int, int]) -> Tensor:
    """Images as uint8 [B, 3, H, W]: resized (bicubic) to cover `size` (H, W), then cropped at the centre.

    Args:
        given: see `batch_of`.

    Raises:
        ConfigError: a file that is missing or not an image.
        ValueError: something else that is not an image.
    """
    height, width = size
    images = []
    for index, each in enumerate(given):
        try:
            image = ImageOps.fit(_picture(each), (width, height), Image.Resampling.BICUBIC)
        except ConfigError:
            raise
        except ValueError as error:
            raise ValueError(f"number {index} is {error}") from error
        images.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3))
    return torch.stack(images).permute(0, 3, 1, 2).contiguous()


def read_mask(given: Any) -> Tensor:
    """A mask as float32 [1, h, w] in 0..1: white or 1 keeps a place, black or 0 hides it.

    Args:
        given: an image as in `batch_of`, cropped to a square as images are; or a tensor or an array [h, w] or
            [1, h, w], which keeps its shape.

    Raises:
        ConfigError: it is not a mask.
    """
    try:
        if isinstance(given, Tensor | np.ndarray):
            values = torch.tensor(given) if isinstance(given, np.ndarray) else given
            values = values[None] if values.ndim == 2 else values
            whole = not values.is_floating_point()
            # Truth values may come as any whole numbers.
            values = values.float() / (255 if whole and values.numel() and values.max() > 1 else 1)
            if values.ndim != 3 or len(values) != 1 or not values.numel() or not 0 <= values.min() <= values.max() <= 1:
                raise ValueError(f"{_kind(given)} and not a mask; give [h, w] in 0..1")
            return values
        grey = _picture(given).convert("L")
        side = min(grey.size)
        grey = ImageOps.fit(grey, (side, side))
        return torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(1, side, side) / 255
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"mask: {error}") from error


def _several(given: Any) -> list[Any]:
    """A list of samples, of one sample or of several."""
    one: Any = (str, bytes, os.PathLike, Image.Image, Mapping)
    if isinstance(given, one) or not isinstance(given, Iterable) or getattr(given, "shape", None) == ():
        return [given]
    if isinstance(given, np.ndarray) and given.ndim < 4 and given.dtype.kind in "biuf":
        return [given]
    return list(given)


def _kind(given: Any) -> str:
    shape = getattr(given, "shape", None)
    described = f"{given!r:.60}" if shape is None else f"of shape {list(shape)}, {given.dtype}"
    return "None" if given is None else f"of type {type(given).__name__} ({described})"


def _picture(given: Any) -> Image.Image:
    """An image in any form as an upright RGB image.

    Raises:
        ConfigError: a file that is missing or not an image.
        ValueError: something else that is not an image.
    """
    if isinstance(given, str | os.PathLike):
        return _open(os.fspath(given))
    if isinstance(given, Image.Image):
        try:
            return Image.fromarray(rgb(ImageOps.exif_transpose(given)))
        except IMAGE_ERRORS as error:
            raise ValueError(f"an image that cannot be read ({one_line(error)})") from error
    if isinstance(given, np.ndarray) and given.ndim in (2, 3):
        array = torch.from_numpy(np.array(given))
        array = array[..., None] if given.ndim == 2 else array
        given = array.permute(2, 0, 1)
    if not isinstance(given, Tensor) or given.ndim != 3:
        raise ValueError(f"{_kind(given)} and not an image; give {AN_IMAGE}")
    (image,) = Pictures.of(_pixels(given[None]))
    return image


def _pixels(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] from that, or from values in 0..1; a single channel becomes grey.

    Raises:
        ValueError: these are no images.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise ValueError(f"{_kind(images)}: images are [B, 3, H, W], [3, H, W] or arrays [H, W, 3]")
    if images.is_floating_point():
        low, high = (float(bound) for bound in images.aminmax())
        if not 0 <= low <= high <= 1:
            raise ValueError(f"values from {low:g} to {high:g}; images are uint8, or floating point in 0..1")
        images = (images * 255).round().to(torch.uint8)
    if images.dtype != torch.uint8:
        raise ValueError(f"{_kind(images)}: images are uint8, or floating point in 0..1")
    return images.expand(-1, 3, -1, -1)


def _open(path: str) -> Image.Image:
    """An image file as an upright RGB image; "asset:images/star.png" is the package's own `vdtrain/assets/images`."""
    found = ASSETS / path.removeprefix(ASSET) if path.startswith(ASSET) else Path(path).expanduser()
    try:
        with open(found, "rb", opener=open_regular) as file:
            head = file.read(HEAD_BYTES)
            image_format(head)
            return Image.fromarray(decode_whole(head + file.read()))
    except DecodeError as error:
        raise ConfigError(f"{path}: {one_line(error)}; give a file of {FORMATS}") from error
    except OSError as error:
        raise ConfigError(f"{path}: {unreadable(error, Path(path), 'give an image file')}") from error


def write_images(samples: Tensor, folder: Path, settings: Mapping[str, Any]) -> list[Path]:
    """Write uint8 [B, 3, H, W] as numbered PNG files with the settings in their metadata."""
    from PIL.PngImagePlugin import PngInfo

    metadata = PngInfo()
    metadata.add_text("vdtrain", json.dumps(dict(settings)))
    files = []
    for index, image in enumerate(samples.permute(0, 2, 3, 1).cpu().numpy(), start=settings.get(FIRST, 0)):
        file = folder / f"{index:04d}.png"
        with atomic_write(file) as draft:
            Image.fromarray(image).save(draft, "PNG", pnginfo=metadata)
        files.append(file)
    return files


def write_captions(samples: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> list[Path]:
    """Write captions.txt, one caption on each line, and the settings beside it.

    Later ones in the same folder go into captions-0004.txt, named by the number of the first. A line break within a
    caption becomes a space: lines are counted, and matched with what they were made from.
    """
    number = f"-{settings[FIRST]:04d}" if settings.get(FIRST) else ""
    file, beside = (folder / f"{CAPTIONS}{number}{suffix}" for suffix in (".txt", ".json"))
    texts = {file: "".join(f"{' '.join(caption.split())}\n" for caption in samples), beside: json.dumps(dict(settings))}
    for path, text in texts.items():
        with atomic_write(path) as draft:
            draft.write_text(text, encoding="utf-8")
    return [file]


# The module of a further modality adds its files here; it is imported before any file is read.
MODALITY_IO = {
    "image": ModalityIO(read_images, write_images, Pictures.of),
    "text": ModalityIO(read_captions, write_captions),
}
