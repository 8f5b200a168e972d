"""The format of an image by its first bytes, and its bytes to square uint8 images.

Decoding takes the cheapest way that keeps the quality.
"""

from __future__ import annotations

import io
import re
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vdtrain.data.jpeg import TruncatedError, decode_jpeg, is_jpeg, jpeg_size
from vdtrain.errors import missing, one_line

# Bytes that show the format.
HEAD_BYTES = 1024
# The formats that are read. Pillow starts external programs for some others, and knows decoders that nobody maintains.
READ = ("JPEG", "PNG", "WEBP", "AVIF", "HEIF")
# Those whose container has an orientation of its own, so that EXIF's does not count.
TURNED = ("AVIF", "HEIF")
FORMATS = "JPEG, PNG, WEBP, AVIF or HEIC"

_SIGNATURES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF....WEBP",
    # One box of brands; mif1 alone is no format, so that the other brands tell it.
    "AVIF": rb"....ftyp(?:avi[fs]|(?:mif1|msf1|miaf).{4}(?:....){0,8}?avi[fs])",
    "HEIF": rb"....ftyp(?:he[iv][cxms]|mif1|msf1)",
    "GIF": rb"GIF8",
    "BMP": rb"BM",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "Photoshop": rb"8BPS",
    "ICO": rb"\0\0[\1\2]\0",
    "PDF": rb"%PDF",
    "video": rb"....ftyp|\x1a\x45\xdf\xa3|RIFF....AVI ",
    "SVG": rb"(?:\xef\xbb\xbf)?\s*<(?:svg|(?:\?xml|!DOCTYPE svg|!--).*<svg)",
}
_PATTERNS = {name: re.compile(pattern, re.DOTALL | re.IGNORECASE) for name, pattern in _SIGNATURES.items()}


class DecodeError(ValueError):
    """The bytes are not a usable image. The message is the reason; a colon and what is known beyond it may follow."""

    @property
    def reason(self) -> str:
        """One of few reasons, for counts."""
        return str(self).partition(":")[0]


def image_format(data: bytes | memoryview) -> str:
    """One of READ, by the first HEAD_BYTES of an image; a DecodeError, which names any other format."""
    head = bytes(data[:HEAD_BYTES])
    name = next((name for name, pattern in _PATTERNS.items() if pattern.match(head)), None)
    if name is None:
        raise DecodeError(f"cannot decode: {'cannot identify its format' if head else 'it is empty'}")
    if name not in READ:
        raise DecodeError(f"{name} is not read")
    return name


# Images with more pixels are refused before decoding.
MAX_PIXELS = 100_000_000
# Position of a crop.
CENTRE = (0.5, 0.5)
# Decoding memory of each thread; larger images get their own memory.
SCRATCH_BYTES = 4_000_000
ORIENTATION_TAG = 0x0112
# How Pillow and libheif tell of missing bytes.
TRUNCATED = re.compile("truncated|unexpected end of file", re.IGNORECASE)

# What a decoder may raise.
IMAGE_ERRORS = (
    *(ValueError, OSError, SyntaxError, EOFError, RuntimeError, struct.error, zlib.error),
    Image.DecompressionBombError,
)
_memory = threading.local()


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height of a stored image, by its header; a DecodeError if it is none or has too many pixels."""
    with _Refusing():
        if is_jpeg(data):
            width, height = jpeg_size(data)
        else:
            with _opened(data) as file:
                width, height = file.size
        _check_size(width, height)
    return width, height


def stored_orientation(data: bytes) -> int | None:
    """Orientation of an image by its own tag, EXIF's 1 (upright) to 8; None if its file does not tell it."""
    with suppress(*IMAGE_ERRORS), _opened(data) as file:
        tag = file.getexif().get(ORIENTATION_TAG)
        # Viewers ignore values that are not in the standard.
        if isinstance(tag, int) and 1 <= tag <= 8:
            return tag
        return 1 if image_format(data) in TURNED else None
    return None


def upright(image: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """An upright view of an image [H, W, 3] that is stored in an EXIF orientation, 1 (upright) to 8."""
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return image[::rows, ::columns]


def decode_whole(data: bytes, orientation: int | None = None) -> NDArray[np.uint8]:
    """An upright image in its full size, uint8 [H, W, 3].

    Args:
        orientation: EXIF orientation of the stored image; None for that of its own tag.

    Raises:
        DecodeError: the bytes are damaged, are not an image, or have too many pixels.
    """
    image_size(data)
    with _Refusing():
        image = decode_jpeg(data) if is_jpeg(data) else _decode_other(data)
    return np.ascontiguousarray(upright(image, orientation or stored_orientation(data) or 1))


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
    with _Refusing():
        image = _decode_jpeg(data, place, orientation) if is_jpeg(data) else _decode_other(data)
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
    width, height = jpeg_size(data)
    _check_size(width, height)
    resolution = place.shape[0]
    if orientation == 1 and height == width >= resolution and 8 * resolution % height == 0:
        # DCT scales are eighths: the smallest sufficient one gives exactly the square.
        decode_jpeg(data, resolution, place)
        return place
    # The kernel would have to clear the pages of new memory for every image.
    if not hasattr(_memory, "scratch"):
        _memory.scratch = np.empty(SCRATCH_BYTES, np.uint8)
    scratch = _memory.scratch if 3 * height * width <= SCRATCH_BYTES else None
    return decode_jpeg(data, min(height, width, resolution), scratch)


def _decode_other(data: bytes | memoryview) -> NDArray[np.uint8]:
    with _opened(data) as file:
        _check_size(*file.size)
        return rgb(file)


def rgb(image: Image.Image) -> NDArray[np.uint8]:
    """An image that Pillow has opened, of any mode, as uint8 [H, W, 3]: 16 bits become 8, white is behind alpha."""
    sixteen_bits = "16" in str(getattr(image, "tile", ""))
    image.load()
    key = image.info.get("transparency")
    if image.mode.startswith("I"):
        # Pillow would clip them.
        deep = np.asarray(image)
        grey = (deep.clip(0, 0xFFFF) >> 8).astype(np.uint8)
        if key is not None:
            grey[deep == key] = 255
        return np.repeat(grey[..., None], 3, axis=-1)
    if image.mode == "RGB" and sixteen_bits and key is not None:
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return np.asarray(image.convert("RGB"))


@contextmanager
def _opened(data: bytes | memoryview) -> Iterator[Image.Image]:
    """An image, opened by the one decoder of its format."""
    name = image_format(data)
    if name == "HEIF":
        # libheif turns the image itself.
        if problem := missing("pillow_heif"):
            raise DecodeError(f"HEIC is not read: {problem}")
        from pillow_heif import open_heif

        heif = open_heif(io.BytesIO(data))
        _check_size(*heif.size)
        yield heif.to_pillow()
        return
    if name == "AVIF":
        from PIL import AvifImagePlugin, features

        if not features.check("avif"):
            raise DecodeError("AVIF is not read: this Pillow was built without it; install Pillow 11.3 or newer")
        # The threads of the stream share the cores.
        AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    with Image.open(io.BytesIO(data), formats=[name]) as file:
        yield file


class _Refusing:
    """Turns a decoder's errors into a DecodeError. A class, because a generator would take its time for each image."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, DecodeError):
            return
        if isinstance(error, Image.DecompressionBombError):
            raise DecodeError(f"too many pixels: {one_line(error)}") from error
        if isinstance(error, IMAGE_ERRORS):
            truncated = isinstance(error, TruncatedError) or TRUNCATED.search(str(error))
            raise DecodeError(f"{'truncated' if truncated else 'cannot decode'}: {one_line(error)}") from error


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DecodeError(f"too many pixels: {width} x {height} exceeds {MAX_PIXELS}")
