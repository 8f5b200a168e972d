"""Image bytes to square uint8 images, in the cheapest way that keeps their quality."""

from __future__ import annotations

import io
import struct
import threading
import zlib

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

# Images with more pixels are refused before decoding.
MAX_PIXELS = 100_000_000
# The formats that img2dataset writes. Pillow starts external programs for some other formats.
FORMATS = ("JPEG", "PNG", "WEBP")
# Decoding memory of each thread; larger images get their own memory.
SCRATCH_BYTES = 4_000_000

IMAGE_ERRORS = (ValueError, OSError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)

_memory = threading.local()


class DecodeError(ValueError):
    """The bytes are not a usable image."""


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height of an image as stored, from its header alone.

    Raises:
        DecodeError: the bytes are not an image, or it has too many pixels.
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
    """An upright view of an image [H, W, 3] that is stored in an EXIF orientation, 1 (upright) to 8."""
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

    JPEG is decoded at the smallest sufficient DCT scale (512 pixels to 256 need no resampling at all). The largest
    square is cropped and resized to the resolution.

    Args:
        crop: position of the crop in [0, 1] along height and width of the upright image; (0.5, 0.5) is the centre.
        orientation: EXIF orientation of the stored image; tags in the bytes themselves are ignored.

    Raises:
        DecodeError: the bytes are damaged, are not an image, or have too many pixels.
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
        # Pillow filters before it shrinks. Only the square is resized.
        square = np.asarray(Image.fromarray(square).resize(place.shape[:2], Image.Resampling.BICUBIC))
    place[...] = square


def _decode_jpeg(data: bytes | memoryview, place: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """`place` if it holds the final image, else an image in memory that this thread's next call overwrites."""
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(width, height)
    resolution = place.shape[0]
    if orientation == 1 and height == width >= resolution and 8 * resolution % height == 0:
        # DCT scales are eighths: the smallest sufficient one gives exactly the square.
        simplejpeg.decode_jpeg(data, "RGB", min_height=resolution, min_width=resolution, buffer=place)
        return place
    shortest = min(height, width, resolution)
    # The kernel would have to clear the pages of new memory for every image.
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
        raise DecodeError(f"{width} x {height} exceeds {MAX_PIXELS} pixels")
