"""Bytes from tar shards in local folders, on web servers and in object stores.

A local shard is read at the offset in the manifest. fsspec reads byte ranges of a remote shard. With a cache, the whole
shard is also fetched in the background, for its later samples.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, overload

import fsspec

from vdtrain.data.manifest import INDEX, Manifest, ManifestError
from vdtrain.errors import ConfigError, one_line, output_problem, unreadable, unwritable
from vdtrain.files import LockedError, atomic_write, locked

ATTEMPTS = 5
FIRST_WAIT_SECONDS = 0.5
FETCHES = 4
# Shards that a reader keeps open for all of its threads; a process may usually open 1,024 files.
OPEN_FILES = 512
INDEX_AGAIN = f"index the shards again: {INDEX}"
# Errors of this machine, which no network causes.
OF_THIS_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EMFILE, errno.ENFILE}
# Size of a thread's read buffer; most images have a tenth of it.
READ_BYTES = 1_000_000

Found = TypeVar("Found")


class StreamError(RuntimeError):
    """The data cannot be trained on. The message is one line."""


class OpenFiles:
    """Files that stay open to be read by several threads; the least recently used one closes.

    Args:
        limit: number of files that stay open. A file in use is never closed.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        # By path, the least recently used first: descriptor and number of present users.
        self._files: dict[str, list[int]] = {}

    @contextmanager
    def borrow(self, path: str) -> Iterator[int]:
        """A descriptor of the file, which stays open for the block.

        Raises:
            OSError: the file cannot be opened.
        """
        file = self._take(path)
        if file is None:
            # Outside the lock: opening takes long on a network file system, and other threads go on reading.
            file = self._take(path, os.open(path, os.O_RDONLY))
        try:
            yield file[0]
        finally:
            with self._lock:
                file[1] -= 1

    def close(self) -> None:
        """Close every file that is not in use."""
        with self._lock:
            self._close_idle(len(self._files))

    @overload
    def _take(self, path: str) -> list[int] | None: ...

    @overload
    def _take(self, path: str, opened: int) -> list[int]: ...

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

    Raises:
        ManifestError: this machine cannot read a shard's kind of address, or the cache cannot hold one shard.
    """

    def __init__(self, manifest: Manifest, cache: ShardCache | None = None) -> None:
        self._manifest, self._cache = manifest, cache
        self._remote = ["://" in shard for shard in manifest.shards]
        self._systems: dict[int, tuple[Any, str]] = {}
        self._local = threading.local()
        self._open = OpenFiles(OPEN_FILES)
        self._fetching: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._fetchers: ThreadPoolExecutor | None = None
        if any(self._remote):
            if cache is not None:
                self._fetchers = ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch")
            self._system(self._remote.index(True))
            if cache is not None and manifest.bytes.max() > cache.limit_bytes:
                raise ManifestError(
                    f"data.stream.cache.gigabytes={cache.limit_bytes / 1e9:g}: a shard has "
                    f"{manifest.bytes.max() / 1e9:.2f}; give the cache room for a few hundred shards"
                )

    def read(self, shard: int, offset: int, size: int) -> bytes | memoryview:
        """`size` bytes of a shard, possibly in memory that this thread's next read overwrites.

        Raises:
            StreamError: the shard cannot be read, or is too short.
        """
        if not self._remote[shard]:
            return self._pread(shard, self._manifest.shards[shard], offset, size)
        if self._cache is not None:
            path = self._cache.find(self._manifest.shards[shard], int(self._manifest.bytes[shard]))
            if path is not None:
                with suppress(FileNotFoundError):  # the cache dropped it just now
                    return self._pread(shard, str(path), offset, size)
            self._fetch(shard)
        return self._range(shard, offset, size)

    def close(self) -> None:
        """Close the files; nothing is read afterwards."""
        if self._fetchers is not None:
            self._fetchers.shutdown(wait=True, cancel_futures=True)
        self._open.close()

    def _pread(self, shard: int, path: str, offset: int, size: int) -> memoryview:
        kept: dict[str, memoryview] = self._local.__dict__
        if len(kept.get("memory", b"")) < size:
            kept["memory"] = memoryview(bytearray(max(size, READ_BYTES)))
        data = kept["memory"][:size]
        try:
            with self._open.borrow(path) as descriptor:
                found = os.preadv(descriptor, [data], offset)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and self._remote[shard]:
                raise
            raise StreamError(f"{path}: {self._unreadable(error, Path(path))}") from error
        if found < size:
            if self._remote[shard]:
                raise StreamError(f"{path}: shorter than its shard; remove this copy to fetch it again")
            raise StreamError(f"{path}: shorter than in its manifest; {INDEX_AGAIN}")
        return data

    def _unreadable(self, error: OSError, path: Path) -> str:
        """Cause and remedy. Indexing helps only if the shard is missing from an existing folder."""
        if isinstance(error, FileNotFoundError) and path.parent.is_dir() and not path.is_symlink():
            return f"is not there; bring it back, or {INDEX_AGAIN}"
        return unreadable(error, path, "see that it can be read")

    def _system(self, shard: int) -> tuple[Any, str]:
        with self._lock:
            if shard not in self._systems:
                address = self._manifest.shards[shard]
                try:
                    self._systems[shard] = fsspec.core.url_to_fs(address)
                except (ImportError, ValueError) as error:
                    kind = address.split("://")[0]
                    raise ManifestError(
                        f"{address}: cannot be read here ({error}); install fsspec's package for {kind}://"
                    ) from error
            return self._systems[shard]

    def _range(self, shard: int, offset: int, size: int) -> bytes:
        address = self._manifest.shards[shard]
        system, path = self._system(shard)
        data: bytes = patiently(address, lambda: system.cat_file(path, start=offset, end=offset + size))
        if len(data) != size:
            raise StreamError(
                f"{address}: {len(data)} bytes instead of {size}; use a server that serves ranges, or, if the shard "
                f"has changed, {INDEX_AGAIN}"
            )
        return data

    def _fetch(self, shard: int) -> None:
        """Start copying a shard into the cache unless a copy is running; until then its samples are read by ranges."""
        assert self._cache is not None
        assert self._fetchers is not None
        system, path = self._system(shard)
        address, size = self._manifest.shards[shard], int(self._manifest.bytes[shard])
        with self._lock:
            before = self._fetching.get(shard)
            if before is not None:
                if not before.done():
                    return
                # An error of the whole copy also concerns the ranges.
                if before.exception() is not None:
                    raise before.exception()
            self._fetching[shard] = self._fetchers.submit(
                self._cache.fetch,
                address,
                size,
                self._manifest.hashes[shard],
                lambda draft: patiently(address, lambda: system.get_file(path, str(draft)), draft),
            )


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

    def find(self, address: str, size: int) -> Path | None:
        """The whole copy of a shard, or None."""
        path = self._path(address, size)
        return path if path.exists() else None

    def fetch(self, address: str, size: int, sha256: str, get: Callable[[Path], object]) -> None:
        """Make a copy with `get`, unless another process is making it.

        Raises:
            StreamError: the fetched shard differs from the manifest's.
        """
        path = self._path(address, size)
        # Without locks two processes could write one draft: such a file system keeps no copies.
        with suppress(LockedError, ConfigError), locked(path.with_suffix(".lock")):
            if path.exists():
                return
            with atomic_write(path) as draft:
                get(draft)
                with draft.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                        raise StreamError(f"{address}: not the shard that the manifest lists; {INDEX_AGAIN}")
            self._drop_oldest(keep=path)

    def _path(self, address: str, size: int) -> Path:
        return self.folder / f"{hashlib.blake2b(f'{address} {size}'.encode(), digest_size=16).hexdigest()}.tar"

    def _drop_oldest(self, keep: Path) -> None:
        with locked(self.folder / "drop.lock", wait_seconds=None):
            copies = sorted(self.folder.glob("*.tar"), key=lambda path: path.stat().st_mtime_ns)
            used = sum(path.stat().st_size for path in copies)
            for path in copies:
                if used <= self.limit_bytes:
                    break
                if path != keep:
                    used -= path.stat().st_size
                    path.unlink()


def patiently(address: str, action: Callable[[], Found], copy: Path | None = None) -> Found:
    """Run an action over a network; if it fails, repeat it after growing pauses.

    Args:
        copy: the local file that the action writes. An error of this machine's disk is not retried.

    Raises:
        StreamError: every attempt failed, or the address does not exist.
    """
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except FileNotFoundError as error:
            raise StreamError(
                f"{address}: is not there; check data.stream.shard_root, or put the shards there"
            ) from error
        except PermissionError as error:
            raise StreamError(f"{address}: access is refused; allow this machine on its server") from error
        except Exception as error:
            # Every file system of fsspec has its own exceptions.
            if isinstance(error, OSError) and error.errno in OF_THIS_MACHINE:
                place = Path("." if copy is None else copy)
                raise StreamError(f"{address}: its copy {place} {unwritable(error, place)}") from error
            if attempt == ATTEMPTS - 1:
                reason = one_line(error)
                raise StreamError(f"{address}: {reason}, {ATTEMPTS} times; check that it can be reached") from error
            time.sleep(FIRST_WAIT_SECONDS * 2**attempt)
    raise AssertionError("unreachable")
