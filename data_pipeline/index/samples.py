"""Which members of a tar form a sample, and which of these are a picture and its caption: WebDataset's rules.

A member belongs to the sample that its name up to the first dot of the base name gives, folders included; the rest is
its suffix. `a.jpg`, `a.txt` and `a.seg.png` are one sample. Photographs are often called `a.2020.jpg` and `a.2020.txt`:
a picture with a caption of exactly its name is therefore a pair of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from vdtrain.data.decode import CENTRE, TURNED, DecodeError, decode, image_format, image_size, stored_orientation
from vdtrain.data.manifest import content_hash
from vdtrain.data.tar_samples import (
    IMAGES,
    METADATA,
    TEXTS,
    BrokenSampleError,
    clean,
    noted_orientation,
    read_json,
    read_text,
    told_caption,
)

# Of several captions, these names come first.
CAPTION_NAMES = ("", "caption", "text", "en")
# Names of pictures that are not the one that the caption describes.
BESIDE = {"seg", "segmentation", "mask", "depth", "normal", "edge", "canny", "pose", "thumb", "thumbnail", "preview"}
# The decoder reads every byte at any size; a small one takes less time.
DECODED_SIDE = 32
# Reasons of a decoder that are counted by the part of the image where it found them.
DAMAGED = ("cannot decode", "truncated")
UID = re.compile(r"[0-9a-f]{32}")
# webdataset passes over such names.
META = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class Picture:
    """An image as stored."""

    offset: int
    size: int
    width: int  # in pixels, by the header
    height: int
    orientation: int | None  # EXIF's 1 to 8 by the image's own tag; None without one
    content: int  # hash of its bytes


@dataclass(frozen=True)
class Described:
    """What the JSON of a sample tells."""

    uid: str | None = None
    url: str | None = None
    orientation: int | None = None  # EXIF's 1 to 8; None if it is not told
    caption: str | None = None
    fields: tuple[str, ...] = ()  # names of the fields


@dataclass(frozen=True)
class File:
    """A file of a further modality, which is not looked into."""

    modality: str
    offset: int
    size: int
    content: int  # hash of its bytes


Part = Picture | File | Described | str | BrokenSampleError
# By ending, such as wav or depth.png, the further modality whose files have it.
Endings = Mapping[str, str]


@dataclass
class Sample:
    """The members with one key, by their suffix without its extension, and by their extension in small letters."""

    key: str
    parts: dict[tuple[str, str], Part | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """A picture with its caption; of a sample with files of further modalities, one of the two may be missing."""

    key: str
    picture: Picture | None
    caption: str  # empty if there is none
    described: Described
    files: Sequence[File] = ()  # of further modalities, one of each

    @property
    def place(self) -> Picture | File:
        """The picture, or else the first file."""
        return self.picture or self.files[0]


def split_name(name: str, endings: Endings) -> tuple[str, str, str] | None:
    """Key, name inside the sample and extension: "./x/a.seg.PNG" is ("x/a", "seg", "png"); None for other members.

    The longest of `endings` that fits is an extension too.
    """
    while name.startswith("./"):
        name = name[2:]
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    # The base name of files that only a file manager knows starts with a dot.
    if not stem or not suffix or META.match(name):
        return None
    inner, _, extension = suffix.rpartition(".")
    for ending in sorted(endings, key=len, reverse=True):
        if f".{suffix}".lower().endswith(f".{ending}"):
            inner, extension = suffix[: -len(ending) - 1], ending
            break
    return folder + slash + stem, inner, extension.lower()


def read_part(
    extension: str,
    offset: int,
    size: int,
    content: bytes | None,
    decoded: bool,
    caption: str | None,
    endings: Endings,
) -> Part | None:
    """What a member tells of its sample; None if it is no picture, caption, JSON or file of a further modality.

    Args:
        content: None if it is too large.
        decoded: decode pictures as a whole.
        caption: field of the JSON that holds the caption; None for a member of text, or else one of CAPTIONS.
    """
    try:
        if extension in endings:
            return File(endings[extension], offset, size, content_hash(_whole(content)))
        if extension in IMAGES:
            return _picture(offset, size, _whole(content), decoded)
        if extension in TEXTS and caption is None:
            return read_text(_whole(content))
        return _described(_whole(content), caption) if extension == METADATA else None
    except BrokenSampleError as error:
        return error


def pairs(sample: Sample) -> Iterator[Pair | BrokenSampleError]:
    """The pairs of a sample, and an error for each picture or file of another modality that is left out."""
    pictures, texts, described = (_by_inner(sample, each) for each in (IMAGES, TEXTS, (METADATA,)))
    pictures = {inner: part for inner, part in pictures.items() if not isinstance(part, File)}
    files = _files(sample)
    captions = {inner: _caption(texts.get(inner), described.get(inner)) for inner in [*texts, *described]}
    told = {inner for inner, caption in captions.items() if inner in texts or isinstance(caption, str)}
    subjects = list(dict.fromkeys([*pictures, *files]))
    # Those without a caption of their name belong to the sample as a whole.
    shared: dict[str, File] = {}
    for inner in sorted(files.keys() - told, key=len):
        shared = files[inner] | shared
    named = [inner for inner in subjects if inner in told]
    for inner in named:
        key, own = (f"{sample.key}.{inner}", {}) if inner else (sample.key, shared)
        yield _pair(key, pictures.get(inner), captions[inner], described.get(inner), own | files.get(inner, {}))
    if "" in named:
        return
    # Pictures without a caption of their name: of several that share the sample's caption, one is taken.
    others = [each for each in subjects if each not in told and each.rpartition(".")[2].lower() not in BESIDE]
    if named:
        yield from (BrokenSampleError("no caption") for _ in others)
    elif not others:
        yield BrokenSampleError("no image member")
    else:
        drawn = [each for each in others if each in pictures] or others
        inner = "" if "" in drawn else drawn[0]
        names = [each for each in captions if each in told] or list(captions)
        first = min(names, key=lambda each: _place(each, CAPTION_NAMES), default=None)
        caption = None if first is None else captions[first]
        yield _pair(sample.key, pictures.get(inner), caption, described.get(""), shared | files.get(inner, {}))


def _files(sample: Sample) -> dict[str, dict[str, File]]:
    """The files of further modalities by their name inside the sample and by modality, the first of several."""
    found: dict[str, dict[str, File]] = {}
    for (inner, _), part in sample.parts.items():
        if isinstance(part, File):
            found.setdefault(inner, {}).setdefault(part.modality, part)
    return found


def orientation(pair: Pair) -> int:
    """EXIF's orientation of a stored image, 1 to 8. What the file says of itself comes before what was noted of it."""
    return (pair.picture and pair.picture.orientation) or pair.described.orientation or 1


def _by_inner(sample: Sample, extensions: Sequence[str]) -> dict[str, Part | None]:
    """The parts with one of the extensions by their name inside the sample, the first extension if it has several."""
    found = [(inner, extension) for inner, extension in sample.parts if extension in extensions]
    best = dict(sorted(found, key=lambda each: -_place(each[1], extensions)))
    return {inner: sample.parts[inner, best[inner]] for inner in dict(found)}


def _place(name: str, names: Sequence[str]) -> int:
    return names.index(name) if name in names else len(names)


def _caption(text: Part | None, described: Part | None) -> str | BrokenSampleError | None:
    """The caption by a member of text, else by the JSON; an error if there is one but it cannot be read."""
    if isinstance(text, str) and text:
        return text
    if isinstance(described, Described) and described.caption:
        return described.caption
    return next((each for each in (text, described) if isinstance(each, BrokenSampleError)), None)


def _pair(
    key: str,
    picture: Part | None,
    caption: str | BrokenSampleError | None,
    described: Part | None,
    files: Mapping[str, File],
) -> Pair | BrokenSampleError:
    for part in (picture, caption):
        if isinstance(part, BrokenSampleError):
            return part
    shown = picture if isinstance(picture, Picture) else None
    text = caption if isinstance(caption, str) else ""
    if (shown is not None) + bool(text) + len(files) < 2:
        return BrokenSampleError("no caption")
    found = described if isinstance(described, Described) else Described()
    return Pair(key, shown, text, found, [files[name] for name in sorted(files)])


def _whole(content: bytes | None) -> bytes:
    if content is None:
        raise BrokenSampleError("too many bytes")
    return content


def _picture(offset: int, size: int, image: bytes, decoded: bool) -> Picture:
    try:
        width, height = image_size(image)
    except DecodeError as error:
        raise BrokenSampleError(_reason(error, "header")) from error
    if decoded:
        try:
            decode(image, DECODED_SIDE, CENTRE)
        except DecodeError as error:
            raise BrokenSampleError(_reason(error, "content")) from error
    return Picture(offset, size, width, height, _tag(image), content_hash(image))


def _reason(error: DecodeError, part: str) -> str:
    return f"cannot be decoded: {part}" if error.reason in DAMAGED else error.reason


def _tag(image: bytes) -> int | None:
    """The orientation by an image's own tag."""
    turned = image_format(image) in TURNED
    return stored_orientation(image) if turned or _may_have_exif(image) else None


def _may_have_exif(image: bytes) -> bool:
    """Whether an image has EXIF data, by its bytes: to open each image a second time would take long."""
    if not image.startswith(b"\xff\xd8"):
        return b"eXIf" in image or b"EXIF" in image
    place = 2
    # Segments of applications and comments stand before the image.
    while image[place : place + 1] == b"\xff" and (0xE0 <= image[place + 1] <= 0xEF or image[place + 1] == 0xFE):
        if image[place + 4 : place + 8] == b"Exif":
            return True
        place += 2 + int.from_bytes(image[place + 2 : place + 4], "big")
    return False


def _described(content: bytes, caption: str | None) -> Described:
    found = read_json(content)
    uid, url = found.get("uid"), found.get("url")
    return Described(
        uid if isinstance(uid, str) and UID.fullmatch(uid) else None,
        clean(url) if isinstance(url, str) and url else None,
        noted_orientation(found.get("exif")),
        told_caption(found, caption),
        tuple(found),
    )
