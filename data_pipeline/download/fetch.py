"""One image over HTTP: addresses inside one's own network are refused, bytes and time are limited, opt-outs are kept.

It runs in img2dataset's workers, in any interpreter that has img2dataset. A compressed body (Content-Encoding) is
decoded up to a limit: a small one can decode to gigabytes. brotli is used if it is there.
"""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import string
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from email.message import Message
from email.utils import parsedate_to_datetime
from functools import cache, partial
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any
from urllib.parse import quote, urlsplit
from urllib.request import Request

from data_pipeline.failures import reason
from data_pipeline.select.urls import address, address_problem, url_problem


class RefusedError(Exception):
    """An image that must not be taken; the message is the reason, worded alike for all such images."""

    @classmethod
    def above(cls, max_bytes: int) -> RefusedError:
        """The image is longer than the limit."""
        return cls(f"body above {max_bytes:,} bytes")


try:
    import brotli  # type: ignore[import-untyped]
except ImportError:
    brotli = None
# Earlier releases cannot limit what a body decodes to.
HAS_BROTLI = hasattr(getattr(brotli, "Decompressor", None), "can_accept_more_data")
ACCEPT_ENCODING = "gzip, deflate, br" if HAS_BROTLI else "gzip, deflate"
GZIP_MAGIC = b"\x1f\x8b"
DAMAGED = "damaged content encoding"
UNKNOWN = "unknown content encoding"


def decoded(body: bytes, headers: Message, most: int) -> bytes:
    """A body without its content encodings.

    A body that is not compressed although its headers say so stays as it is, and so it does under a name that is no
    encoding: servers send both with good images.

    Raises:
        RefusedError: it is damaged, decodes to more than `most` bytes, or nothing here decodes it.
    """
    encodings = ",".join(headers.get_all("Content-Encoding", [])).lower().split(",")
    for name in reversed([each.strip() for each in encodings]):
        if name in ("gzip", "x-gzip") and body.startswith(GZIP_MAGIC):
            body = _inflated(body, 16 + zlib.MAX_WBITS, most)
        elif name == "deflate" and body:
            # Some servers leave out zlib's header.
            wrapped = body[0] & 0x0F == 8 and int.from_bytes(body[:2], "big") % 31 == 0
            body = _inflated(body, zlib.MAX_WBITS if wrapped else -zlib.MAX_WBITS, most)
        elif name == "br" and HAS_BROTLI and body:
            body = _brotli(body, most)
        elif name in ("br", "zstd", "compress", "x-compress") and body:
            raise RefusedError(UNKNOWN)
    return body


def _inflated(body: bytes, window_bits: int, most: int) -> bytes:
    found = b""
    while True:
        packer = zlib.decompressobj(window_bits)
        try:
            found += packer.decompress(body, most + 1 - len(found))
        except zlib.error as error:
            raise RefusedError(DAMAGED) from error
        _check(found, packer.eof, most)
        body = packer.unused_data
        # A gzip body can have several members, and zeros behind them.
        if not body.startswith(GZIP_MAGIC):
            return found


def _brotli(body: bytes, most: int) -> bytes:
    packer: Any = brotli.Decompressor()
    found, more = b"", body
    try:
        while len(found) <= most and not packer.is_finished():
            piece = packer.process(more, output_buffer_limit=most + 1 - len(found))
            if not piece and packer.can_accept_more_data():
                break
            found, more = found + piece, b""
    except brotli.error as error:
        raise RefusedError(DAMAGED) from error
    _check(found, packer.is_finished(), most)
    return found


def _check(found: bytes, whole: bool, most: int) -> None:
    if len(found) > most:
        raise RefusedError.above(most)
    if not whole:
        raise RefusedError(DAMAGED)


PAUSE = 1.0  # seconds before another attempt after a transient failure
REDIRECTS = (300, 301, 302, 303, 307, 308)
MAX_REDIRECTS = 10
# Directives of X-Robots-Tag that carry a value; any other name before a colon names a crawler.
VALUED = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
# Formats that every decoder reads come first.
ACCEPT = "image/jpeg,image/png,image/*;q=0.9,*/*;q=0.5"


class StatusError(http.client.HTTPException):
    """A status other than success; `retry_after` is in seconds, None if the server names no time."""

    def __init__(self, status: int, detail: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(f"HTTP Error {status}: {detail or http.client.responses.get(status, 'unknown status')}")
        self.retry_after = retry_after


@dataclass(frozen=True)
class Limits:
    """Limits for one image."""

    timeout: float  # seconds without a byte
    seconds: float  # seconds in all, redirects included; a server that asks for a longer pause is not asked again
    max_bytes: int  # length of the response, headers included, and of its decoded body
    retries: int  # further attempts after a transient failure
    allow_loopback: bool
    user_agent: str
    opt_outs: Sequence[str]  # directives of X-Robots-Tag that are honoured


def fetch_row(row: tuple[int, str], limits: Limits) -> tuple[int, io.BytesIO | None, str | None]:
    """As img2dataset's own function: returns the row's key, and the image's bytes or the reason why there are none."""
    key, url = row
    message, pause = "", PAUSE
    for attempt in range(limits.retries + 1):
        if attempt:
            time.sleep(pause)
        try:
            return key, io.BytesIO(fetch(url, limits)), None
        except RefusedError as error:
            return key, None, str(error)
        except Exception as error:  # whatever a hostile answer raises: one image must not end a shard
            message = str(error) or type(error).__name__
            wanted = getattr(error, "retry_after", None)
            pause = PAUSE if wanted is None else wanted
        if pause > limits.seconds or not reason(message)[1]:
            break
    return key, None, message


def fetch(url: str, limits: Limits) -> bytes:
    """The body that a URL leads to.

    No proxy is used: behind one, no address could be checked. Cookies last from one redirect to the next.

    Raises:
        RefusedError: the URL, a redirect, an address behind one of them, or the response must not be taken.
        OSError, http.client.HTTPException, ValueError: it cannot be fetched.
    """
    deadline = time.monotonic() + limits.seconds
    cookies = CookieJar(DefaultCookiePolicy(strict_domain=True))
    url = address(url or "")
    for redirects in range(MAX_REDIRECTS + 1):
        problem = url_problem(url, limits.allow_loopback)
        if problem:
            raise RefusedError(f"redirect to {problem}" if redirects else problem)
        connection, request = _Connection(url, limits, deadline), Request(url)
        cookies.add_cookie_header(request)
        with closing(connection), connection.get(request.unredirected_hdrs) as response:
            cookies.extract_cookies(response, request)
            target = response.headers.get("Location")
            if response.status not in REDIRECTS or target is None:
                return _body(response, limits)
        # Headers are read as ISO-8859-1: their bytes are escaped as they are.
        url = address(quote(target, encoding="iso-8859-1", safe=string.punctuation), base=url)
    raise StatusError(response.status, "infinite loop of redirects")


def _body(response: http.client.HTTPResponse, limits: Limits) -> bytes:
    if response.status // 100 != 2:
        raise StatusError(response.status, retry_after=retry_after(response.headers))
    if response.length is not None and response.length > limits.max_bytes:
        raise RefusedError.above(limits.max_bytes)
    if directive := opt_out(response.headers, limits):
        raise RefusedError(f"opted out: {directive}")
    return decoded(response.read(), response.headers, limits.max_bytes)


def retry_after(headers: Message) -> float | None:
    """Seconds until the server wants to be asked again, which it gives as a number or as a date; None without them."""
    wanted = (headers.get("Retry-After") or "").strip()
    if wanted.isascii() and wanted.isdecimal():
        return float(wanted[:9])
    try:
        until = parsedate_to_datetime(wanted).timestamp()
        now = parsedate_to_datetime(headers["Date"]).timestamp() if "Date" in headers else time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(until - now, 0.0)


def opt_out(headers: Message, limits: Limits) -> str | None:
    """The header that keeps an image out of training sets, or None.

    That is `TDM-Reservation: 1`, or an X-Robots-Tag directive for all crawlers or for one named in our user agent.
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


class _Connection(http.client.HTTPConnection):
    """A connection to the address that was checked, as `address` gives it: the name is not looked up again."""

    def __init__(self, url: str, limits: Limits, deadline: float) -> None:
        parts = urlsplit(url)
        self._secure = parts.scheme == "https"
        self.default_port = 443 if self._secure else 80
        super().__init__(parts.hostname or "", parts.port or self.default_port)
        self._target = "/" + url.split("/", 3)[3]
        self._limits, self._deadline = limits, deadline
        self.response_class = partial(_Response, limits=limits, deadline=deadline)  # type: ignore[assignment]

    def get(self, cookies: Mapping[str, str]) -> http.client.HTTPResponse:
        headers = {"User-Agent": self._limits.user_agent, "Accept": ACCEPT, "Accept-Encoding": ACCEPT_ENCODING}
        self.request("GET", self._target, headers={**headers, "Connection": "close", **cookies})
        return self.getresponse()

    def connect(self) -> None:
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        for *_, place in found:
            problem = address_problem(str(place[0]), self._limits.allow_loopback)
            if problem:
                raise RefusedError(problem)
        failure = OSError("no address")
        for left, (family, kind, protocol, _, place) in zip(range(len(found), 0, -1), found, strict=True):
            sock = socket.socket(family, kind, protocol)
            try:
                # An address that does not answer leaves time for the others: IPv6 often leads nowhere.
                sock.settimeout(_patience(self._limits, self._deadline) / left)
                sock.connect(place)
            except OSError as error:
                sock.close()
                failure = error
            except BaseException:
                sock.close()
                raise
            else:
                # The socket's timeout bounds the handshake as a whole.
                sock.settimeout(_patience(self._limits, self._deadline))
                self.sock = _tls().wrap_socket(sock, server_hostname=self.host) if self._secure else sock
                return
        raise failure


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, limits: Limits, deadline: float, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp = io.BufferedReader(_Timed(self.fp.detach(), sock, limits, deadline))


class _Timed(io.RawIOBase):
    """A socket's bytes, up to the deadline and the byte limit."""

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
            raise RefusedError.above(self._limits.max_bytes)
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


@cache
def _tls() -> ssl.SSLContext:
    """Shared by all connections: reading the certificates takes time."""
    return ssl.create_default_context()


def _patience(limits: Limits, deadline: float) -> float:
    """Seconds that the next operation may take."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise RefusedError(f"slower than {limits.seconds:g} seconds")
    return min(limits.timeout, left)
