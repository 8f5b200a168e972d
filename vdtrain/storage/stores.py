"""Ranges of files in object stores and on web servers, through fsspec: each try has a time limit.

A stranger may have written a manifest. So its paths are followed only where the user's settings allow it.
"""

from __future__ import annotations

import asyncio
import errno
import math
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from email.utils import parsedate_to_datetime
from functools import cache
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import fsspec
from fsspec.asyn import sync
from fsspec.registry import known_implementations

from vdtrain.data.manifest import ManifestError
from vdtrain.errors import EXTRAS, install, one_line
from vdtrain.redaction import without_secrets
from vdtrain.storage.patience import Patience, StreamError

WEB = ("http://", "https://")
TIMEOUT_SECONDS = 30.0
# Longest pause that a server may ask for.
RETRY_AFTER_SECONDS = 60.0
# Codes of HTTP and S3 that a new session may end. s3fs gives the others as PermissionError.
REFUSED = {"401", "403", "InvalidToken", "TokenRefreshRequired"}
CREDENTIALS = re.compile("Credential|SSO|Token")
BEYOND_END = {"416", "InvalidRange"}
# Errors that the same request meets again; EINVAL is s3fs's number for most mistakes.
LASTING = {errno.EMFILE, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENAMETOOLONG, errno.EMSGSIZE}
# Codes of HTTP that mean a mistake and that may pass all the same, and those of a server that mean one.
LATER, NEVER = {408, 409, 423, 425, 429}, {501, 505}


class Stores:
    """Reads files by their addresses; any number of threads may use it.

    Args:
        timeout: seconds for one try, from the request to its last byte; at most those of `patience`.
        patience: with failing reads.

    Raises:
        ManifestError: `timeout` is not a positive number.
    """

    def __init__(self, timeout: float, patience: Patience) -> None:
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
            raise ManifestError(f"data.stream.timeout={timeout}: give the seconds of one read, above 0")
        self._patience, self._timeout = patience, min(timeout, patience.seconds or timeout)
        self._systems: dict[str, tuple[Any, str]] = {}
        self._lock = threading.Lock()

    def system(self, address: str) -> tuple[Any, str]:
        """`system_of` an address, which is kept until its session is renewed."""
        with self._lock:
            if address not in self._systems:
                self._systems[address] = system_of(address)
            return self._systems[address]

    def read(self, address: str, start: int, size: int, right: Callable[[bytes], bool] = lambda data: True) -> bytes:
        """Bytes from `start`. A failed try is repeated after growing pauses, a wrong answer once.

        Args:
            right: whether an answer of `size` bytes is right.

        Returns:
            `size` bytes that `right` accepts, or else the second wrong answer, of any size.

        Raises:
            StreamError: the file is not there, access is refused by a new session too, or every try failed.
        """
        for wrong in (False, True):
            data = self._patience.keep(address, lambda: self._answer(address, start, size))
            if wrong or (len(data) == size and right(data)):
                break
            self._patience.pause()
        return data

    def _answer(self, address: str, start: int, size: int) -> bytes:
        """What one try gives, a StreamError if it fails; a new session has another one."""
        name, renewed = without_secrets(address), False
        while True:
            system, path = self.system(address)
            try:
                found: bytes = ask(system, self._timeout, "cat_file", path, start=start, end=start + size)
                return found
            except StreamError:
                raise
            except FileNotFoundError as error:
                reason = without_secrets(one_line(error))
                reason = "" if reason in name or without_secrets(path) in reason else f" ({reason})"
                raise StreamError(
                    f"{name}: is not there{reason}; check data.stream.shard_root, or put the shards there"
                ) from error
            except Exception as error:
                # Every file system of fsspec has its own exceptions.
                if _code(error) in BEYOND_END:
                    return b""
                if not _refused(error):
                    raise StreamError(
                        f"{name}: {self._reason(error)}; check that it can be reached",
                        passes=not lasts(error),
                        wait=_retry_after(error),
                    ) from error
                if renewed:
                    raise StreamError(
                        f"{name}: access is refused ({self._reason(error)}), to a new session too; give this machine "
                        "credentials that its store accepts"
                    ) from error
                self._renew(system)
                renewed = True

    def size(self, address: str) -> int | None:
        """Bytes of a file, or None if its store does not tell."""
        try:
            system, path = self.system(address)
            found = ask(system, self._timeout, "info", path).get("size")
        except Exception:
            # Whatever is wrong here, the reads say it better; web servers may also refuse HEAD alone.
            return None
        return None if found is None else int(found)

    def _renew(self, system: Any) -> None:
        """Drop a file system and its session, so that the next read makes one with the credentials of that time."""
        with self._lock:
            if any(kept is system for kept, _ in self._systems.values()):
                type(system).clear_instance_cache()
                self._systems.clear()

    def _reason(self, error: BaseException) -> str:
        """The store's message, with its code if the message lacks it."""
        if isinstance(error, TimeoutError) and not str(error):
            setting = "" if self._timeout == self._patience.seconds else "data.stream.timeout="
            return f"no whole answer within {setting}{self._timeout:g} seconds"
        message, code = without_secrets(one_line(error)), _code(error)
        return message if code in message else f"{code}: {message}"


def ask(system: Any, timeout: float, method: str, path: str, **arguments: Any) -> Any:
    """What a method of a file system gives within `timeout` seconds."""
    if system.async_impl:
        # At the limit the request is cancelled.
        return sync(system.loop, getattr(system, f"_{method}"), path, timeout=timeout, **arguments)
    answer: Future[Any] = Future()

    def call() -> None:
        try:
            answer.set_result(getattr(system, method)(path, **arguments))
        except BaseException as error:
            answer.set_exception(error)

    # Nothing can end a thread: after the limit it waits on, and as a daemon it does not keep the process.
    threading.Thread(target=call, name="store", daemon=True).start()
    return answer.result(timeout)


def system_of(address: str) -> tuple[Any, str]:
    """The file system of an address, and the file's path in it.

    Raises:
        ManifestError: the package for this kind of address is missing.
    """
    own = {"client_kwargs": _client_settings()} if address.startswith(WEB) else {}
    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(address, **own)
    except (ImportError, ValueError) as error:
        raise ManifestError(
            f"{without_secrets(address)}: cannot be read here ({one_line(error)}); {_package(address)}"
        ) from error
    return found


def _client_settings() -> dict[str, Any]:
    """Of aiohttp's sessions: the user's, from fsspec's configuration, with our watch over redirects."""
    found: dict[str, Any] = {}
    for kind in ("http", "https"):
        found |= fsspec.config.conf.get(kind, {}).get("client_kwargs", {})
    return found | {"trace_configs": [*found.get("trace_configs", []), _watched_redirects()]}


@cache
def _watched_redirects() -> Any:
    """What aiohttp calls before it follows a redirect. No server may lead this machine to its cloud's credentials."""
    import aiohttp

    async def check(session: Any, context: Any, step: Any) -> None:
        location = urljoin(str(step.url), step.response.headers.get("Location", ""))
        host = urlsplit(location).hostname
        if host is not None and await asyncio.to_thread(is_link_local, host):
            step.response.close()
            raise StreamError(
                f"{without_secrets(str(step.url))}: its server leads to the link-local address "
                f"{without_secrets(location)}, which no shard has; do not read from this server",
                passes=False,
            )

    config = aiohttp.TraceConfig()
    config.on_request_redirect.append(check)
    return config


def _package(address: str) -> str:
    """How the file system of an address is installed."""
    kind = address.split("://")[0]
    module = str(known_implementations.get(kind, {}).get("class", "")).partition(".")[0]
    return f"run {install(module)}" if module in EXTRAS else f"install fsspec's package for {kind}://"


def _code(error: BaseException) -> str:
    """The code of a store's answer, e.g. 403 or ExpiredToken; empty if it did not answer."""
    for each in (error.__cause__, error):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return str(getattr(error, "status", None) or getattr(error, "code", ""))


def lasts(error: BaseException) -> bool:
    """Whether a store would give the same answer later: it understood, or this machine is at fault."""
    code = _code(error)
    if code.isdecimal() and int(code) >= 400:
        return int(code) in NEVER or (int(code) < 500 and int(code) not in LATER)
    causes = [error, error.__cause__, error.__context__]
    certificate = any(isinstance(each, ssl.SSLCertVerificationError) for each in causes)
    return certificate or (isinstance(error, OSError) and error.errno in LASTING)


def _refused(error: BaseException) -> bool:
    named = CREDENTIALS.search(type(error).__name__) is not None
    return isinstance(error, PermissionError) or named or _code(error) in REFUSED


def _retry_after(error: BaseException) -> float:
    """Seconds that the server asked to wait, RETRY_AFTER_SECONDS at most."""
    headers = getattr(error, "headers", None)
    response = getattr(error.__cause__, "response", None)
    if isinstance(response, dict):
        headers = response.get("ResponseMetadata", {}).get("HTTPHeaders")
    asked = str((headers or {}).get("Retry-After") or (headers or {}).get("retry-after") or "0")
    try:
        seconds = float(asked) if asked.isdecimal() else parsedate_to_datetime(asked).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
    return min(max(0.0, seconds), RETRY_AFTER_SECONDS)


# Absolute paths, as a kind beside http, s3 and so on.
FILE = "file"
# Kinds of addresses whose host could be one of this link.
WITH_HOST = ("http", "https", "ftp")
# Where clouds hand out a machine's credentials, if not at a link-local address.
METADATA = {"fd00:ec2::254", "100.100.100.200"}


def leading_away(paths: Sequence[str], root: Path | str, follow: Sequence[str]) -> str | None:
    """The first path that must not be followed, and why; None if all may be.

    A relative path may leave the root by `..`, as `python -m data_pipeline index` writes such paths for shards in other
    folders. It must end in .tar, like all shards, so that no other file is read.

    Args:
        root: that the paths are relative to.
        follow: kinds of addresses that are allowed, and "file" for absolute paths.
    """
    inside = f"{os.path.abspath(root)}/"
    known: dict[str, bool] = {}
    return next(filter(None, (_problem(path, inside, follow, known) for path in paths)), None)


def _problem(path: str, inside: str, follow: Sequence[str], known: dict[str, bool]) -> str | None:
    if not path.partition("?")[0].lower().endswith(".tar") or "\0" in path:
        return f"the path {without_secrets(path)}, which is no .tar; index the shards again"
    kind, colon, _ = path.partition("://")
    if not colon:
        if not os.path.isabs(path) or os.path.normpath(path).startswith(inside) or FILE in follow:
            return None
        shown = without_secrets(path)
        return f"the absolute path {shown}; index the shards here, or allow it by data.stream.follow=[{FILE}]"
    if kind not in follow:
        allowed = ",".join((*follow, kind))
        shown = without_secrets(path)
        return f"the address {shown}; give data.stream.shard_root, or allow it by data.stream.follow=[{allowed}]"
    host = _host(path) if kind in WITH_HOST else None
    if host is not None and host not in known:
        known[host] = is_link_local(host)
    if host is not None and known[host]:
        return f"the link-local address {without_secrets(path)}, which no shard has; do not use this manifest"
    return None


def _host(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def is_link_local(host: str) -> bool:
    """Whether a host is, or has a name for, an address of this link or of a cloud's metadata."""
    try:
        found = {str(place[0]).partition("%")[0] for *_, place in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        # The read will say so.
        return False
    for text in found:
        place = ip_address(text)
        place = (place.ipv4_mapped or place) if isinstance(place, IPv6Address) else place
        if place.is_link_local or str(place) in METADATA:
            return True
    return False
