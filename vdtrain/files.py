"""Files and folders that are there as a whole or not at all, and the records that tell whether they still are."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from vdtrain.errors import ConfigError, output_problem, system_error, unlockable, unreadable, unwritable

INCOMPLETE = ".incomplete"
REPLACED = ".replaced"
# A file that is not there is damage. After any other error, the file may be whole.
ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
RECORD_BYTES = 1 << 28


class LockedError(RuntimeError):
    """Another process holds a lock.

    Attributes:
        holder: "PID on HOST", or "unknown".
    """

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(f"{path} is held by process {holder}")
        self.holder = holder


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 of a file."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        with path.open("rb") as file:
            return cls(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def damage(
    folder: Path, files: Mapping[str, FileRecord], names: Iterable[str] | None = None, hashed: bool = True
) -> str | None:
    """Compare files with their records: None if all, or the named ones, are whole; else a line about a damaged one.

    Args:
        hashed: False compares sizes alone, and reads nothing.

    Raises:
        OSError: a file cannot be read, though it may be whole.
    """
    for name in files if names is None else names:
        path, expected = folder / name, files[name]
        try:
            size = path.stat().st_size
            if size != expected.bytes:
                return f"{path}: {size} bytes instead of {expected.bytes}, the file is truncated or foreign"
            if hashed and FileRecord.of(path) != expected:
                return f"{path}: its checksum does not match, the file is damaged"
        except OSError as error:
            # A link may lead to a disk that is not mounted.
            if error.errno not in ABSENT or path.is_symlink():
                # An error of reading does not name its file.
                error.filename = error.filename or str(path)
                raise
            return f"{path}: {unreadable(error, path, '')}".removesuffix("; ")
    return None


class IrregularError(OSError):
    """A pipe, a socket or a device stands where a file is expected."""


def open_regular(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a regular file to read; also an `opener` of `open`. It never waits for a pipe's writer.

    Raises:
        OSError: it is missing, a folder, or cannot be read; an IrregularError: it is a pipe or a device.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise IrregularError("not a regular file")


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A regular file to read.

    Raises:
        OSError: it is missing, a folder, or cannot be read.
        ValueError: it is a pipe or a device.
    """
    try:
        file = open(path, "rb", opener=open_regular)  # noqa: SIM115
    except IrregularError as error:
        raise ValueError(f"{path}: {error}") from error
    with file:
        yield file


def read_record(path: Path) -> bytes:
    """The content of a small file of records.

    Raises:
        OSError, ValueError: see `opened`; or it is too large for a record.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > RECORD_BYTES:
            raise ValueError(f"{path}: {size:,} bytes are too many")
        return file.read()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A draft beside `path` for the block to write a file or folder under; it replaces `path` once it is on the disk.

    If the block fails, nothing of the draft is left, and what stood at `path` before stays. Several processes may write
    to the same path: each has a draft of its own, and the last one to finish wins.

    Raises:
        OSError: it cannot be written.
    """
    draft = draft_of(path, os.getpid())
    _remove_abandoned(path)
    try:
        yield draft
        for each in [*draft.rglob("*"), draft]:
            _let_read(each)
            sync(each)
        _replace(path, draft)
        sync(path.parent)
    finally:
        _remove(draft)


def draft_of(path: Path, process: int) -> Path:
    """A name beside `path` that no other writer uses: it tells machine and process."""
    return path.with_name(f"{path.name}.{_machine()}-{process}-{secrets.token_hex(4)}{INCOMPLETE}")


def _remove_abandoned(path: Path) -> None:
    """Remove drafts of processes of this machine that are gone."""
    for draft in path.parent.glob(f"{glob.escape(path.name)}.{_machine()}-*{INCOMPLETE}"):
        process = draft.name.split("-")[-2]
        if not Path("/proc", process).exists():
            _remove(draft)


@cache
def _machine() -> str:
    """A hash of host and process namespace. Containers of one host can share its name, not its process numbers."""
    numbers = ""
    with suppress(OSError):
        numbers = os.readlink("/proc/self/ns/pid")
    return hashlib.blake2b(f"{socket.gethostname()} {numbers}".encode(), digest_size=4).hexdigest()


def _replace(path: Path, draft: Path) -> None:
    """Put a draft in the place of `path`; a folder is moved away first and comes back if that fails."""
    if not path.is_dir():
        draft.replace(path)
        return
    replaced = path.with_name(path.name + REPLACED)
    path.rename(replaced)
    try:
        draft.replace(path)
    finally:
        _settle(path, replaced)


@contextmanager
def written_whole(
    path: Path, place: str, overwrite: bool = False, ours: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """`atomic_write` of what a setting names.

    Args:
        place: the setting and its value, for errors.
        overwrite: replace what stands at `path`.
        ours: see `refuse_existing`.

    Raises:
        ConfigError: `path` exists and may not be replaced, or cannot be written.
    """
    refuse_existing(path, place, overwrite, ours=ours)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as draft:
            yield draft
    except Exception as error:
        found = system_error(error)
        if found is None:
            raise
        raise ConfigError(f"{place}: {_said(found, path)}") from error


def refuse_existing(
    path: Path, place: str, overwrite: bool, setting: str = "overwrite", ours: Callable[[Path], bool] | None = None
) -> None:
    """Raise a ConfigError if there is something at `path` that may not be replaced, or nothing can be written there.

    A folder that an interrupted replacement moved away comes back first.

    Args:
        setting: that lets it be replaced.
        ours: for a result that is a folder, whether a folder is an earlier result; None for a result that is a file.
            Nothing lets another folder be replaced: it may hold a run, or the user's images.
    """
    check_output(path.parent, place)
    replaced = path.with_name(path.name + REPLACED)
    # Names that no file can have.
    for each in (path, draft_of(path, os.getpid()), replaced):
        try:
            each.exists()
        except OSError as error:
            raise ConfigError(f"{place}: {unwritable(error, each)}") from error
    _settle(path, replaced)
    refuse_folder(path, place, ours)
    if path.exists() and not overwrite:
        raise ConfigError(f"{place}: {path} exists already; {setting}=true replaces it")


def refuse_folder(path: Path, place: str, ours: Callable[[Path], bool] | None = None) -> None:
    """Raise a ConfigError if `path` is a folder that no result may replace; see `refuse_existing`."""
    if not path.is_dir():
        return
    if ours is None:
        error = IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise ConfigError(f"{place}: {unwritable(error, path)}")
    if not ours(path) and any(path.iterdir()):
        raise ConfigError(f"{place}: {path} holds other files, which are not replaced; give another folder")


def check_output(folder: Path, place: str) -> None:
    """Refuse a folder that nothing can be written into, before the work whose results would go there.

    Args:
        folder: which need not be there yet.
        place: the setting and its value, for the error.

    Raises:
        ConfigError: it cannot be made or written.
    """
    if problem := output_problem(folder):
        raise ConfigError(f"{place}: {problem}")


def write_text(path: Path, text: str) -> None:
    """Write a text file and see it onto the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """The content of a JSON file, of any shape.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a regular file, not UTF-8, not JSON, or nested too deeply.
    """
    try:
        return json.loads(read_record(path).decode("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


# What a document of another shape raises when its parts are looked up and made.
SHAPE_ERRORS = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError)


def append_line(path: Path, line: str, durable: bool = False) -> None:
    """Append a line to a text file; a last line that a kill cut short is ended first.

    Args:
        durable: see it onto the disk.

    Raises:
        OSError: it cannot be written; nothing of it is left in the file.
    """
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab+") as file:
            torn = False
            if size:
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
            file.write(b"\n" * torn + line.encode() + b"\n")
            file.flush()
            if durable:
                os.fsync(file.fileno())
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise


@contextmanager
def locked(path: Path, wait_seconds: float | None = 0.0) -> Iterator[int]:
    """Hold a lock file (flock) for the block; the file stays.

    The lock is shared once it is held: processes that the holder starts take it too (LOCK_SH), or inherit its
    descriptor. Nobody else gets it before the last of them has ended.

    Args:
        wait_seconds: how long to wait for such processes if their parent is gone; None waits for any holder to finish.

    Returns:
        The descriptor that holds the lock.

    Raises:
        LockedError: another process holds it.
        ConfigError: the file system cannot lock it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        _lock(file, path, wait_seconds)
        with suppress(OSError):  # the holder's name is only for messages
            os.truncate(file.fileno(), 0)
            os.write(file.fileno(), f"{os.getpid()} on {socket.gethostname()}".encode())
        yield file.fileno()


def _lock(file: IO[bytes], path: Path, wait_seconds: float | None) -> None:
    deadline = time.monotonic() + (wait_seconds or 0.0)
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait_seconds is None else fcntl.LOCK_NB))
                break
            except BlockingIOError as error:
                file.seek(0)
                holder = file.read().decode(errors="replace").strip()
                if _lives(holder) or time.monotonic() >= deadline:
                    raise LockedError(path, holder or "unknown") from error
            time.sleep(0.1)
        fcntl.flock(file, fcntl.LOCK_SH)
    except OSError as error:
        raise ConfigError(f"{path}: {unlockable(error, path)}") from error


def _lives(holder: str) -> bool:
    """Whether the process that a lock names is alive, as far as this machine can tell."""
    process, _, host = holder.partition(" on ")
    return bool(host) and (host != socket.gethostname() or Path("/proc", process).exists())


def sync(path: Path) -> None:
    """See a file, or a folder's list of names, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _let_read(path: Path) -> None:
    """Give a file the mode that the umask allows: safetensors makes files that their owner alone may read."""
    mode = path.lstat().st_mode
    allowed = mode | (0o666 & ~_umask())
    if stat.S_ISREG(mode) and allowed != mode:
        path.chmod(stat.S_IMODE(allowed))


def _umask() -> int:
    # Not os.umask, which would change it for a moment.
    status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    return int(next((line.split()[1] for line in status.splitlines() if line.startswith("Umask:")), "022"), 8)


def _said(error: OSError, path: Path) -> str:
    """Which of its files a writer failed with: it may also have read one."""
    named = Path(str(error.filename)) if isinstance(error.filename, str | os.PathLike) else path
    if named.absolute().is_relative_to(path.absolute().parent):
        return unwritable(error, path)
    return f"{named}: {unreadable(error, named)}"


def _settle(path: Path, replaced: Path) -> None:
    """Move a replaced folder back if nothing took its place, else remove it."""
    if replaced.exists() and not path.exists():
        replaced.rename(path)
    _remove(replaced)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
