"""Bytes from tar shards in local folders, on web servers and in object stores.

A local shard is read at the offset in the manifest. Byte ranges of a remote shard are read (`vdtrain.storage.stores`).
With a cache, the whole shard is also fetched in the background, for its later samples.

Every read is compared with the manifest, as a shard may be made anew while a run goes on: a local shard's size and
time, and of every shard the tar header before the image. If these differ, the checksum of the whole shard decides.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from vdtrain.data.decode import DecodeError
from vdtrain.data.manifest import INDEX, SHARDS_FILE, TAR_BLOCK, Manifest, ManifestError, ShardRows
from vdtrain.errors import ConfigError, output_problem, unreadable, unwritable
from vdtrain.files import LockedError, atomic_write, locked, open_regular
from vdtrain.redaction import without_secrets
from vdtrain.storage.patience import Patience, StreamError, warn
from vdtrain.storage.stores import TIMEOUT_SECONDS, Stores, leading_away

__all__ = ["OpenFiles", "ShardCache", "ShardReader", "StreamError"]

FETCHES = 4
# Shards that a reader keeps open for all of its threads; a process may usually open 1,024 files.
OPEN_FILES = 512
MADE_ANEW = "made anew since the index"
INDEX_AGAIN = f"index the shards again: {INDEX}"
# Size of a thread's read buffer; most images have a tenth of it.
READ_BYTES = 1_000_000
# For so long a cache that failed is left alone.
CACHE_PAUSE_SECONDS = 60.0
# A whole shard is read in pieces; each piece of a remote one has the time limit of a read.
PIECE = 8_000_000
# Places of a tar header's fields. Longer names than NAME_BYTES have another header.
NAME_BYTES, SIZE_FIELD = 100, slice(124, 136)

Found = TypeVar("Found")
Bytes = bytes | memoryview


class OpenFiles:
    """At most `limit` files that stay open for several threads. The least recently used closes, but none in use."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        # By path, the least recently used first: descriptor and number of present users.
        self._files: dict[str, list[int]] = {}

    @contextmanager
    def borrow(self, path: str) -> Iterator[int]:
        """A descriptor of the file, which stays open for the block; an OSError if it cannot be opened."""
        file = self._take(path)
        if file is None:
            # Outside the lock: opening takes long on a network file system, and other threads go on reading.
            file = self._take(path, open_regular(path))
            assert file is not None
        try:
            yield file[0]
        finally:
            with self._lock:
                file[1] -= 1
                if file[1] == 0 and self._files.get(path) is not file:
                    os.close(file[0])

    def drop(self, path: str) -> None:
        """Open a file anew for its next user: a server that comes back knows no old descriptors."""
        with self._lock:
            file = self._files.pop(path, None)
            if file is not None and file[1] == 0:
                os.close(file[0])

    def close(self) -> None:
        """Close every file that is not in use."""
        with self._lock:
            self._close_idle(len(self._files))

    def _take(self, path: str, opened: int | None = None) -> list[int] | None:
        """Count one more user of a file; None if it is neither open nor given as `opened`."""
        with self._lock:
            file = self._files.pop(path, None)
            if file is None and opened is not None:
                file = [opened, 0]
            elif opened is not None:
                os.close(opened)  # another thread was faster
            if file is not None:
                self._files[path] = file
                file[1] += 1
                if len(self._files) > self.limit:
                    self._close_idle(len(self._files) - self.limit)
            return file

    def _close_idle(self, count: int) -> None:
        """Close at most `count` files without users, the least recently used first."""
        idle = [name for name, (_, users) in self._files.items() if users == 0]
        for name in idle[:count]:
            os.close(self._files.pop(name)[0])


class ShardReader:
    """Reads parts of a manifest's shards; any number of threads may use it.

    Args:
        cache: holds whole copies of remote shards; None reads them only by ranges.
        timeout: seconds for one read of a remote shard.
        patience: with reads that fail.
        follow: kinds of addresses that the manifest's own paths may be (`vdtrain.storage.stores`).

    Raises:
        ManifestError: the manifest leads to what must not be read, this machine cannot read a shard's kind of address,
            or the cache cannot hold one shard.
    """

    def __init__(
        self,
        manifest: Manifest,
        cache: ShardCache | None = None,
        *,
        timeout: float = TIMEOUT_SECONDS,
        patience: Patience | None = None,
        follow: Sequence[str] = (),
    ) -> None:
        if (problem := leading_away(manifest.paths, manifest.root, follow)) is not None:
            raise ManifestError(f"data.manifest={manifest.folder}: {SHARDS_FILE} names {problem}")
        self.manifest, self._cache = manifest, cache
        self.patience = Patience() if patience is None else patience
        self._stores = Stores(timeout, self.patience)
        self._remote = ["://" in shard for shard in manifest.shards]
        # Size and time of each local shard that are known to go with the manifest's checksum.
        self._stamps = list(zip(manifest.bytes.tolist(), manifest.modified.tolist(), strict=True))
        # Remote shards whose size was compared, and shards whose checksum was.
        self._sized, self._proven = set[int](), set[int]()
        # Reentrant, as a proof reads, and a read compares.
        self._proving: defaultdict[int, Any] = defaultdict(threading.RLock)
        self._warned = False
        # When the cache is used again after a failure; 0 if it never failed.
        self._cache_from = 0.0
        self._local = threading.local()
        self._open = OpenFiles(OPEN_FILES)
        self._fetching: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._fetchers: ThreadPoolExecutor | None = None
        if any(self._remote):
            if cache is not None:
                self._fetchers = ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch")
            self._stores.system(manifest.shards[self._remote.index(True)])
            if cache is not None and manifest.bytes.max() > cache.limit_bytes:
                raise ManifestError(
                    f"data.stream.cache.gigabytes={cache.limit_bytes / 1e9:g}: a shard has "
                    f"{manifest.bytes.max() / 1e9:.2f}; give the cache room for a few hundred shards"
                )

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        shard_root: str | None = None,
        follow: Sequence[str] = (),
        cache: Mapping[str, Any] | None = None,
        timeout: float = TIMEOUT_SECONDS,
        patience: Patience | None = None,
    ) -> ShardReader:
        """The reader of a manifest with the settings of `data.stream`.

        Raises:
            ManifestError: the manifest or a setting cannot be used.
            StreamError: the manifest cannot be read, and `patience` is over.
        """
        patience = Patience() if patience is None else patience
        manifest = patience.keep(str(folder), lambda: Manifest(folder, shard_root))
        return cls(manifest, ShardCache.of(cache), timeout=timeout, patience=patience, follow=follow)

    def rows(self, shard: int) -> ShardRows:
        """The samples of a shard, by its manifest; a ManifestError or StreamError if they cannot be read."""
        return self.patience.keep(str(self.manifest.folder), lambda: self.manifest.rows(shard))

    def use(self, shard: int, rows: ShardRows, row: int, action: Callable[[Bytes], Found]) -> Found:
        """An action on the bytes of an image. A remote image that cannot be decoded is read once more.

        Raises:
            DecodeError: by the action.
            StreamError: as `image`.
        """
        try:
            return action(self.image(shard, rows, row))
        except DecodeError:
            if not self._remote[shard]:
                raise
        return action(self.image(shard, rows, row))

    def image(self, shard: int, rows: ShardRows, row: int) -> Bytes:
        """The bytes of an image, possibly in memory that this thread's next read overwrites.

        Raises:
            StreamError: the shard cannot be read, or was made anew since the index.
        """
        size = rows.size.item(row)
        right = partial(_is_header_of, rows.keys[row].as_py(), size)
        place = rows.offset.item(row) - TAR_BLOCK, TAR_BLOCK + size
        data = self.read(shard, *place, right)
        if shard not in self._proven and not right(data):
            # Some programs write names in another way, so that the header alone proves nothing.
            self._prove(shard)
            data = self.read(shard, *place)
        return memoryview(data)[TAR_BLOCK:]

    def read(self, shard: int, offset: int, size: int, right: Callable[[Bytes], bool] = lambda data: True) -> Bytes:
        """`size` bytes of a shard, possibly in memory that this thread's next read overwrites.

        Args:
            right: whether they may be the right ones; wrong ones of a network are read once more.

        Raises:
            StreamError: the shard cannot be read, or was made anew since the index.
        """
        if not self._remote[shard]:
            return self.patience.keep(self.manifest.shards[shard], lambda: self._pread(shard, offset, size))
        if self._cache is not None:
            try:
                copy = self._cache.find(self.manifest.hashes[shard])
                if copy is not None:
                    data = self._pread_copy(copy, offset, size)
                    if len(data) == size and (shard in self._proven or right(data)):
                        return data
                    copy.unlink()  # the disk has changed it
            except FileNotFoundError:
                pass  # the cache dropped it just now
            except OSError as error:
                self._do_without(self._cache, unreadable(error, self._cache.folder, "give another folder"))
            self._fetch(shard)
        return self._range(shard, offset, size, right)

    def look(self, shard: int) -> bool:
        """Whether a shard looks as indexed, by the time of a local one and by the first header of a remote one.

        Raises:
            StreamError: it cannot be read, or has another size.
        """
        rows = self.manifest.rows(shard)
        start, right = rows.offset.item(0) - TAR_BLOCK, partial(_is_header_of, rows.keys[0].as_py(), rows.size.item(0))
        if self._remote[shard]:
            return right(self._range(shard, start, TAR_BLOCK, right))
        path = Path(self.manifest.shards[shard])
        try:
            with open(path, "rb", opener=open_regular) as file:
                status, header = os.fstat(file.fileno()), os.pread(file.fileno(), TAR_BLOCK, start)
        except OSError as error:
            raise StreamError(f"{path}: {self._unreadable(error, path)}") from error
        if status.st_size != self.manifest.bytes[shard]:
            raise self._made_anew(shard, status.st_size)
        if not right(header):
            self._prove(shard)
        return status.st_mtime_ns == self.manifest.modified.item(shard)

    def close(self) -> None:
        """Close the files; nothing is read afterwards."""
        self.patience.close()
        if self._fetchers is not None:
            self._fetchers.shutdown(wait=True, cancel_futures=True)
        self._open.close()

    def _pread(self, shard: int, offset: int, size: int) -> memoryview:
        path = self.manifest.shards[shard]
        try:
            with self._open.borrow(path) as descriptor:
                data = self._memory(size)
                found = read_into(descriptor, data, offset)
                # After the read, so that no change can come between the two.
                status = os.fstat(descriptor)
                if (status.st_size, status.st_mtime_ns) != self._stamps[shard]:
                    self._compare(shard, descriptor, status)
        except OSError as error:
            self._open.drop(path)
            raise StreamError(f"{path}: {self._unreadable(error, Path(path))}") from error
        if found < size:
            raise StreamError(f"{path}: shorter than in its manifest; {INDEX_AGAIN}")
        return data

    def _pread_copy(self, copy: Path, offset: int, size: int) -> memoryview:
        data = self._memory(size)
        try:
            with self._open.borrow(str(copy)) as descriptor:
                return data[: read_into(descriptor, data, offset)]
        except OSError:
            self._open.drop(str(copy))
            raise

    def _do_without(self, cache: ShardCache, problem: str) -> None:
        """Leave the cache alone for a while: it saves time, and the shards themselves can be read."""
        warned, self._cache_from = self._cache_from > 0, time.monotonic() + CACHE_PAUSE_SECONDS
        if not warned:
            warn(f"data.stream.cache.folder={cache.folder}: {problem}; meanwhile samples are read by ranges")

    def _memory(self, size: int) -> memoryview:
        kept: dict[str, memoryview] = self._local.__dict__
        if len(kept.get("memory", b"")) < size:
            kept["memory"] = memoryview(bytearray(max(size, READ_BYTES)))
        return kept["memory"][:size]

    def _compare(self, shard: int, descriptor: int, status: os.stat_result) -> None:
        """Raise a StreamError if an open local shard with another size or time is not the manifest's."""
        stamp = status.st_size, status.st_mtime_ns
        if status.st_size != self.manifest.bytes[shard]:
            raise self._made_anew(shard, status.st_size)
        with self._proving[shard]:
            if stamp == self._stamps[shard]:
                return

            def piece(offset: int, size: int) -> memoryview:
                data = memoryview(bytearray(size))
                return data[: read_into(descriptor, data, offset)]

            found = self._sha256(shard, piece)
            if found != self.manifest.hashes[shard]:
                raise self._made_anew(shard)
            self._stamps[shard] = stamp
        with self._lock:
            warned, self._warned = self._warned, True
        if not warned:
            warn(
                f"data.manifest={self.manifest.folder}: shards have other times than in the index; each is read whole "
                f"and compared by its checksum once. To spare that, {INDEX_AGAIN}"
            )

    def _prove(self, shard: int) -> None:
        """Raise a StreamError if the checksum of a shard is not the manifest's."""
        with self._proving[shard]:
            if shard in self._proven:
                return
            if self._sha256(shard, partial(self.read, shard)) != self.manifest.hashes[shard]:
                raise self._made_anew(shard)
            self._proven.add(shard)

    def _sha256(self, shard: int, read: Callable[[int, int], Bytes]) -> str:
        """The checksum of a shard, from its bytes by offset and size."""
        digest = hashlib.sha256()
        for offset, size in _pieces(self.manifest.bytes.item(shard)):
            digest.update(read(offset, size))
        return digest.hexdigest()

    def _made_anew(self, shard: int, size: int | None = None) -> StreamError:
        sizes = "" if size is None else f" ({size:,} bytes, {self.manifest.bytes[shard]:,} in the index)"
        return StreamError(f"{self._name(shard)}: {MADE_ANEW}{sizes}; {INDEX_AGAIN}")

    def _name(self, shard: int) -> str:
        return without_secrets(self.manifest.shards[shard])

    def _unreadable(self, error: OSError, path: Path) -> str:
        """Cause and remedy. Indexing helps only if the shard is missing from an existing folder."""
        if isinstance(error, FileNotFoundError) and path.parent.is_dir() and not path.is_symlink():
            return f"is not there; bring it back, or {INDEX_AGAIN}"
        return unreadable(error, path, "see that it can be read")

    def _range(self, shard: int, offset: int, size: int, right: Callable[[Bytes], bool] = lambda data: True) -> bytes:
        address = self.manifest.shards[shard]
        data = self._stores.read(address, offset, size, lambda data: shard in self._proven or right(data))
        if shard not in self._sized:
            found = self._stores.size(address)
            if found not in (None, self.manifest.bytes[shard]):
                raise self._made_anew(shard, found)
            self._sized.add(shard)
        if len(data) != size:
            raise StreamError(
                f"{self._name(shard)}: {len(data):,} bytes instead of {size:,}; use a server that serves ranges, or, "
                f"if the shard has changed, {INDEX_AGAIN}"
            )
        return data

    def _fetch(self, shard: int) -> None:
        """Start copying a shard into the cache unless a copy is running; until then its samples are read by ranges."""
        assert self._cache is not None
        assert self._fetchers is not None
        if time.monotonic() < self._cache_from:
            return
        with self._lock:
            before = self._fetching.get(shard)
            if before is not None:
                if not before.done():
                    return
                # An error of the whole copy also concerns the ranges.
                if before.exception() is not None:
                    raise before.exception()
            self._fetching[shard] = self._fetchers.submit(self._copy, self._cache, shard)

    def _copy(self, cache: ShardCache, shard: int) -> None:
        pieces = (self._range(shard, *piece) for piece in _pieces(self.manifest.bytes.item(shard)))
        try:
            cache.fetch(self._name(shard), self.manifest.hashes[shard], pieces)
        except OSError as error:
            self._do_without(cache, unwritable(error, cache.folder))


class ShardCache:
    """Whole copies of remote shards in a local folder that all processes of a machine share.

    Args:
        folder: on a local disk.
        gigabytes: largest total size, in 10^9 bytes; the oldest copies are dropped first.
    """

    def __init__(self, folder: str, gigabytes: float) -> None:
        self.folder, self.limit_bytes = Path(folder), int(gigabytes * 1e9)

    @classmethod
    def of(cls, settings: Mapping[str, Any] | None) -> ShardCache | None:
        """The cache that `data.stream.cache` describes.

        Raises:
            ManifestError: the setting is not {folder, gigabytes}, or the folder cannot be made.
        """
        if settings is None:
            return None
        if set(settings) != {"folder", "gigabytes"}:
            raise ManifestError(f"data.stream.cache={dict(settings)}: give {{folder: ..., gigabytes: ...}}")
        try:
            cache = cls(str(settings["folder"]), float(settings["gigabytes"]))
            cache.folder.mkdir(parents=True, exist_ok=True)
        except ValueError as error:
            raise ManifestError(f"data.stream.cache={dict(settings)}: {error}; give gigabytes as a number") from error
        except OSError as error:
            raise ManifestError(
                f"data.stream.cache.folder={cache.folder}: {unwritable(error, cache.folder)}"
            ) from error
        if problem := output_problem(cache.folder):
            raise ManifestError(f"data.stream.cache.folder={cache.folder}: {problem}")
        return cache

    def find(self, sha256: str) -> Path | None:
        """The whole copy of a shard, or None."""
        path = self._path(sha256)
        return path if path.exists() else None

    def fetch(self, name: str, sha256: str, pieces: Iterable[bytes]) -> None:
        """Keep a shard that comes in pieces, unless another process is doing so.

        Raises:
            StreamError: its checksum is another.
            OSError: it cannot be written.
        """
        path, digest = self._path(sha256), hashlib.sha256()
        # Without locks two processes could write one draft: such a file system keeps no copies.
        with suppress(LockedError, ConfigError), locked(path.with_suffix(".lock")):
            if path.exists():
                return
            with atomic_write(path) as draft:
                with draft.open("wb") as file:
                    for piece in pieces:
                        digest.update(piece)
                        file.write(piece)
                if digest.hexdigest() != sha256:
                    raise StreamError(f"{name}: {MADE_ANEW}; {INDEX_AGAIN}")
            self._drop_oldest(keep=path)

    def _path(self, sha256: str) -> Path:
        return self.folder / f"{sha256[:32]}.tar"

    def _drop_oldest(self, keep: Path) -> None:
        with locked(self.folder / "drop.lock", wait_seconds=None):
            found = []
            for path in self.folder.glob("*.tar"):
                with suppress(FileNotFoundError):  # a reader has removed a damaged copy
                    status = path.stat()
                    found.append((status.st_mtime_ns, status.st_size, path))
            used = sum(size for _, size, _ in found)
            for _, size, path in sorted(found):
                if used <= self.limit_bytes:
                    break
                if path != keep:
                    used -= size
                    for each in (path, path.with_suffix(".lock")):
                        each.unlink(missing_ok=True)


def read_into(descriptor: int, memory: memoryview, offset: int) -> int:
    """Fill memory from a file's place on; the number of bytes read is smaller only at the file's end.

    Raises:
        OSError: it cannot be read. A single call of the system may stop before the damage and say nothing.
    """
    done = 0
    while done < len(memory):
        found = os.preadv(descriptor, [memory[done:]], offset + done)
        if found == 0:
            break
        done += found
    return done


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    """Offset and size of the pieces of a file."""
    return ((offset, min(PIECE, size - offset)) for offset in range(0, size, PIECE))


def _is_header_of(key: str, size: int, data: Bytes) -> bool:
    """Whether data begin with the tar header of a file of `size` bytes whose name begins with the key.

    Folders before the name are ignored, and names that may stand in an extended header.
    """
    header = bytes(data[:TAR_BLOCK])
    try:
        if int(header[SIZE_FIELD].strip(b" \0"), 8) != size:
            return False
    except ValueError:
        return False
    name, key = header[:NAME_BYTES].split(b"\0", 1)[0], key.rpartition("/")[2]
    return len(name) == NAME_BYTES or not key.isascii() or name.rpartition(b"/")[2].startswith(key.encode())
