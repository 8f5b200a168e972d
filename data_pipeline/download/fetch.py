"""One image over HTTP: no address of one's own network, no endless body, no endless time, no opt-out passed over.

Runs inside img2dataset's workers, of whatever interpreter they are: it needs no package that img2dataset lacks.
"""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import string
import time
import urllib.request
from dataclasses import dataclass
from email.message import Message
from functools import cache, partial
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import quote, urljoin

from data_pipeline.failures import is_transient
from data_pipeline.select.url_policy import address_problem, url_problem

PAUSE = 1.0  # seconds before a failure that may pass is tried again
# Directives of X-Robots-Tag that carry a value; any other name before a colon is that of a crawler.
VALUED = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")


class RefusedError(Exception):
    """An image that is not taken; the message is the reason, the same for all images that share it."""


@dataclass(frozen=True)
class Limits:
    """What an image may cost.

    Attributes:
        timeout: seconds without a byte.
        seconds: seconds in all, redirects included.
        max_bytes: length of the response.
        retries: further attempts after a failure that may pass.
        opt_outs: directives of X-Robots-Tag that are honoured.
    """

    timeout: float
    seconds: float
    max_bytes: int
    retries: int
    allow_loopback: bool
    user_agent: str
    opt_outs: tuple[str, ...]


def fetch_row(row: tuple[int, str], limits: Limits) -> tuple[int, io.BytesIO | None, str | None]:
    """What img2dataset's own function returns: the row's key, and the image's bytes or why there are none."""
    key, url = row
    message = ""
    for attempt in range(limits.retries + 1):
        if attempt:
            time.sleep(PAUSE)
        try:
            return key, io.BytesIO(fetch(url, limits)), None
        except RefusedError as error:
            return key, None, str(error)
        except Exception as error:  # a stranger's server may raise anything in http.client, and no image ends a shard
            message = str(error) or type(error).__name__
        if not is_transient(message):
            break
    return key, None, message


def fetch(url: str, limits: Limits) -> bytes:
    """The body that a URL leads to.

    Raises:
        RefusedError: the URL, one that it redirects to, an address behind it, or the response is not to be taken.
        OSError, http.client.HTTPException, ValueError: it cannot be fetched.
    """
    problem = url_problem(url, limits.allow_loopback)
    if problem:
        raise RefusedError(problem)
    try:
        request = urllib.request.Request(url, headers={"User-Agent": limits.user_agent})
        with _opener(limits).open(request, timeout=limits.timeout) as response:
            reason = opt_out(response.headers, limits)
            if reason:
                raise RefusedError(f"opted out: {reason}")
            return bytes(response.read())
    except HTTPError as error:
        error.close()
        raise


def opt_out(headers: Message, limits: Limits) -> str | None:
    """The header by which an image's owner keeps it out of training sets, or None.

    That is `TDM-Reservation: 1`, and an X-Robots-Tag directive for every crawler or for one that we go by.
    """
    if (headers.get("TDM-Reservation") or "").strip() == "1":
        return "TDM-Reservation"
    for value in headers.get_all("X-Robots-Tag", []):
        ours = True
        for word in value.lower().split(","):
            name, colon, directive = (part.strip() for part in word.partition(":"))
            if colon and name not in VALUED:
                ours = name == "*" or name in limits.user_agent.lower()
            else:
                directive = name
            if ours and directive in limits.opt_outs:
                return f"X-Robots-Tag {directive}"
    return None


class _Timed(io.RawIOBase):
    """A socket's bytes until the deadline or the largest length."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, limits: Limits, deadline: float) -> None:
        self._raw, self._sock, self._limits, self._deadline = raw, sock, limits, deadline
        self._left = limits.max_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(_patience(self._limits, self._deadline))
        try:
            count = self._raw.readinto(buffer)
        except TimeoutError:
            _patience(self._limits, self._deadline)
            raise
        self._left -= count or 0
        if self._left < 0:
            raise RefusedError(_above(self._limits))
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, limits: Limits, deadline: float, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self._limits = limits
        self.fp = io.BufferedReader(_Timed(self.fp.detach(), sock, limits, deadline))

    def begin(self) -> None:
        super().begin()
        if self.length is not None and self.length > self._limits.max_bytes:
            raise RefusedError(_above(self._limits))


class _Connection(http.client.HTTPConnection):
    """A connection to an address that was checked, and to no other that the name resolves to a moment later."""

    def __init__(self, host: str, *, limits: Limits, deadline: float, timeout: float) -> None:
        super().__init__(host, timeout=timeout)
        self._limits, self._deadline = limits, deadline
        self.response_class = partial(_Response, limits=limits, deadline=deadline)  # type: ignore[assignment]

    def connect(self) -> None:
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        for *_, address in found:
            problem = address_problem(str(address[0]), self._limits.allow_loopback)
            if problem:
                raise RefusedError(problem)
        failure = OSError("no address")
        for family, kind, protocol, _, address in found:
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(_patience(self._limits, self._deadline))
                sock.connect(address)
            except OSError as error:
                sock.close()
                failure = error
            except BaseException:
                sock.close()
                raise
            else:
                self.sock = sock
                return
        raise failure


class _SecureConnection(_Connection):
    default_port = 443

    def connect(self) -> None:
        super().connect()
        # The socket's timeout bounds the handshake as a whole.
        self.sock = _tls().wrap_socket(self.sock, server_hostname=self.host)


class _Handler(urllib.request.AbstractHTTPHandler):
    """Opens http and https."""

    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self._limits = limits

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self._open(_Connection, req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self._open(_SecureConnection, req)

    def _open(self, connection: type[_Connection], request: urllib.request.Request) -> http.client.HTTPResponse:
        deadline = request.__dict__.setdefault("deadline", time.monotonic() + self._limits.seconds)
        opened = self.do_open(connection, request, limits=self._limits, deadline=deadline)  # type: ignore[arg-type]
        assert isinstance(opened, http.client.HTTPResponse)
        return opened


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    def http_error_302(self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message) -> Any:
        target = headers.get("Location") or headers.get("URI")
        # Escaped as the redirect is when it is followed.
        target = quote(target or "", encoding="iso-8859-1", safe=string.punctuation)
        problem = target and url_problem(urljoin(req.full_url, target), self._limits.allow_loopback)
        if problem:
            fp.close()
            raise RefusedError(f"redirect to {problem}")
        return super().http_error_302(req, fp, code, msg, headers)  # type: ignore[arg-type]

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(self, req: urllib.request.Request, *args: Any) -> urllib.request.Request | None:
        followed = super().redirect_request(req, *args)
        if followed is not None:
            followed.__dict__["deadline"] = req.__dict__["deadline"]
        return followed


@cache
def _opener(limits: Limits) -> urllib.request.OpenerDirector:
    """Opens http and https alone, and goes through no proxy, behind which no address could be checked."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        _Handler(limits),
        _Redirects(limits),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


@cache
def _tls() -> ssl.SSLContext:
    """One for all connections: http.client would read the certificates anew for each."""
    return ssl.create_default_context()


def _patience(limits: Limits, deadline: float) -> float:
    """Seconds that the next operation may take.

    Raises:
        RefusedError: there are none left.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise RefusedError(f"slower than {limits.seconds:g} seconds")
    return min(limits.timeout, left)


def _above(limits: Limits) -> str:
    return f"body above {limits.max_bytes:,} bytes"
