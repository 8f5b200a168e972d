"""One tar shard, read once: complete samples become rows of the manifest, broken ones are counted by reason."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from data_pipeline.index.tar_members import Member, TarDamageError, TarMembers
from data_pipeline.shards import STATISTICS
from vdtrain.data.decode import FORMATS, IMAGE_ERRORS, DecodeError, decode, image_size
from vdtrain.data.manifest import SAMPLE_SCHEMA, pair_uid
from vdtrain.errors import unreadable

IMAGE, CAPTION, METADATA = "jpg", "txt", "json"
READ_AHEAD = 1 << 20
UID = re.compile(r"[0-9a-f]{32}")
# The decoder reads every byte at any size; a small one takes less time.
DECODED_SIDE = 32
ORIENTATION_TAG = 0x0112
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


class ShardError(ValueError):
    """A shard that is damaged or incomplete; the message is one line."""


class BrokenSampleError(ValueError):
    """A sample that is left out; samples are counted by its message."""


@dataclass(frozen=True)
class ShardScan:
    """The contents of one shard.

    Attributes:
        samples: columns of SAMPLE_SCHEMA, in the order of the tar.
        broken: counts of the samples that were left out, by reason.
    """

    sha256: str
    bytes: int
    modified_ns: int
    samples: pa.Table
    broken: Mapping[str, int]


def read_shard(path: Path, source: str, name: str = "", decoded: bool = False) -> ShardScan:
    """Read and check one shard whose download has finished.

    Args:
        source: name of the source.
        name: of the shard in the manifest.
        decoded: decode every image instead of its header alone.

    Raises:
        ShardError: the tar is damaged or truncated, holds fewer or more samples than were downloaded, or was written
            to meanwhile.
    """
    rows: dict[str, list[Any]] = {column: [] for column in SAMPLE_SCHEMA.names}
    broken: Counter[str] = Counter()
    keys: set[str] = set()
    try:
        with path.open("rb", buffering=READ_AHEAD) as file:
            status = path.stat()
            members = TarMembers(file, status.st_size)
            for key, sample in groupby(_named(members, broken), key=lambda member: member.name.partition(".")[0]):
                try:
                    if key in keys:
                        raise BrokenSampleError("repeated key")
                    keys.add(key)
                    row = _row(key, _contents(sample), source, decoded)
                except BrokenSampleError as error:
                    broken[str(error)] += 1
                    continue
                for column, value in {**row, "shard": name}.items():
                    rows[column].append(value)
            after = path.stat()
        expected = _expected(path)
    except TarDamageError as error:
        raise ShardError(_damaged(path, str(error))) from error
    except OSError as error:
        raise ShardError(f"{path}: {unreadable(error, path, 'index again')}") from error
    if (after.st_size, after.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
        raise ShardError(f"{path}: was written to while it was read; index it again once its download has finished")
    if expected is not None and expected != len(keys):
        raise ShardError(_damaged(path, f"holds {len(keys)} samples of {expected} that were downloaded"))
    table = pa.Table.from_pydict(rows, SAMPLE_SCHEMA)
    return ShardScan(members.sha256, status.st_size, status.st_mtime_ns, table, dict(broken))


def statistics_file(tar: Path) -> Path:
    """The file that the download writes beside a finished tar."""
    return tar.with_name(tar.stem + STATISTICS)


def _damaged(path: Path, what: str) -> str:
    return f"{path}: {what}; remove it and {statistics_file(path).name}, and download again"


def _expected(path: Path) -> int | None:
    """Number of samples in the tar according to the download's statistics; None without them."""
    try:
        statistics = json.loads(statistics_file(path).read_text(encoding="utf-8"))
        count = statistics.get("successes", statistics.get("status_dict", {}).get("success", 0))
        return int(count)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError) as error:
        raise TarDamageError("its statistics cannot be read") from error


def _named(members: TarMembers, broken: Counter[str]) -> Iterator[Member]:
    """The members that can be part of a sample; the others are counted in `broken`."""
    for member in members:
        key = member.name.partition(".")[0]
        if not key or re.search(r"[/\\\0\ud800-\udfff]", member.name):
            broken["unsafe name"] += 1
        elif not member.regular:
            broken["not a regular file"] += 1
        else:
            yield member


def _contents(members: Iterator[Member]) -> dict[str, Member]:
    """The members of a sample by their suffix."""
    found: dict[str, Member] = {}
    reason = ""
    # All of them are read, so that the next sample starts at its own first member.
    for member in members:
        suffix = member.name.partition(".")[2]
        if suffix in found:
            reason = reason or "repeated member"
        found[suffix] = member
    missing = [suffix for suffix in (IMAGE, CAPTION, METADATA) if suffix not in found]
    if missing:
        reason = reason or f"no {', no '.join(missing)} member"
    if any(found[suffix].content is None for suffix in (IMAGE, CAPTION, METADATA) if suffix in found):
        reason = reason or "too many bytes"
    if reason:
        raise BrokenSampleError(reason)
    return found


def _row(key: str, members: Mapping[str, Member], source: str, decoded: bool) -> dict[str, Any]:
    """The manifest row of a sample; BrokenSampleError if it cannot be trained on."""
    image, text, metadata = (members[suffix].content or b"" for suffix in (IMAGE, CAPTION, METADATA))
    try:
        caption = text.decode()
    except UnicodeDecodeError as error:
        raise BrokenSampleError("caption is not UTF-8") from error
    if not caption.strip():
        raise BrokenSampleError("no caption")
    described = _mapping(metadata, "metadata is not a JSON object")
    try:
        width, height = image_size(image)
    except DecodeError as error:
        raise BrokenSampleError("too many pixels" if "pixels" in str(error) else "cannot be decoded: header") from error
    orientation = _orientation(described, image)
    if decoded:
        try:
            decode(image, DECODED_SIDE, (0.5, 0.5))
        except DecodeError as error:
            raise BrokenSampleError("cannot be decoded: content") from error
    if orientation >= 5:
        width, height = height, width
    return {
        "uid": _uid(described, source, image, caption),
        "key": key,
        "offset": members[IMAGE].offset,
        "size": members[IMAGE].size,
        "orientation": orientation,
        "width": width,
        "height": height,
        "caption": caption,
    }


def _uid(described: Mapping[str, Any], source: str, image: bytes, caption: str) -> str:
    """The uid that `select` gave the pair, or a new one."""
    uid, url = described.get("uid"), described.get("url")
    if isinstance(uid, str) and UID.fullmatch(uid):
        return uid
    if not isinstance(url, str) or not url:
        url = hashlib.sha256(image).hexdigest()
    # JSON can hold unpaired surrogates, which UTF-8 cannot.
    return pair_uid(source, url.encode("utf-8", "replace").decode(), caption)


def _orientation(described: Mapping[str, Any], image: bytes) -> int:
    """EXIF orientation of an image. The download does not turn images, and drops the tag if it encodes them again."""
    exif = described.get("exif")
    if exif is not None:
        name = _mapping(exif, "EXIF is not a JSON object").get("Image Orientation")
        # Viewers ignore values that are not in the standard.
        return ORIENTATIONS.get(str(name), 1)
    tag: int | None = None
    with suppress(*IMAGE_ERRORS), Image.open(io.BytesIO(image), formats=FORMATS) as file:
        tag = file.getexif().get(ORIENTATION_TAG)
    return tag if isinstance(tag, int) and 1 <= tag <= 8 else 1


def _mapping(text: Any, reason: str) -> dict[str, Any]:
    """A JSON object; `reason` is the error if it is something else."""
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise BrokenSampleError(reason) from error
    if not isinstance(found, dict):
        raise BrokenSampleError(reason)
    return found
