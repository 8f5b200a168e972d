"""An image file as it is stored in a shard: JPEG, upright, resized once."""

from __future__ import annotations

import io
import os
import warnings
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from vdtrain.config.data_schema import PackConfig
from vdtrain.data.decode import IMAGE_ERRORS, ORIENTATION_TAG, decode_jpeg, rgb, upright
from vdtrain.data.tar_samples import BrokenSampleError, read_text
from vdtrain.errors import missing

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
# Reading a JPEG at up to this many times its final size, with fewer operations, changes no visible detail.
DRAFT = 2


@cache
def _formats() -> tuple[str, ...]:
    """The formats that are read: HEIC too, where its package is installed."""
    if missing("pillow_heif"):
        return FORMATS
    from pillow_heif import register_heif_opener

    register_heif_opener()
    return (*FORMATS, "HEIF")


class LeftOutError(Exception):
    """An image or caption that cannot be packed; the message is the reason."""


@dataclass(frozen=True)
class Picture:
    """JPEG bytes, and the sizes (width, height) before and after resizing."""

    jpeg: bytes
    size: tuple[int, int]
    original: tuple[int, int]


def prepare(path: str, config: PackConfig) -> Picture:
    """Read an image file, turn it upright, and shrink it to a shortest side of `config.image_size`.

    A JPEG that needs no change keeps its bytes. Transparent places become white. The first frame stands for a film.

    Raises:
        LeftOutError: it cannot be decoded to its end, is too small, or has too many pixels.
    """
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")
            with Image.open(file, formats=_formats()) as image:
                return _prepare(image, file, config)
    except Image.DecompressionBombError as error:
        raise LeftOutError("too many pixels") from error
    except IMAGE_ERRORS as error:
        raise LeftOutError("missing file" if isinstance(error, FileNotFoundError) else "unreadable image") from error


def _prepare(image: Image.Image, file: io.BufferedReader, config: PackConfig) -> Picture:
    stored, form = image.size, image.format
    if stored[0] * stored[1] > config.max_image_pixels:
        raise LeftOutError("too many pixels")
    if min(stored) < config.min_image_size:
        raise LeftOutError("too small")
    orientation = image.getexif().get(ORIENTATION_TAG, 1)
    original = stored[::-1] if orientation in (5, 6, 7, 8) else stored
    small = min(stored) <= config.image_size
    jpeg = form in ("JPEG", "MPO")
    if jpeg:
        # Pillow fills with grey what the file lacks.
        file.seek(0)
        pixels = decode_jpeg(file.read(), 0 if small else min(DRAFT * config.image_size, *stored))
    else:
        pixels = rgb(image)
        # Of some formats Pillow has turned it by now.
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    unchanged = small and form == "JPEG" and image.mode in ("L", "RGB") and orientation not in range(2, 9)
    # A phone's film behind its image is not stored.
    if unchanged and os.fstat(file.fileno()).st_size <= 4 * stored[0] * stored[1] + (1 << 16):
        file.seek(0)
        return Picture(file.read(), stored, original)
    made = Image.fromarray(np.ascontiguousarray(upright(pixels, orientation if orientation in range(1, 9) else 1)))
    if not small:
        scale = config.image_size / min(original)
        width, height = (max(config.image_size, round(side * scale)) for side in original)
        made = made.resize((width, height), Image.Resampling.LANCZOS)
    place = io.BytesIO()
    made.save(place, "JPEG", quality=config.encode_quality)
    return Picture(place.getvalue(), made.size, original)


def read_caption(path: str) -> str:
    """The text of a caption file on one line; a LeftOutError if there is none in UTF-8 or in marked UTF-16."""
    try:
        with open(path, "rb") as file:
            data = file.read(1 << 20)
        text = " ".join(read_text(data).split())
    except BrokenSampleError as error:
        raise LeftOutError(str(error)) from error
    except OSError as error:
        raise LeftOutError("missing file") from error
    if not text:
        raise LeftOutError("no caption")
    return text
