"""Image bytes to square uint8 pictures, by the cheapest way that keeps their quality."""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

# Pictures above this many pixels are refused before they are decoded.
MAX_PIXELS = 100_000_000


class DecodeError(ValueError):
    """Bytes that are no usable picture."""


def decode(data: bytes, resolution: int, crop: tuple[float, float]) -> NDArray[np.uint8]:
    """A picture as uint8 [resolution, resolution, 3].

    JPEG is decoded at the smallest DCT scale that is large enough (512 pixels to 256 needs no resampling at all); the
    shortest side is resized to the resolution, and a square is cropped.

    Args:
        crop: place of the crop in [0, 1] along height and width; (0.5, 0.5) is the centre.

    Raises:
        DecodeError: the bytes are damaged, no picture, or of too many pixels.
    """
    try:
        picture = _decode_jpeg(data, resolution) if simplejpeg.is_jpeg(data) else _decode_other(data)
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DecodeError(f"cannot decode: {error}") from error
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = int(crop[0] * (height - side)), int(crop[1] * (width - side))
    square = picture[top : top + side, left : left + side]
    if side == resolution:
        return square
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
    with Image.open(io.BytesIO(data)) as file:
        _check_size(*file.size)
        return np.asarray(file.convert("RGB"))


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width} x {height} is above {MAX_PIXELS} pixels")
