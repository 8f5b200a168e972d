"""What the members of a sample tell, and the samples of a tar that is read once from its beginning.

Captions are alternative texts of web pages, without the parts that do not describe the image. The paper describes its
cleaning only in outline. This one removes, in this order: HTML entities and tags; web and e-mail addresses; text in
square or curly brackets; unprintable characters; underscores, and dashes or slashes that stand alone; quotation marks
around words (an apostrophe inside a word stays); file name extensions; superfluous white space.
"""

from __future__ import annotations

import codecs
import html
import json
import lzma
import math
import re
import tarfile
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, Self

from vdtrain.data.decode import ORIENTATION_TAG, stored_orientation
from vdtrain.data.shards import StreamError
from vdtrain.errors import one_line

# A caption that does not match is clean. A match may also be a clean caption, which cleaning does not change.
# The pattern is also valid RE2 syntax, for whole columns (data_pipeline.select.filters).
UNCLEAN = (
    r"""[^ -~]|[<>&\[\]{}_"`@*#|~^\\]|  |^[ ,;:]|[ ,;:]$| [,;:.!?]|//|[Ww]{3}\.|\.[A-Za-z]{3,4}[^A-Za-z0-9]*$"""
    r"""|(?:^|[^A-Za-z0-9])['/-]|['/-](?:[^A-Za-z0-9]|$)"""
)

_TAG = re.compile(r"<[/!?]?[A-Za-z][^<>]{0,1000}>|<!--.{0,1000}?-->", re.DOTALL)
_URL = re.compile(r"(?:https?://|ftp://|www\.)[^\s<>\"'\[\]{}]+", re.IGNORECASE)
_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+")
_BRACKETS = re.compile(r"\[[^\[\]{}]*\]|\{[^\[\]{}]*\}")
_LONE_DASH = re.compile(r"(?:(?<=\s)|^)[-/\u2010-\u2015]+(?=\s|$)")
_DOUBLE_DASH = re.compile(r"[-\u2010-\u2015]{2,}|/{2,}")
_SINGLE_QUOTE = re.compile(r"(?<![A-Za-z0-9])'|'(?![A-Za-z0-9])")
_FILE_NAME = re.compile(r"\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg)(?=\W*$)", re.IGNORECASE)
_SPACE_BEFORE_MARK = re.compile(r" +(?=[,;:!?](?: |$)|\.(?: |$))")
_EDGES = " \t,;:/-\u2010\u2011\u2012\u2013\u2014\u2015"
_QUOTES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc", "'") | dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb", '"'))
_SYMBOLS: dict[int, str | None] = str.maketrans(
    dict.fromkeys("[]{}<>_*#|~^\\`\u2022\u00b7\u25cf\u2605\u2122\u00ae\u00a9\u00a0", " ") | {'"': None}
)


def clean_caption(text: str) -> str:
    """The cleaned caption, empty if no description remains. Cleaning it again changes nothing."""
    for _ in range(8):
        cleaned = _clean_once(text)
        if cleaned == text:
            break
        text = cleaned
    return text


def _clean_once(text: str) -> str:
    # Most captions need few of these steps, and a search for a character costs less than a pattern.
    if "&" in text:
        text = html.unescape(text)
    if not text.isascii():
        text = unicodedata.normalize("NFC", text).translate(_QUOTES)
    if "<" in text:
        text = _TAG.sub(" ", text)
    if "//" in text or "www." in text.lower():
        text = _URL.sub(" ", text)
    if "@" in text:
        text = _EMAIL.sub(" ", text)
    if "[" in text or "{" in text:
        for _ in range(3):  # the innermost first
            text = _BRACKETS.sub(" ", text)
    text = text.translate(_SYMBOLS)
    if not text.isprintable():
        text = "".join(letter for letter in text if letter.isprintable() or letter.isspace())
    if "'" in text:
        text = _SINGLE_QUOTE.sub("", text)
    if "-" in text or "/" in text or not text.isascii():
        text = _DOUBLE_DASH.sub(" ", _LONE_DASH.sub(" ", text))
    if "." in text:
        text = _FILE_NAME.sub("", text)
    text = " ".join(text.split())
    if " ," in text or " ." in text or " ;" in text or " :" in text or " !" in text or " ?" in text:
        text = _SPACE_BEFORE_MARK.sub("", text)
    return text.strip(_EDGES)


# Extensions of images; the decoder decides whether it reads one. The first of them is the picture of a sample that has
# several: masks are PNG or TIFF files.
IMAGES = ("jpg", "jpeg", "jfif", "webp", "avif", "heic", "heif", "png", "bmp", "gif", "tif", "tiff")
TEXTS = ("txt", "caption", "text")
METADATA = "json"
# Fields of the JSON that hold the caption where no member of text does.
CAPTIONS = ("caption", "text")
# Names of the tag's values in img2dataset's metadata.
ORIENTATIONS = {
    "Horizontal (normal)": 1,
    "Mirrored horizontal": 2,
    "Rotated 180": 3,
    "Mirrored vertical": 4,
    "Mirrored horizontal then rotated 90 CCW": 5,
    "Rotated 90 CW": 6,
    "Mirrored horizontal then rotated 90 CW": 7,
    "Rotated 90 CCW": 8,
}
# As exifread and as Pillow call it.
ORIENTATION_NAMES = ("Image Orientation", "Orientation", str(ORIENTATION_TAG))
# Marks at the beginning of a text, as Windows' editors write them.
MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


class BrokenSampleError(ValueError):
    """A sample that is left out; samples are counted by its message."""


def read_text(content: bytes) -> str:
    """The text of a member; a BrokenSampleError if it is not UTF-8, or UTF-16 with its mark."""
    codec = next((codec for mark, codec in MARKS if content.startswith(mark)), "utf-8")
    try:
        return clean(content.decode(codec))
    except UnicodeDecodeError as error:
        raise BrokenSampleError("caption is not UTF-8") from error


def clean(text: str) -> str:
    """Line ends as on Unix, nothing around the text, and no half characters, which JSON can hold and UTF-8 cannot."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def read_json(content: bytes) -> dict[str, Any]:
    """The JSON object of a member; a BrokenSampleError if it is none."""
    with suppress(ValueError, RecursionError):
        if isinstance(found := json.loads(content), dict):
            return found
    raise BrokenSampleError("metadata is not a JSON object")


def told_caption(found: Mapping[str, Any], caption: str | None) -> str | None:
    """The caption in a JSON object; None if it has none.

    Args:
        caption: the field, dotted inside others; None for the first of CAPTIONS that has text.
    """
    texts = (_as_text(_look_up(found, name)) for name in (CAPTIONS if caption is None else (caption,)))
    return next(filter(None, texts), None)


def noted_orientation(exif: Any) -> int | None:
    """The orientation in img2dataset's EXIF, which is JSON inside the JSON, or in an object like it."""
    if isinstance(exif, str) and exif != "{}":
        with suppress(ValueError, RecursionError):
            exif = json.loads(exif)
    if not isinstance(exif, dict):
        return None
    noted = next((str(exif[name]).strip() for name in ORIENTATION_NAMES if name in exif), "")
    return ORIENTATIONS.get(noted) or (int(noted) if re.fullmatch("[1-8]", noted) else None)


def _look_up(found: Mapping[str, Any], name: str) -> Any:
    """A field by its name, or inside other fields by a dotted name."""
    if name in found:
        return found[name]
    first, dot, rest = name.partition(".")
    inner = found.get(first)
    return _look_up(inner, rest) if dot and isinstance(inner, Mapping) else None


def _as_text(value: Any) -> str:
    """A caption as text: a number in digits, of a list the first that is one; empty for anything else."""
    if isinstance(value, list):
        return next(filter(None, (_as_text(each) for each in value if not isinstance(each, list))), "")
    if isinstance(value, str):
        return clean(value)
    # A float cannot hold every integer.
    number = isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf
    return str(value) if number else ""


ENDINGS = {*IMAGES, *TEXTS, METADATA}
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
    """The members of each sample by their ending, as soon as the next sample begins; what is incomplete waits."""

    def whole(sample: Mapping[str, bytes]) -> bool:
        texts = (*TEXTS, METADATA) if caption is None else (METADATA,)
        return _first(sample, IMAGES) is not None and _first(sample, texts) is not None

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
            waiting.setdefault(key, {}).setdefault(suffix.lower(), data)
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
                kept = member.isreg() and suffix in ENDINGS and not SKIPPED.match(member.name)
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


def _first(members: Mapping[str, bytes], endings: Sequence[str]) -> bytes | None:
    """Of several pictures or texts of a sample, the one that the index takes too."""
    return next((members[ending] for ending in endings if ending in members), None)


def _sample(key: str, members: Mapping[str, bytes], caption: str | None) -> Sample:
    image, told = _first(members, IMAGES), _first(members, TEXTS)
    if image is None:
        raise BrokenSampleError("no image member")
    described: Mapping[str, Any] = {}
    with suppress(BrokenSampleError):
        described = read_json(members.get(METADATA, b"{}"))
    text = read_text(told) if caption is None and told is not None else ""
    if not (found := text or told_caption(described, caption)):
        raise BrokenSampleError("no caption")
    # img2dataset notes the tag, and drops it if it encodes the image again.
    orientation = stored_orientation(image) or noted_orientation(described.get("exif")) or 1
    return Sample(key, image, found, orientation)
