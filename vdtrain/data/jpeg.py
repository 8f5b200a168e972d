"""JPEG by libjpeg-turbo: what it only warns about is decoded, what is incomplete is refused.

libjpeg fills what a file lacks with grey and warns. It warns as well of harmless oddities, and tells the first warning
alone. So a file with a warning is mended where a harmless oddity is known, and decoded again. If a warning remains,
bytes are added behind the coded data: an image that changes was incomplete.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

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
