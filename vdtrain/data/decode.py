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
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

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


# JPEG by libjpeg-turbo: what it only warns about is decoded, what is incomplete is refused. It fills what a file lacks
# with grey and warns. It warns as well of harmless oddities, and tells the first warning alone. So a file with a
# warning is mended where a harmless oddity is known, and decoded again. If a warning remains, bytes are added behind
# the coded data: an image that changes was incomplete.
SOI, EOI, SOS, JFIF, ADOBE = 0xD8, 0xD9, 0xDA, 0xE0, 0xEE
RESTARTS = range(0xD0, 0xD8)
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
PROGRESSIVE = {0xC2, 0xC6}
ARITHMETIC = {0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
COEFFICIENTS = frozenset(range(64))
# A marker as libjpeg finds it, after any other bytes and any number of fill bytes.
MARKER = re.compile(rb"\xff([^\x00\xff])", re.DOTALL)
ZEROS = re.compile(rb"\0{8,}\Z")
# Bytes without markers, and their complements: as coded data they give different images.
FILLER = bytes(1 + (179 + 101 * number) % 254 for number in range(64))
FILLERS = FILLER, bytes(255 - value for value in FILLER)


class TruncatedError(ValueError):
    """A file without all of its coded data."""


def is_jpeg(data: bytes | memoryview) -> bool:
    """Whether a file begins as JPEG does. simplejpeg's own test asks for the end marker as the last two bytes too."""
    return data[:3] == b"\xff\xd8\xff"


def jpeg_size(data: bytes | memoryview) -> tuple[int, int]:
    """Width and height from the header; ValueError if they cannot be read."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        height, width, _, _ = simplejpeg.decode_jpeg_header(_Jpeg(data).mended())
    return int(width), int(height)


def decode_jpeg(data: bytes | memoryview, side: int = 0, buffer: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """A JPEG image as uint8 [H, W, 3], at the smallest scale in eighths whose sides have at least `side` pixels.

    Args:
        side: 0 for the full size.
        buffer: memory for the image.

    Raises:
        TruncatedError: coded data or scans are missing.
        ValueError: the file cannot be decoded.
    """
    arguments: dict[str, Any] = {"min_height": side, "min_width": side, "buffer": buffer}
    try:
        image: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", **arguments)
    except ValueError:
        jpeg = _Jpeg(data)
        jpeg.check_scans()
        mended = jpeg.mended()
        problem = "" if jpeg.ended else "no end marker"
        try:
            image = simplejpeg.decode_jpeg(mended, "RGB", **arguments)
        except ValueError as error:
            problem = str(error)
            image = simplejpeg.decode_jpeg(mended, "RGB", strict=False, **arguments)
        if problem and not jpeg.is_complete():
            raise TruncatedError(problem) from None
    else:
        if not _in_one_scan(data):
            _Jpeg(data).check_scans()
    return image


def _in_one_scan(data: bytes | memoryview) -> bool:
    """Whether the first scan of a sequential image has all of its components, as most images do."""
    position, components, size = 2, 0, len(data) - 10
    while position < size and data[position] == 0xFF:
        code = data[position + 1]
        if code == SOS:
            return data[position + 4] == components
        if code in FRAMES:
            if code > 0xC1:
                return False
            components = data[position + 9]
        position += 2 + (data[position + 2] << 8 | data[position + 3])
    return False


class _Jpeg:
    """The segments of a JPEG file; ValueError if it has no frame that can be decoded."""

    def __init__(self, data: bytes | memoryview) -> None:
        self.data = bytes(data)
        self.segments = list(self._segments())
        frame = next((start for code, start, _ in self.segments if code in FRAMES), None)
        header = b"" if frame is None else self.data[frame:]
        if frame is None or len(header) < 10 or not header[9] or len(header) < 10 + 3 * header[9]:
            raise TruncatedError("no frame")
        self.frame = header[1]
        if self.frame in ARITHMETIC:
            raise ValueError("arithmetic coding is not read")
        described = [header[at : at + 3] for at in range(10, 10 + 3 * header[9], 3)]
        self.components = [each[0] for each in described]
        factors = [divmod(each[1], 16) for each in described]
        # Across and down: pixels of an MCU, which holds each component once.
        self.unit = [8 * max(1, *each) for each in zip(*factors, strict=True)]

    def _segments(self) -> Iterator[tuple[int, int, int]]:
        """Code, start and end of each marker segment up to the end of the image."""
        position = 2
        while found := MARKER.search(self.data, position):
            code, start, position = found[1][0], found.start(), found.end()
            if code not in (EOI, SOI, 0x01, *RESTARTS):
                position += int.from_bytes(self.data[position : position + 2], "big")
            yield code, start, position
            if code == EOI:
                return

    @property
    def ended(self) -> bool:
        """Whether the file has its end marker."""
        return self.segments[-1][0] == EOI

    def check_scans(self) -> None:
        """Raise a TruncatedError unless the scans have every bit of every coefficient."""
        missing = dict.fromkeys(self.components, COEFFICIENTS)
        for code, start, end in self.segments:
            if code == SOS and end <= len(self.data):
                _, _, _, _, count, *rest = self.data[start:end]
                names, (first, last, bits) = rest[: 2 * count : 2], rest[2 * count : 2 * count + 3]
                sent = frozenset(range(first, last + 1)) if self.frame in PROGRESSIVE else COEFFICIENTS
                for name in names if self.frame not in PROGRESSIVE or bits & 15 == 0 else ():
                    missing[name] = missing.get(name, COEFFICIENTS) - sent
        if any(missing.values()):
            raise TruncatedError("scans are missing")

    def mended(self, filler: bytes = b"") -> bytes:
        """The file without what libjpeg warns of and that does not concern its pixels, and with an end.

        The filler is coded data behind every scan, also in intervals of its own, and before every restart marker.
        """
        parts, coded, restarts, position = [b"\xff\xd8"], False, 0, 2
        end_of_file = [] if self.ended else [(EOI, len(self.data), len(self.data))]
        for code, start, end in [*self.segments, *end_of_file]:
            # What lies between other segments is ignored.
            if coded:
                parts += [self.data[position:start].rstrip(b"\xff"), filler]
                if filler and code not in RESTARTS:
                    # A file that was given its length before its content ends in zeros.
                    parts[-2] = ZEROS.sub(b"", parts[-2]).rstrip(b"\xff")
                    parts += [b"\xff" + bytes([RESTARTS[each % 8]]) + filler for each in range(restarts, restarts + 8)]
            parts.append(self._mended(code, self.data[start:end]) or b"\xff\xd9")
            restarts = 0 if code == SOS else restarts + (code in RESTARTS)
            coded, position = code == SOS or (coded and code in RESTARTS), end
        return b"".join(parts)

    def _mended(self, code: int, segment: bytes) -> bytes:
        if code == JFIF and segment[4:9] == b"JFIF\0":
            return segment[:9] + b"\1" + segment[10:]
        if code == ADOBE and segment[4:9] == b"Adobe" and len(segment) > 15 and segment[15] > 2:
            # libjpeg takes an unknown transform for the usual one of so many components.
            return segment[:15] + bytes([max(0, len(self.components) - 2)]) + segment[16:]
        if code == SOS and self.frame in (0xC0, 0xC1):
            return segment[:-3] + b"\0\x3f\0"
        return segment

    def is_complete(self) -> bool:
        """Whether the image does not depend on bytes behind its coded data, and has its restart markers in their order.

        A file with its end marker may lack bits of the last MCU: its writer finished it.
        """
        restarts = 0
        for code, _, _ in self.segments:
            if code in RESTARTS and code != RESTARTS[restarts % 8]:
                return False
            restarts = 0 if code == SOS else restarts + (code in RESTARTS)
        first, second = (simplejpeg.decode_jpeg(self.mended(each), "RGB", strict=False) for each in FILLERS)
        rows, columns = np.nonzero((first != second).any(-1))
        across, down = ((side - 1) // unit * unit for side, unit in zip(first.shape[1::-1], self.unit, strict=True))
        # Chroma is interpolated over the MCU's border.
        return not len(rows) or (self.ended and min(rows) >= down - 1 and min(columns) >= across - 1)
