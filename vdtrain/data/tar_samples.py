"""Samples of a tar that is read once from its beginning: image, caption and metadata by the names of its members."""

from __future__ import annotations

import lzma
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, Self

from vdtrain.data.decode import stored_orientation
from vdtrain.data.members import (
    IMAGES,
    METADATA,
    TEXTS,
    BrokenSampleError,
    noted_orientation,
    read_json,
    read_text,
    told_caption,
)
from vdtrain.data.shards import StreamError
from vdtrain.errors import one_line

KINDS = {**dict.fromkeys(IMAGES, "image"), **dict.fromkeys(TEXTS, "text"), METADATA: METADATA}
IMAGE, TEXT = "image", "text"
# Hidden files, and WebDataset's own metadata.
SKIPPED = re.compile(r"(.*/)?(\.(?!/)|__[^/]*__($|/))")
# A larger member is not a picture of the web, and would fill the memory.
MEMBER_BYTES = 64 << 20
# Samples that may wait for a member that does not follow at once.
WAITING = 64
# A damaged header may also be a wrong number or name.
TAR_ERRORS = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError, OverflowError, RecursionError)
# Headers with a long name or with records. The library reads them into memory whole.
EXTENDED = (b"L", b"K", b"x", b"X", b"g")
EXTENDED_BYTES = 1 << 20
EMPTY_READS = 100


class CutError(ValueError):
    """A tar without its end, or data that are no tar, in one line; `lost` if samples are known to be missing."""

    def __init__(self, message: str, lost: bool = True) -> None:
        super().__init__(message)
        self.lost = lost


@dataclass(frozen=True)
class Sample:
    """A pair as stored."""

    key: str
    image: bytes
    caption: str
    orientation: int  # EXIF's, 1 (upright) to 8
    tar: str = ""  # address of its tar, for messages


def samples(file: BinaryIO, caption: str | None, left_out: Counter[str]) -> Iterator[Sample]:
    """The samples of a tar, in its order.

    Args:
        caption: field of the JSON that has the caption, dotted inside others; None for a member of text, or CAPTIONS.
        left_out: counts those that are not whole, by reason.

    Raises:
        CutError, OSError, StreamError: after the samples before the damage.
    """
    for key, members in _grouped(_members(file, left_out), caption):
        try:
            yield _sample(key, members, caption)
        except BrokenSampleError as error:
            left_out[str(error)] += 1


def _grouped(members: Iterator[tuple[str, bytes]], caption: str | None) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The members of each sample by their kind, as soon as the next sample begins; what is incomplete waits."""

    def whole(sample: Mapping[str, bytes]) -> bool:
        return IMAGE in sample and ((TEXT in sample and caption is None) or METADATA in sample)

    waiting: dict[str, dict[str, bytes]] = {}
    last = ""
    try:
        for name, data in members:
            key, _, suffix = name.rpartition(".")
            if last and key.startswith(f"{last}."):
                continue  # a.depth.png belongs to a.jpg
            if key != last:
                for extra in [each for each in waiting if each.startswith(f"{key}.")]:
                    del waiting[extra]
                if whole(waiting.get(last, {})):
                    yield last, waiting.pop(last)
                elif len(waiting) > WAITING:
                    oldest = next(iter(waiting))
                    yield oldest, waiting.pop(oldest)
                last = key
            waiting.setdefault(key, {}).setdefault(KINDS[suffix.lower()], data)
    except (CutError, StreamError, OSError):
        yield from (each for each in waiting.items() if whole(each[1]))
        raise
    yield from waiting.items()


def _members(file: BinaryIO, left_out: Counter[str]) -> Iterator[tuple[str, bytes]]:
    """Name and content of each member that a sample may have; other members are skipped."""
    try:
        tar: Any
        ending: Any = _Ending(file)
        with tarfile.open(fileobj=ending, mode="r|*", bufsize=1 << 16, tarinfo=_Header) as tar:
            for member in tar:
                suffix = member.name.rpartition(".")[2].lower()
                kept = member.isreg() and suffix in KINDS and not SKIPPED.match(member.name)
                if kept and member.size > MEMBER_BYTES:
                    left_out["too many bytes"] += 1
                elif kept:
                    yield member.name, tar.extractfile(member).read()
                tar.members.clear()
            # The end of a tar is a block of zeros; tarfile takes every other block for the end too.
            stream = tar.fileobj
            if stream.tell() == tar.offset:
                raise CutError(f"has no end after byte {tar.offset:,}; it may have been cut there", lost=False)
            if stream.tell() != tar.offset + 512 or stream.read(512).strip(b"\0"):
                raise CutError(f"damaged at byte {tar.offset:,}")
    except CutError:
        raise
    except TAR_ERRORS as error:
        raise CutError(f"cut or damaged ({one_line(error)})") from error


class _Ending:
    """A file that ends: tarfile goes on reading behind the end, by as much as a damaged size says."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._empty = file, 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._empty = 0 if data else self._empty + 1
        if self._empty > EMPTY_READS:
            raise EOFError("a size beyond its end")
        return data


class _Header(tarfile.TarInfo):
    """A header of bounded size, as tarfile reads one of any size into memory."""

    @classmethod
    def frombuf(cls, *arguments: Any) -> Self:
        header = super().frombuf(*arguments)
        if header.size < 0 or (header.size > EXTENDED_BYTES and header.type in EXTENDED):
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header


def _sample(key: str, members: Mapping[str, bytes], caption: str | None) -> Sample:
    if IMAGE not in members:
        raise BrokenSampleError("no image member")
    described: Mapping[str, Any] = {}
    with suppress(BrokenSampleError):
        described = read_json(members.get(METADATA, b"{}"))
    text = read_text(members[TEXT]) if caption is None and TEXT in members else ""
    if not (found := text or told_caption(described, caption)):
        raise BrokenSampleError("no caption")
    # img2dataset notes the tag, and drops it if it encodes the image again.
    orientation = stored_orientation(members[IMAGE]) or noted_orientation(described.get("exif")) or 1
    return Sample(key, members[IMAGE], found, orientation)
