"""One tar shard, read once: whole samples become rows of the manifest, broken ones are counted by reason."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from data_pipeline.index.samples import (
    Described,
    Endings,
    Pair,
    Picture,
    Sample,
    orientation,
    pairs,
    read_part,
    split_name,
)
from data_pipeline.index.tar_members import TarDamageError, TarMembers
from data_pipeline.shards import STATISTICS, successes
from vdtrain.data.manifest import STORED_SCHEMA, downloaded, pair_uid
from vdtrain.data.tar_samples import BrokenSampleError
from vdtrain.errors import ConfigError, unreadable

READ_AHEAD = 1 << 20
MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
DAMAGE = "damaged part of a tar"


class ShardError(ConfigError):
    """A shard that is damaged or incomplete; the message is one line."""


@dataclass(frozen=True)
class ShardScan:
    """The contents of one shard."""

    sha256: str
    bytes: int
    modified_ns: int
    samples: pa.Table  # columns of STORED_SCHEMA, in the order of the tar
    broken: Mapping[str, int]  # counts of the samples that were left out, by reason
    damage: str  # what the tar has lost beside them, in words; empty if it is whole
    fields: tuple[str, ...]  # names in the JSON of a sample without a caption


def read_shard(
    path: Path,
    source: str,
    name: str = "",
    decoded: bool = False,
    caption: str | None = None,
    own: bool = False,
    endings: Endings = MappingProxyType({}),
) -> ShardScan:
    """Read and check one shard.

    Args:
        source: name of the source.
        name: of the shard in the manifest.
        decoded: decode every image instead of its header alone.
        caption: field of the JSON that holds the captions; None for members of text.
        own: another program made it, so that there are no statistics. Its damage costs only the samples it is in.
        endings: of the files of further modalities.

    Raises:
        ShardError: the tar is damaged or truncated, holds fewer or more samples than were downloaded, or was written
            to meanwhile; if `own`, it is not a tar at all.
    """
    broken: Counter[str] = Counter()
    rows: dict[str, list[Any]] = {column: [] for column in STORED_SCHEMA.names}
    try:
        with path.open("rb", buffering=READ_AHEAD) as file:
            status = path.stat()
            members = TarMembers(file, status.st_size, strict=not own)
            samples = _samples(members, decoded, caption, broken, endings)
            for pair in (pair for sample in samples for pair in pairs(sample)):
                if isinstance(pair, BrokenSampleError):
                    broken[str(pair)] += 1
                    continue
                for column, value in {**_row(pair, source, file.fileno()), "shard": name}.items():
                    rows[column].append(value)
            after = path.stat()
        if not own and (expected := _expected(path)) not in (None, len(samples)):
            raise TarDamageError(f"holds {len(samples)} samples of {expected} that were downloaded")
    except TarDamageError as error:
        raise ShardError(f"{path}: {error}; {_remedy(path)}") from error
    except OSError as error:
        raise ShardError(f"{path}: {unreadable(error, path, 'index again')}") from error
    if (after.st_size, after.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
        raise ShardError(f"{path}: was written to while it was read; index it again once it is finished")
    if own and members.count == 0 and (members.damage or not status.st_size):
        raise ShardError(f"{path}: {_no_tar(path)}")
    broken.update({DAMAGE: 1} if members.damage else {})
    table = pa.Table.from_pydict(rows, STORED_SCHEMA)
    parts = (part for sample in samples for part in sample.parts.values())
    fields = () if len(table) else next((part.fields for part in parts if isinstance(part, Described)), ())
    size, modified_ns = status.st_size, status.st_mtime_ns
    return ShardScan(members.sha256, size, modified_ns, table, broken, members.damage, fields)


def statistics_file(tar: Path) -> Path:
    """The file that the download writes beside a finished tar."""
    return tar.with_name(tar.stem + STATISTICS)


def _remedy(path: Path) -> str:
    """Only what our download made can be downloaded again."""
    if downloaded(path):
        return f"remove it and {statistics_file(path).name}, and download again"
    return "replace it by a whole copy, or name its folder by data.shards, which lists what is whole"


def _no_tar(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(8)
    if not start:
        return "is empty; replace it by a whole copy"
    packed = next((name for magic, name in MAGIC.items() if start.startswith(magic)), None)
    if packed:
        return f"is compressed by {packed}, and samples are read by their place; decompress it"
    return "is not a tar; replace it by a whole copy"


def _expected(path: Path) -> int | None:
    """Number of samples in the tar according to the download's statistics; None without them."""
    try:
        return successes(statistics_file(path))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise TarDamageError(f"its statistics cannot be read ({error})") from error


def _samples(
    members: TarMembers, decoded: bool, caption: str | None, broken: Counter[str], endings: Endings
) -> list[Sample]:
    """The samples of a tar, in the order of their first members.

    As in webdataset, neighbours with one key are a sample. A later run of the key belongs to it too, unless both have a
    member of the same name: then two samples have this key.
    """
    runs: list[Sample] = []
    for member in members:
        name = split_name(member.name, endings)
        if name is None:
            continue
        if not member.regular:
            broken["not a regular file"] += 1
            continue
        key, place = name[0], name[1:]
        if not runs or key != runs[-1].key or place in runs[-1].parts:
            runs.append(Sample(key))
        part = read_part(place[1], member.offset, member.size, member.content, decoded, caption, endings)
        runs[-1].parts[place] = part
    samples: list[Sample] = []
    latest: dict[str, Sample] = {}
    for run in runs:
        earlier = latest.get(run.key)
        if earlier is not None and not earlier.parts.keys() & run.parts.keys():
            earlier.parts.update(run.parts)
        else:
            latest[run.key] = run
            samples.append(run)
    return samples


def _row(pair: Pair, source: str, file: int) -> dict[str, Any]:
    """The manifest row of a pair; `file` is the descriptor of the tar."""
    place, described, turned = pair.place, pair.described, orientation(pair)
    sizes = (place.width, place.height) if isinstance(place, Picture) else (0, 0)
    # A name is a label here and never a path. Unlike a tar, a manifest holds only characters.
    key = pair.key.encode("utf-8", "backslashreplace").decode()
    url = described.url
    if url is None and described.uid is None:
        # Keys repeat from tar to tar, and tars are renamed.
        url = f"{key} {hashlib.sha256(os.pread(file, place.size, place.offset)).hexdigest()}"
    return {
        "uid": described.uid or pair_uid(source, url or "", pair.caption),
        "key": key,
        "offset": place.offset,
        "size": place.size,
        "orientation": turned,
        "width": sizes[turned >= 5],
        "height": sizes[turned < 5],
        "caption": pair.caption,
        "content": place.content,
        "members": [{"modality": each.modality, "offset": each.offset, "size": each.size} for each in pair.files]
        or None,
    }
