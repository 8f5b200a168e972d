"""Image bytes to square uint8 pictures, by the cheapest way that keeps their quality."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

# Pictures above this many pixels are refused before they are decoded.
MAX_PIXELS = 100_000_000
# What img2dataset writes; for some others Pillow starts programs.
FORMATS = ("JPEG", "PNG", "WEBP")


PICTURE_ERRORS = (ValueError, OSError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class DecodeError(ValueError):
    """Bytes that are no usable picture."""


def picture_size(data: bytes) -> tuple[int, int]:
    """Width and height of a picture as it is stored, by its header alone.

    Raises:
        DecodeError: the bytes are no picture, or one of too many pixels.
    """
    try:
        if simplejpeg.is_jpeg(data):
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        else:
            with Image.open(io.BytesIO(data), formats=FORMATS) as file:
                width, height = file.size
    except PICTURE_ERRORS as error:
        raise DecodeError(f"cannot decode: {error}") from error
    _check_size(width, height)
    return width, height


def upright(picture: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """A view of a picture [H, W, 3] that is stored in an EXIF orientation, 1 (upright) to 8, as it is to be seen."""
    if orientation >= 5:
        picture = picture.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return picture[::rows, ::columns]


def decode(data: bytes, resolution: int, crop: tuple[float, float], orientation: int = 1) -> NDArray[np.uint8]:
    """A picture as uint8 [resolution, resolution, 3].

    JPEG is decoded at the smallest DCT scale that is large enough (512 pixels to 256 needs no resampling at all); the
    shortest side is resized to the resolution, and a square is cropped.

    Args:
        crop: place of the crop in [0, 1] along height and width, as seen upright; (0.5, 0.5) is the centre.
        orientation: in which the picture is stored, in EXIF's numbers; tags in the bytes themselves are not looked at.

    Raises:
        DecodeError: the bytes are damaged, no picture, or of too many pixels.
    """
    try:
        picture = _decode_jpeg(data, resolution) if simplejpeg.is_jpeg(data) else _decode_other(data)
    except PICTURE_ERRORS as error:
        raise DecodeError(f"cannot decode: {error}") from error
    picture = upright(picture, orientation)
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = int(crop[0] * (height - side)), int(crop[1] * (width - side))
    square = picture[top : top + side, left : left + side]
    if side == resolution:
        return square if orientation == 1 else np.ascontiguousarray(square)
    # Pillow filters before it shrinks; only the square is resized.
    return np.asarray(Image.fromarray(square).resize((resolution, resolution), Image.Resampling.BICUBIC))


def _decode_jpeg(data: bytes, resolution: int) -> NDArray[np.uint8]:
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(width, height)
    scale = min(1.0, resolution / min(height, width))
    picture: NDArray[np.uint8] = simplejpeg.decode_jpeg(
        data, "RGB", min_height=int(np.ceil(height * scale)), min_width=int(np.ceil(width * scale))
    )
    return picture


def _decode_other(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data), formats=FORMATS) as file:
        _check_size(*file.size)
        return np.asarray(file.convert("RGB"))


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width} x {height} is above {MAX_PIXELS} pixels")
