"""Tar shards to a manifest: every new shard is read once and checked, its whole samples are listed.

A shard that was cut short is refused, not read as far as it goes; a member that is broken is left out and counted.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipeline.progress import track
from vdtrain.data.identity import pair_uid
from vdtrain.data.manifest import SamplesWriter, read_shard_rows, write_shard_rows

BLOCK = 512
MEMBERS = ("jpg", "txt", "json")

logger = logging.getLogger(__name__)


class ShardError(ValueError):
    """A tar file that is not whole."""


@dataclass
class Reading:
    """What one shard holds: rows of the manifest (without the shard's number), and members left out by reason."""

    sha256: str
    samples: list[dict[str, Any]] = field(default_factory=list)
    broken: Counter[str] = field(default_factory=Counter)


def index(sources: Mapping[str, Path], manifest: Path) -> None:
    """Bring a manifest up to the shards in the sources' folders; shards that it knows already are not read again.

    Raises:
        ShardError: no source has a shard, or a finished shard (one with its statistics) is not whole.
    """
    known = {(row["path"], row["bytes"], row["modified_ns"]): row for row in read_shard_rows(manifest)}
    found = [(source, path) for source, folder in sources.items() for path in sorted(folder.rglob("*.tar"))]
    if not found:
        raise ShardError(f"data.sources: no .tar in {', '.join(map(str, sources.values()))}; run the download first")
    shards: list[dict[str, Any]] = []
    writer: SamplesWriter | None = None
    for source, path in track(found, "index"):
        if not path.with_name(path.stem + "_stats.json").exists():
            logger.warning("%s is passed over: its download has not finished", path)
            continue
        status = path.stat()
        relative = os.path.relpath(path, manifest)
        shard = known.get((relative, status.st_size, status.st_mtime_ns))
        if shard is None:
            reading = read_shard(path, source)
            writer = writer or SamplesWriter(manifest, _unused_name(manifest))
            described = {
                "path": relative,
                "source": source,
                "bytes": status.st_size,
                "modified_ns": status.st_mtime_ns,
                "sha256": reading.sha256,
                "broken": json.dumps(reading.broken),
            }
            shard = writer.add(described, reading.samples)
        shards.append(shard)
    if writer is not None:
        writer.close()
    write_shard_rows(manifest, shards)
    broken: Counter[str] = Counter()
    for shard in shards:
        broken.update(json.loads(shard["broken"]))
    left_out = ", ".join(f"{count} {reason}" for reason, count in broken.items()) or "none"
    total = sum(shard["samples"] for shard in shards)
    print(f"{manifest}: {total:,} samples in {len(shards):,} shards; left out: {left_out}")


def _unused_name(manifest: Path) -> str:
    """The first name that no file of samples in the manifest's folder has."""
    numbers = (f"samples-{number:05d}.parquet" for number in itertools.count())
    return next(name for name in numbers if not (manifest / name).exists())


def read_shard(path: Path, source: str) -> Reading:
    """Read and check one shard.

    Raises:
        ShardError: the tar does not end as a whole one does, or a header in it is damaged.
    """
    data = path.read_bytes()
    reading = Reading(hashlib.sha256(data).hexdigest())
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    end = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                key, _, suffix = member.name.partition(".")
                if not member.isfile() or "/" in member.name or key in ("", ".."):
                    reading.broken["unsafe name"] += 1
                else:
                    groups.setdefault(key, {})[suffix] = member
    except tarfile.TarError as error:
        raise ShardError(f"{path}: damaged ({error}); remove it and its _stats.json, and download again") from error
    # A tar that was cut at a member's boundary reads without an error: only its ending tells.
    if data[end : end + 2 * BLOCK] != bytes(2 * BLOCK):
        raise ShardError(f"{path}: cut short; remove it and its _stats.json, and download again")
    for key, members in groups.items():
        row = _sample(data, key, members, source)
        if isinstance(row, str):
            reading.broken[row] += 1
        else:
            reading.samples.append(row)
    return reading


def _sample(data: bytes, key: str, members: Mapping[str, tarfile.TarInfo], source: str) -> dict[str, Any] | str:
    """The manifest row of a sample, or the reason why it is left out."""
    if any(suffix not in members for suffix in MEMBERS):
        return "incomplete sample"
    content = {suffix: data[info.offset_data : info.offset_data + info.size] for suffix, info in members.items()}
    try:
        with Image.open(io.BytesIO(content["jpg"])) as picture:
            width, height = picture.size
        described = _mapping(content["json"])
        caption = content["txt"].decode()
        exif = _mapping(described.get("exif") or "{}")
    except (OSError, ValueError, TypeError, Image.DecompressionBombError) as error:
        return f"unreadable {type(error).__name__}"
    if not caption.strip():
        return "empty caption"
    if exif.get("Image Orientation") not in (None, "Horizontal (normal)"):
        # Resizing drops the tag and leaves the picture lying on its side.
        return "rotated by EXIF"
    return {
        "uid": pair_uid(source, str(described.get("url")), caption),
        "key": key,
        "offset": members["jpg"].offset_data,
        "size": members["jpg"].size,
        "width": width,
        "height": height,
        "caption": caption,
        "caption_hash": caption_hash(caption),
    }


def caption_hash(caption: str) -> int:
    """64-bit hash of a caption."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "little")


def _mapping(text: str | bytes) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise TypeError(f"{type(found).__name__} in place of an object")
    return found
