"""Addresses of tars: their brace patterns and lists, and the bytes of each from its beginning to its end."""

from __future__ import annotations

import glob
import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from signal import SIGKILL
from subprocess import DEVNULL, Popen, TimeoutExpired
from subprocess import PIPE as PIPED
from typing import Any, BinaryIO, cast

import fsspec

from vdtrain.data.manifest import ManifestError
from vdtrain.errors import ConfigError, one_line, passes, unreadable
from vdtrain.files import open_regular
from vdtrain.redaction import without_secrets
from vdtrain.storage.patience import Patience, StreamError
from vdtrain.storage.stores import ask, lasts, system_of

PIPE, LISTS, WEB, LOCAL = "pipe:", (".txt", ".list"), ("http", "https"), ("file", "local")
# More addresses are a mistake in a pattern.
MOST_ADDRESSES = 10_000_000
RANGE = re.compile(r"\{(-?\d{1,18})\.\.(-?\d{1,18})\}")
LIST_BYTES = 1 << 30
LIST_SECONDS = 30.0
BUFFER = 4 << 20
# Exit statuses of a command whose output is not read to its end.
CLOSED_PIPE = (141, -13)


def expanded(urls: Sequence[str], allow_pipe: bool) -> list[str]:
    """The address of every tar.

    Args:
        urls: addresses, paths, folders, or lists of them (.txt), with patterns such as {00000..00999}.
        allow_pipe: whether an address may be a command, `pipe:COMMAND`.

    Raises:
        ConfigError: there is no address, or one of them cannot be used.
    """
    found = [address for url in urls for address in _expanded(url, allow_pipe)]
    if not found:
        raise ConfigError("data.urls: no tar; give addresses such as s3://bucket/{00000..00999}.tar")
    for address in {_protocol(address): address for address in found}.values():
        if _protocol(address) not in ("pipe", *LOCAL):
            _system(address)
    return found


def open_tar(address: str, timeout: float, patience: Patience) -> BinaryIO:
    """The bytes of a tar, to be read from the beginning.

    Args:
        timeout: seconds without an answer after which a server is asked again.
        patience: with reads that fail.

    Raises:
        OSError, StreamError: now or on a read; it cannot be read.
    """
    if address.startswith(PIPE):
        return cast(BinaryIO, Command(address.removeprefix(PIPE), timeout))
    kind = _Local if _protocol(address) in LOCAL else _Remote
    return cast(BinaryIO, io.BufferedReader(kind(address, timeout, patience), BUFFER))


class Command:
    """The output of a command, which may go on for `seconds` once it is no longer read."""

    def __init__(self, command: str, seconds: float) -> None:
        self._seconds = seconds
        # A group of its own, so that all of its programs can be ended.
        self._process: Any = Popen(
            command, bufsize=BUFFER, shell=True, stdin=DEVNULL, stdout=PIPED, start_new_session=True
        )

    def read(self, size: int) -> bytes:
        return bytes(self._process.stdout.read1(size))

    def close(self) -> None:
        """Read no more, and wait for the end of the command; an OSError if it has failed."""
        self._process.stdout.close()
        try:
            status = self._process.wait(self._seconds)
        except TimeoutExpired:
            self.kill()
            status = self._process.wait() and 0
        if status not in (0, *CLOSED_PIPE):
            raise OSError(f"the command ended with status {status}")

    def kill(self) -> None:
        """End the command; a read that waits for it ends too."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, SIGKILL)


class _Patient(io.RawIOBase):
    """A file at an address as a stream. A read that fails is repeated from its place."""

    def __init__(self, address: str, timeout: float, patience: Patience) -> None:
        self._address, self._patience = address, patience
        self._timeout = min(timeout, patience.seconds or timeout)
        self._place = 0

    def readable(self) -> bool:
        return True

    def readinto(self, memory: Any) -> int:
        count = self._patience.keep(self._address, lambda: self._try(memory))
        self._place += count
        return count

    def close(self) -> None:
        self._drop()
        super().close()

    def _try(self, memory: Any) -> int:
        """Read from the present place on; the number of bytes, 0 at the end."""
        raise NotImplementedError

    def _drop(self) -> None:
        """Close what is open, to be opened anew."""
        raise NotImplementedError


class _Local(_Patient):
    _file: int | None = None

    def _try(self, memory: Any) -> int:
        path = _path(self._address)
        try:
            if self._file is None:
                self._file = open_regular(path)
            return os.preadv(self._file, [memory], self._place)
        except OSError as error:
            self._drop()
            if not passes(error):
                raise
            raise StreamError(f"{path}: {unreadable(error, Path(path), 'see that it can be read')}") from error

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)


class _Remote(_Patient):
    def __init__(self, address: str, timeout: float, patience: Patience) -> None:
        super().__init__(address, timeout, patience)
        self._system, self._path = _system(address)
        self._file: Any = None
        self._size = 0

    def _try(self, memory: Any) -> int:
        size, name = len(memory), without_secrets(self._address)
        try:
            data = self._streamed(size) if _protocol(self._address) in WEB else self._piece(size)
        except FileNotFoundError as error:
            raise StreamError(f"{name}: is not there; check data.urls") from error
        except Exception as error:
            # Every file system of fsspec has its own exceptions.
            self._drop()
            reason = without_secrets(one_line(error))
            if isinstance(error, TimeoutError) and not str(error):
                reason = f"no answer within data.stream.timeout={self._timeout:g} seconds"
            lasting = isinstance(error, PermissionError) or lasts(error)
            raise StreamError(f"{name}: {reason}; check that it can be reached", passes=not lasting) from error
        memory[: len(data)] = data
        return len(data)

    def _piece(self, size: int) -> bytes:
        """The next bytes of a file in a store."""
        self._size = self._size or int(self._system.size(self._path))
        if self._place >= self._size:
            return b""
        end = min(self._place + size, self._size)
        return cast(bytes, ask(self._system, self._timeout, "cat_file", self._path, start=self._place, end=end))

    def _streamed(self, size: int) -> bytes:
        """The next bytes of a file on a web server, in one request for all of it: some servers know no ranges."""
        import aiohttp

        if self._file is None:
            # The request may last as long as the training on the file.
            limits = aiohttp.ClientTimeout(total=None, sock_connect=self._timeout, sock_read=self._timeout)
            asked = {"headers": {"Range": f"bytes={self._place}-"}} if self._place else {}
            self._file = self._system.open(self._path, "rb", block_size=0, size=1, timeout=limits, **asked)
            left = 0 if self._file.r.status == HTTPStatus.PARTIAL_CONTENT else self._place
            while left and (data := self._file.read(min(left, BUFFER))):
                left -= len(data)
        return cast(bytes, self._file.read(size))

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def _expanded(url: str, allow_pipe: bool, listed: str = "") -> Iterator[str]:
    """The addresses that one pattern, folder or list stands for; `listed` is the list that has the pattern."""
    from braceexpand import braceexpand

    setting = f"data.urls={without_secrets(url)}{f' (in {listed})' if listed else ''}"
    counts = [abs(int(last) - int(first)) + 1 for first, last in RANGE.findall(url)]
    if math.prod(counts) > MOST_ADDRESSES:
        raise ConfigError(f"{setting}: more than {MOST_ADDRESSES:,} addresses; check its {{...}}")
    try:
        patterns = [url] if url.startswith(PIPE) else url.split("::")
        addresses = (address.strip() for pattern in patterns for address in braceexpand(pattern))
        for address in addresses:
            yield from _each(address, setting, allow_pipe, listed)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{setting}: {one_line(error)}; write a pattern such as {{00000..00999}}") from error


def _each(address: str, setting: str, allow_pipe: bool, listed: str) -> Iterator[str]:
    if address.startswith(PIPE) and not allow_pipe:
        raise ConfigError(
            f"{setting}: a command is run only with data.stream.pipe=true; give an address such as s3:// or https://"
        )
    if address.startswith(PIPE):
        yield address
    elif not address or address == "-":
        raise ConfigError(f"{setting}: {address or 'empty'} is no address; give a path or an address")
    elif address.partition("?")[0].endswith(LISTS):
        if listed:
            raise ConfigError(f"{setting}: a list cannot name another list; name the tars")
        for line in _lines(address, setting):
            yield from _expanded(line, allow_pipe, listed=address)
    elif _protocol(address) not in LOCAL:
        yield address
    else:
        path = _path(address)
        pattern = os.path.join(glob.escape(path), "**/*.tar") if os.path.isdir(path) else path
        if pattern == path and (os.path.exists(path) or not glob.has_magic(path)):
            yield path
        else:
            found = sorted(glob.glob(pattern, recursive=True))
            if not found:
                raise ConfigError(f"{setting}: no tar is there; give the folder or the paths of tars")
            yield from found


def _lines(address: str, setting: str) -> list[str]:
    try:
        with open_tar(address, LIST_SECONDS, Patience()) as file:
            lines = (line.strip() for line in file.read(LIST_BYTES).decode().splitlines())
    except OSError as error:
        raise ConfigError(f"{setting}: {unreadable(error, Path(_path(address)))}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{setting}: not a list in UTF-8; write one address a line") from error
    except StreamError as error:
        raise ConfigError(f"{setting}: {error}") from error
    return [line for line in lines if line and not line.startswith("#")]


def _protocol(address: str) -> str:
    if address.startswith(PIPE):
        return "pipe"
    return str(fsspec.core.split_protocol(address)[0] or "file")


def _path(address: str) -> str:
    return str(os.path.expanduser(fsspec.core.split_protocol(address)[1]))


def _system(address: str) -> tuple[Any, str]:
    try:
        return system_of(address)
    except ManifestError as error:
        raise ConfigError(f"data.urls={error}") from error
