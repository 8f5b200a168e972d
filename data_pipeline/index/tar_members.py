"""Reads the members of a tar file in one pass, and hashes its bytes on the way.

Common tar readers accept a file that was cut at a member's boundary or inside a header. This one refuses it. It also
tells the offset of every content, and keeps one member in memory at a time.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
# More digits are no size of a file.
DIGITS = 20
# Larger contents are skipped.
CONTENT_BYTES = 64 << 20
EXTENDED_BYTES = 1 << 20
PIECE = 1 << 20
REGULAR = (b"0", b"\0", b"7")
LONG_NAME, LONG_LINK, PAX, PAX_SUN, PAX_GLOBAL = b"L", b"K", b"x", b"X", b"g"
EXTENDED = (LONG_NAME, LONG_LINK, PAX, PAX_SUN, PAX_GLOBAL)
WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")
POSIX = b"ustar\0"
# Keywords of a POSIX extended header that are followed.
USED = (b"path", b"size")


class TarDamageError(ValueError):
    """A tar file is damaged or truncated; the message tells how."""


@dataclass(frozen=True)
class Member:
    """One member of a tar file."""

    name: str
    regular: bool
    offset: int  # of its content in the file
    size: int
    content: bytes | None  # None if it is not a regular file, or larger than CONTENT_BYTES


class TarMembers:
    """Iterates over a tar file's members; POSIX and GNU extensions for long names and large sizes are understood.

    Args:
        file: opened for reading, buffered, at its beginning.
        size: of the file in bytes.
        strict: refuse all damage. Otherwise damage costs only the members it is in, as the search for the next header
            goes on behind it; what follows the blocks of zeros is read too, and they may be missing at the end.

    Attributes:
        damage: the first damage that was passed over; empty without any.
        count: number of members.

    Raises:
        TarDamageError: while iterating, if the file is truncated, a header is damaged, or data follow the end.
    """

    def __init__(self, file: BinaryIO, size: int, strict: bool = True) -> None:
        self._file, self._size, self._position, self._strict = file, size, 0, strict
        self._hash = hashlib.sha256()
        self.damage = ""
        self.count = 0

    @property
    def sha256(self) -> str:
        """Hash of the whole file, after the iteration."""
        if self._position != self._size:
            raise RuntimeError("the file has not been read to its end")
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[Member]:
        extended: dict[str, str] = {}
        while (header := self._header()) is not None:
            name, size, kind = header
            start = self._position
            if kind in EXTENDED:
                if size > EXTENDED_BYTES:
                    self._fail(f"a header of {size} bytes at {start - BLOCK}")
                content = self._content(size, keep=size <= EXTENDED_BYTES)
                if content is not None:
                    extended.update(self._extended(kind, content))
                continue
            name = extended.get("path", name)
            if "size" in extended:
                with self._passed_over():
                    size = _decimal(extended["size"], start)
            extended = {}
            # Sizes of links and folders are not followed by a content.
            size = 0 if kind in WITHOUT_CONTENT else size
            regular = kind in REGULAR and not name.endswith("/")
            content = self._content(size, keep=regular and size <= CONTENT_BYTES)
            self.count += 1
            if self._position >= start + size:
                yield Member(name, regular, start, size, content)
        if extended:
            self._fail("it ends after an extended header, without its member")

    def _fail(self, what: str) -> None:
        if self._strict:
            raise TarDamageError(what)
        self.damage = self.damage or what

    @contextmanager
    def _passed_over(self) -> Iterator[None]:
        """Damage that only a strict reader refuses."""
        try:
            yield
        except TarDamageError as error:
            if self._strict:
                raise
            self.damage = self.damage or str(error)

    def _header(self) -> tuple[str, int, bytes] | None:
        """Name, size and type of the next member; None at the end, to which the file is then read."""
        ended = False
        while self._strict or self._position + BLOCK <= self._size:
            block = self._read(BLOCK)
            if any(block):
                if ended and self._strict:
                    raise TarDamageError("only one block of zeros at the end")
                try:
                    return parse(block, self._position - BLOCK)
                except TarDamageError as error:
                    self._fail(str(error))
            elif ended and self._strict:
                break
            ended = True
        while piece := self._file.read(PIECE):
            self._advance(piece)
            if piece.count(0) != len(piece):
                self._fail("data follow its end" if self._strict else "cut short")
        return None

    def _content(self, size: int, keep: bool) -> bytes | None:
        """A member's content, None unless it is kept and whole; moves behind its padding."""
        end = self._position + -(-size // BLOCK) * BLOCK
        if end > self._size and (self._strict or self._position + size > self._size):
            self._fail("cut short")
            # The size may be wrong, and whole members may follow.
            return None
        content = self._read(size) if keep else None
        while (left := min(end, self._size) - self._position) > 0:
            self._read(min(left, PIECE))
        return content

    def _extended(self, kind: bytes, content: bytes) -> dict[str, str]:
        """What an extended header tells of the next member."""
        if kind == LONG_NAME:
            return {"path": content.rstrip(b"\0").decode("utf-8", "surrogateescape")}
        found: dict[str, str] = {}
        if kind in (PAX, PAX_SUN):
            with self._passed_over():
                found = _pax(content, self._position)
        return found

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._advance(data)
        if len(data) < size:
            raise TarDamageError("cut short")
        return data

    def _advance(self, data: bytes) -> None:
        self._hash.update(data)
        self._position += len(data)


def parse(header: bytes, position: int) -> tuple[str, int, bytes]:
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
    found, start = {}, 0
    while start < len(content):
        space = content.find(b" ", start, start + DIGITS + 1)
        end = start + _decimal(content[start : max(start, space)].decode("ascii", "replace"), position)
        keyword, equals, value = content[space + 1 : end - 1].partition(b"=")
        if not equals or content[end - 1 : end] != b"\n":
            raise TarDamageError(f"damaged header before byte {position}")
        if keyword in USED:
            found[keyword.decode()] = value.decode("utf-8", "surrogateescape")
        start = end
    return found


def _decimal(text: str, position: int) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > DIGITS:
        raise TarDamageError(f"damaged header before byte {position}")
    return int(text)
