"""Image bytes to square uint8 images, by the cheapest way that keeps their quality."""

from __future__ import annotations

import io
import struct
import threading
import zlib

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

# Images above this many pixels are refused before they are decoded.
MAX_PIXELS = 100_000_000
# What img2dataset writes; for some others Pillow starts programs.
FORMATS = ("JPEG", "PNG", "WEBP")
# Of each thread; larger images are decoded into memory of their own.
SCRATCH_BYTES = 4_000_000

IMAGE_ERRORS = (ValueError, OSError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)

_memory = threading.local()


class DecodeError(ValueError):
    """Bytes that are no usable image."""


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height of an image as it is stored, by its header alone.

    Raises:
        DecodeError: the bytes are no image, or one of too many pixels.
    """
    try:
        if simplejpeg.is_jpeg(data):
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        else:
            with Image.open(io.BytesIO(data), formats=FORMATS) as file:
                width, height = file.size
    except IMAGE_ERRORS as error:
        raise DecodeError(f"cannot decode: {error}") from error
    _check_size(width, height)
    return width, height


def upright(image: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """A view of an image [H, W, 3] that is stored in an EXIF orientation, 1 (upright) to 8, as it is to be seen."""
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return image[::rows, ::columns]


def decode(
    data: bytes | memoryview, resolution: int, crop: tuple[float, float], orientation: int = 1
) -> NDArray[np.uint8]:
    """An image as uint8 [resolution, resolution, 3]; see `decode_into`."""
    image = np.empty((resolution, resolution, 3), np.uint8)
    decode_into(image, data, crop, orientation)
    return image


def decode_into(
    place: NDArray[np.uint8], data: bytes | memoryview, crop: tuple[float, float], orientation: int = 1
) -> None:
    """Decode an image into `place`, uint8 [resolution, resolution, 3], C-contiguous.

    JPEG is decoded at the smallest DCT scale that is large enough (512 pixels to 256 needs no resampling at all); the
    shortest side is resized to the resolution, and a square is cropped.

    Args:
        crop: place of the crop in [0, 1] along height and width, as seen upright; (0.5, 0.5) is the centre.
        orientation: in which the image is stored, in EXIF's numbers; tags in the bytes themselves are not looked at.

    Raises:
        DecodeError: the bytes are damaged, no image, or of too many pixels.
    """
    resolution = place.shape[0]
    try:
        image = _decode_jpeg(data, place, orientation) if simplejpeg.is_jpeg(data) else _decode_other(data)
    except IMAGE_ERRORS as error:
        raise DecodeError(f"cannot decode: {error}") from error
    if image is place:
        return
    image = upright(image, orientation)
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = int(crop[0] * (height - side)), int(crop[1] * (width - side))
    square = image[top : top + side, left : left + side]
    if side != resolution:
        # Pillow filters before it shrinks; only the square is resized.
        square = np.asarray(Image.fromarray(square).resize(place.shape[:2], Image.Resampling.BICUBIC))
    place[...] = square


def _decode_jpeg(data: bytes | memoryview, place: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """`place` where nothing is left to be done, else an image in memory that this thread's next one takes."""
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(width, height)
    resolution = place.shape[0]
    if orientation == 1 and height == width >= resolution and 8 * resolution % height == 0:
        # DCT scales are eighths: the smallest that is large enough gives the square itself.
        simplejpeg.decode_jpeg(data, "RGB", min_height=resolution, min_width=resolution, buffer=place)
        return place
    shortest = min(height, width, resolution)
    # Fresh memory for every image would come in pages that the kernel has to clear.
    if not hasattr(_memory, "scratch"):
        _memory.scratch = np.empty(SCRATCH_BYTES, np.uint8)
    image: NDArray[np.uint8] = simplejpeg.decode_jpeg(
        data,
        "RGB",
        min_height=shortest,
        min_width=shortest,
        buffer=_memory.scratch if 3 * height * width <= SCRATCH_BYTES else None,
    )
    return image


def _decode_other(data: bytes | memoryview) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data), formats=FORMATS) as file:
        _check_size(*file.size)
        return np.asarray(file.convert("RGB"))


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width} x {height} is above {MAX_PIXELS} pixels")
