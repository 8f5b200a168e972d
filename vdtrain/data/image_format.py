"""The format of an image by its first bytes, and what of it is read."""

from __future__ import annotations

import re

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
    """One of READ, by the first HEAD_BYTES of an image.

    Raises:
        DecodeError: it has another format, which the reason names, or is no image.
    """
    head = bytes(data[:HEAD_BYTES])
    name = next((name for name, pattern in _PATTERNS.items() if pattern.match(head)), None)
    if name is None:
        raise DecodeError(f"cannot decode: {'cannot identify its format' if head else 'it is empty'}")
    if name not in READ:
        raise DecodeError(f"{name} is not read")
    return name
