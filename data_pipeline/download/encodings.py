"""Compressed bodies (Content-Encoding), decoded up to a limit: a small body can decode to gigabytes."""

from __future__ import annotations

import zlib
from email.message import Message
from typing import Any

from data_pipeline.download.refused import RefusedError

try:
    import brotli  # type: ignore[import-untyped]
except ImportError:
    brotli = None
# Earlier releases cannot limit what a body decodes to.
HAS_BROTLI = hasattr(getattr(brotli, "Decompressor", None), "can_accept_more_data")
ACCEPT_ENCODING = "gzip, deflate, br" if HAS_BROTLI else "gzip, deflate"
GZIP_MAGIC = b"\x1f\x8b"
DAMAGED = "damaged content encoding"
UNKNOWN = "unknown content encoding"


def decoded(body: bytes, headers: Message, most: int) -> bytes:
    """A body without its content encodings.

    A body that is not compressed although its headers say so stays as it is, and so it does under a name that is no
    encoding: servers send both with good images.

    Raises:
        RefusedError: it is damaged, decodes to more than `most` bytes, or nothing here decodes it.
    """
    encodings = ",".join(headers.get_all("Content-Encoding", [])).lower().split(",")
    for name in reversed([each.strip() for each in encodings]):
        if name in ("gzip", "x-gzip") and body.startswith(GZIP_MAGIC):
            body = _inflated(body, 16 + zlib.MAX_WBITS, most)
        elif name == "deflate" and body:
            # Some servers leave out zlib's header.
            wrapped = body[0] & 0x0F == 8 and int.from_bytes(body[:2], "big") % 31 == 0
            body = _inflated(body, zlib.MAX_WBITS if wrapped else -zlib.MAX_WBITS, most)
        elif name == "br" and HAS_BROTLI and body:
            body = _brotli(body, most)
        elif name in ("br", "zstd", "compress", "x-compress") and body:
            raise RefusedError(UNKNOWN)
    return body


def _inflated(body: bytes, window_bits: int, most: int) -> bytes:
    found = b""
    while True:
        packer = zlib.decompressobj(window_bits)
        try:
            found += packer.decompress(body, most + 1 - len(found))
        except zlib.error as error:
            raise RefusedError(DAMAGED) from error
        _check(found, packer.eof, most)
        body = packer.unused_data
        # A gzip body can have several members, and zeros behind them.
        if not body.startswith(GZIP_MAGIC):
            return found


def _brotli(body: bytes, most: int) -> bytes:
    packer: Any = brotli.Decompressor()
    found, more = b"", body
    try:
        while len(found) <= most and not packer.is_finished():
            piece = packer.process(more, output_buffer_limit=most + 1 - len(found))
            if not piece and packer.can_accept_more_data():
                break
            found, more = found + piece, b""
    except brotli.error as error:
        raise RefusedError(DAMAGED) from error
    _check(found, packer.is_finished(), most)
    return found


def _check(found: bytes, whole: bool, most: int) -> None:
    if len(found) > most:
        raise RefusedError.above(most)
    if not whole:
        raise RefusedError(DAMAGED)
