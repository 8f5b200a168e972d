"""The tars to index: each real file once, however many links lead to it."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.index.builder import Task
from data_pipeline.index.shard_reading import ShardError, statistics_file
from vdtrain.errors import unreadable

# Name of the source of `data.shards`.
OWN = "own"
TAR = ".tar"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


@dataclass(frozen=True)
class Source:
    """The folders of one source, or single tars."""

    name: str
    roots: Sequence[Path]
    own: bool = False  # they are one's own, so that no download finished them

    def setting(self, root: Path) -> str:
        """The setting that names a root."""
        return f"data.shards={root}" if self.own else f"data.sources.{self.name}.shards={root}"


@dataclass
class Found:
    """What lies in the folders of the sources."""

    tasks: list[Task] = field(default_factory=list)  # one for each tar, by source and path
    unfinished: int = 0  # number of tars whose download has not finished
    compressed: list[Path] = field(default_factory=list)  # tars that cannot be read by offsets
    dangling: list[Path] = field(default_factory=list)  # links that lead to nothing
    others: Counter[str] = field(default_factory=Counter)  # number of other files by suffix


def find(
    sources: Sequence[Source], manifest: Path, decode: bool, caption: str | None, endings: Mapping[str, str]
) -> Found:
    """The tars of each source, one's own without statistics of a download; a ShardError if a folder cannot be read."""
    found = Found()
    seen: set[str] = set()
    for source in sources:
        tars: list[tuple[Path, os.stat_result]] = []
        for path in (path for root in source.roots for path in files_below(root, seen)):
            name = path.name.lower()
            try:
                status = path.stat()
            except OSError as error:
                if error.errno not in NOWHERE:
                    raise ShardError(f"{path}: {unreadable(error, path, 'index again')}") from error
                if path.is_symlink():
                    found.dangling.append(path)
                elif name.endswith(TAR):
                    # The download removes shards that it is about to retry.
                    found.unfinished += 1
                continue
            if name.startswith(".") or not stat.S_ISREG(status.st_mode):
                continue
            if name.endswith(COMPRESSED):
                found.compressed.append(path)
            elif not name.endswith(TAR):
                found.others[path.suffix] += 1
            elif source.own or statistics_file(path).exists():
                tars.append((path, status))
            else:
                found.unfinished += 1
        for path, status in sorted(tars):
            name, written = os.path.relpath(path, manifest), status.st_mtime_ns
            task = Task(source.name, path, name, status.st_size, written, decode, source.own, caption, dict(endings))
            found.tasks.append(task)
    return found


def files_below(root: Path, seen: set[str]) -> Iterator[Path]:
    """Every file below a folder, or the file itself; links are followed after all else, so that real paths come first.

    Args:
        seen: real paths that have come already and do not come again; those of this folder are added.

    Raises:
        ShardError: a folder cannot be read.
    """
    folders, links = deque([root]), deque[Path]()
    while folders or links:
        place = (folders or links).popleft()
        real = os.path.realpath(place)
        if real in seen:
            continue
        seen.add(real)
        if not os.path.isdir(place):
            yield Path(place)
            continue
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ShardError(f"{place}: {unreadable(error, place, 'index again')}") from error
        for entry in entries:
            if entry.is_symlink():
                links.append(Path(entry.path))
            elif entry.is_dir():
                folders.append(Path(entry.path))
            elif (file := os.path.join(real, entry.name)) not in seen:
                seen.add(file)
                yield Path(entry.path)
