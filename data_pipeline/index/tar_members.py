"""Reads the members of a tar file in one pass, and hashes its bytes on the way.

Common tar readers accept a file that was cut at a member's boundary or inside a header. This one refuses it. It also
tells the offset of every content, and keeps one member in memory at a time.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
# Larger contents are skipped.
CONTENT_BYTES = 64 << 20
EXTENDED_BYTES = 1 << 20
PIECE = 1 << 20
REGULAR = (b"0", b"\0", b"7")
LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL = b"L", b"K", b"x", b"g"
POSIX = b"ustar\0"


class TarDamageError(ValueError):
    """A tar file is damaged or truncated; the message tells how."""


@dataclass(frozen=True)
class Member:
    """One member of a tar file.

    Attributes:
        offset: of its content in the file.
        content: None if it is not a regular file, or larger than CONTENT_BYTES.
    """

    name: str
    regular: bool
    offset: int
    size: int
    content: bytes | None


class TarMembers:
    """Iterates over a tar file's members; POSIX and GNU extensions for long names and large sizes are understood.

    Args:
        file: opened for reading, buffered, at its beginning.
        size: of the file in bytes.

    Raises:
        TarDamageError: while iterating, if the file is truncated, a header is damaged, or data follow the end.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size, self._position = file, size, 0
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Hash of the whole file, after the iteration."""
        if self._position != self._size:
            raise RuntimeError("the file has not been read to its end")
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[Member]:
        extended: dict[str, str] = {}
        while any(header := self._read(BLOCK)):
            name, size, kind = _parse(header, self._position - BLOCK)
            if kind in (LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL):
                if size > EXTENDED_BYTES:
                    raise TarDamageError(f"a header of {size} bytes at {self._position - BLOCK}")
                content = self._content(size, keep=True)
                if kind == LONG_NAME:
                    extended["path"] = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
                elif kind == PAX:
                    extended.update(_pax(content, self._position))
                continue
            name = extended.get("path", name)
            if "size" in extended:
                size = _decimal(extended["size"], self._position)
            extended = {}
            regular = kind in REGULAR and not name.endswith("/")
            offset, keep = self._position, regular and size <= CONTENT_BYTES
            content = self._content(size, keep)
            yield Member(name, regular, offset, size, content if keep else None)
        if extended:
            raise TarDamageError("it ends after an extended header, without its member")
        if any(self._read(BLOCK)):
            raise TarDamageError("only one block of zeros at the end")
        while piece := self._file.read(PIECE):
            self._advance(piece)
            if piece.count(0) != len(piece):
                raise TarDamageError("data follow its end")

    def _content(self, size: int, keep: bool) -> bytes:
        """A member's content; moves behind its padding."""
        padded = -(-size // BLOCK) * BLOCK
        if self._position + padded > self._size:
            raise TarDamageError("cut short")
        content = self._read(size) if keep else b""
        padded -= len(content)
        while padded > 0:
            padded -= len(self._read(min(padded, PIECE)))
        return content

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._advance(data)
        if len(data) < size:
            raise TarDamageError("cut short")
        return data

    def _advance(self, data: bytes) -> None:
        self._hash.update(data)
        self._position += len(data)


def _parse(header: bytes, position: int) -> tuple[str, int, bytes]:
    """Name, size and type of a member."""
    expected = _number(header[148:156], position)
    summed = header[:148] + 8 * b" " + header[156:]
    # The lower half of an Adler-32 is 1 + the sum of the bytes modulo 65521, more than 256 bytes can come to.
    total = (zlib.adler32(summed[:256]) & 0xFFFF) + (zlib.adler32(summed[256:]) & 0xFFFF) - 2
    # Old programs summed the bytes with their signs.
    if expected != total and expected != total - 256 * sum(byte > 127 for byte in summed):
        raise TarDamageError(f"damaged header at byte {position}")
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == POSIX and (prefix := header[345:500].split(b"\0", 1)[0]):
        name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape"), _number(header[124:136], position), header[156:157]


def _number(data: bytes, position: int) -> int:
    """A number in octal digits, or in base 256 if the first bit is set."""
    if data[0] & 0x80:
        if data[0] != 0x80:
            raise TarDamageError(f"damaged header at byte {position}")
        return int.from_bytes(data[1:], "big")
    digits = data.partition(b"\0")[0].strip(b" ")
    if digits.strip(b"01234567"):
        raise TarDamageError(f"damaged header at byte {position}")
    return int(digits or b"0", 8)


def _pax(content: bytes, position: int) -> dict[str, str]:
    """The records of a POSIX extended header: "LENGTH KEYWORD=VALUE\\n"."""
    found = {}
    while content:
        length, _, _ = content.partition(b" ")
        end = _decimal(length.decode("ascii", "replace"), position)
        keyword, equals, value = content[len(length) + 1 : end - 1].partition(b"=")
        if not equals or content[end - 1 : end] != b"\n":
            raise TarDamageError(f"damaged header before byte {position}")
        found[keyword.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        content = content[end:]
    return found


def _decimal(text: str, position: int) -> int:
    if not (text.isascii() and text.isdigit()):
        raise TarDamageError(f"damaged header before byte {position}")
    return int(text)
