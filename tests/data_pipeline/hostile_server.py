"""A server on this machine with good images, and with all that the web has besides."""

from __future__ import annotations

import gzip
import io
import struct
import threading
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.message import Message
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import brotli
import numpy as np
from PIL import Image

SIDES = (96, 80)
LARGE = (200, 160)


def jpeg(number: int = 0, size: tuple[int, int] = SIDES, orientation: int | None = None) -> bytes:
    """An image of noise, another for each number."""
    noise = np.random.default_rng(number).integers(0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    stored = io.BytesIO()
    image.save(stored, "JPEG", quality=90, exif=exif)
    return stored.getvalue()


def bomb(side: int = 30_000) -> bytes:
    """A PNG of about a hundred kilobytes that decodes to 900 million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    rows = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def tiny_png() -> bytes:
    stored = io.BytesIO()
    Image.new("RGB", (1, 1)).save(stored, "PNG")
    return stored.getvalue()


BODIES = {
    "/sideways.jpg": jpeg(1, orientation=6),
    "/pixel.png": tiny_png(),
    "/large.jpg": jpeg(5, LARGE),
    "/thin.jpg": jpeg(2, (800, 64)),
    "/bomb.png": bomb(),
    "/truncated.jpg": jpeg(3)[:900],
    "/page.html": b"<html><body>moved</body></html>",
    "/drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>',
    "/nothing.jpg": b"",
}
REDIRECTS = {
    "/moved.jpg": "/good/0.jpg",
    "/loop": "/loop",
    "/to-file": "file:///etc/hostname",
    "/to-ftp": "ftp://127.0.0.1/a.jpg",
    "/to-private": "http://10.0.0.1/a.jpg",
    "/to-metadata": "http://169.254.169.254/latest/meta-data/",
    # Header lines are bytes: UTF-8, ISO-8859-1 and a space, as careless servers send them.
    "/to-utf8": "/good/\u00c5 0.jpg".encode().decode("iso-8859-1"),
    "/to-latin1": "/good/\u00c5\u00850.jpg",
    "/to-backslash": "\\good\\0.jpg",
    "/to-private-name": "//intranet\u2024corp/0.jpg".encode().decode("iso-8859-1"),
}
OPT_OUTS = {
    "/noai.jpg": ("X-Robots-Tag", "noai"),
    "/noimageai.jpg": ("X-Robots-Tag", "noindex-not, NoImageAI"),
    "/noindex.jpg": ("X-Robots-Tag", "unavailable_after: 25 Jun 2030 15:00:00 PST, noindex"),
    "/noml.jpg": ("X-Robots-Tag", "*: noml"),
    "/tdm.jpg": ("TDM-Reservation", "1"),
}
ADDRESSED_TO_OTHERS = {"/googlebot.jpg": ("X-Robots-Tag", "googlebot: noindex"), "/tdm0.jpg": ("TDM-Reservation", "0")}
BUSY = {"/flaky.jpg": 1, "/recovering.jpg": 2}  # requests that are answered with 503
# Content-Encoding and body.
ENCODED = {
    "/encoded/gzip": ("gzip", gzip.compress(jpeg())),
    "/encoded/two-members": ("x-gzip", gzip.compress(jpeg()[:99]) + gzip.compress(jpeg()[99:]) + bytes(9)),
    "/encoded/deflate": ("deflate", zlib.compress(jpeg())),
    "/encoded/raw-deflate": ("deflate", zlib.compress(jpeg())[2:-4]),
    "/encoded/br": ("br", brotli.compress(jpeg())),
    "/encoded/twice": ("gzip, br", brotli.compress(gzip.compress(jpeg()))),
    "/encoded/not-at-all": ("gzip", jpeg()),
    "/encoded/no-encoding": ("binary", jpeg()),
    "/encoded/gzip-bomb": ("gzip", gzip.compress(bytes(50_000_000))),
    "/encoded/br-bomb": ("br", brotli.compress(bytes(50_000_000))),
    "/encoded/gzip-cut": ("gzip", gzip.compress(jpeg())[:-40]),
    "/encoded/br-cut": ("br", brotli.compress(jpeg())[:-40]),
    "/encoded/gzip-damaged": ("gzip", b"\x1f\x8b" + jpeg()),
    "/encoded/zstd": ("zstd", jpeg()),
}
# Retry-After of a first answer, and its status; a date is given by its distance in seconds.
LATER = {
    "/later/seconds": ("0", 429),
    "/later/date": (1, 503),
    "/later/past": (-100, 503),
    "/later/nonsense": ("soon", 503),
    "/later/tomorrow": ("86400", 503),
}


class HostileServer(ThreadingHTTPServer):
    """Counts requests by path; while it is `away` it answers 503, and until it is `released` /held/ waits.

    Attributes:
        headers: of the last request of each path.
        next_host, cookie_domain: where /passed-on redirects to, with a cookie for that domain.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: Counter[str] = Counter()
        self.headers: defaultdict[str, Message] = defaultdict(Message)
        self.next_host = self.cookie_domain = ""
        self.away = threading.Event()
        self.released = threading.Event()
        self.released.set()

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients hang up: that is what they are to do


class _Handler(BaseHTTPRequestHandler):
    server: HostileServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path
        self.server.requests[path] += 1
        self.server.headers[path] = self.headers
        path = path if path.startswith("/good/") else path.partition("?")[0]
        if self.server.away.is_set():
            self.send_error(503)
        elif path.startswith(("/good/", "/held/")):
            if path.startswith("/held/"):
                self.server.released.wait(300)
            self.answer(jpeg(int("".join(filter(str.isdecimal, unquote(path))))))
        elif path in BODIES:
            self.answer(BODIES[path])
        elif path in REDIRECTS:
            self.answer(b"", 302, Location=REDIRECTS[path])
        elif path.startswith("/status/"):
            self.answer(b"", int(path.removeprefix("/status/")), Location="/good/0.jpg")
        elif path == "/choices":
            self.answer(b"", 300)
        elif path in ENCODED:
            self.answer(ENCODED[path][1], **{"Content-Encoding": ENCODED[path][0]})
        elif path in LATER and self.server.requests[path] == 1:
            wait, status = LATER[path]
            given = wait if isinstance(wait, str) else formatdate(time.time() + wait, usegmt=True)
            self.answer(b"", status, **{"Retry-After": given})
        elif path in LATER:
            self.answer(jpeg(4))
        elif path == "/passed-on":
            cookie = f"seen=1; Path=/; Domain={self.server.cookie_domain}"
            self.answer(b"", 302, Location=f"http://{self.server.next_host}/good/0.jpg", **{"Set-Cookie": cookie})
        elif path == "/cookie":
            self.cookie()
        elif path in {**OPT_OUTS, **ADDRESSED_TO_OTHERS}:
            name, value = {**OPT_OUTS, **ADDRESSED_TO_OTHERS}[path]
            self.answer(jpeg(), **{name: value})
        elif path == "/500":
            self.send_error(500)
        elif path in BUSY and self.server.requests[path] <= BUSY[path]:
            self.send_error(503)
        elif path in BUSY:
            self.answer(jpeg(4))
        elif path == "/silent":
            self.until_gone(b"")
        elif path == "/slow-headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
            self.until_gone(b"x")
        elif path == "/drip":
            self.begin(None)
            self.until_gone(b"x")
        elif path == "/short.jpg":
            self.begin(10 * len(jpeg()))
            self.wfile.write(jpeg())
        elif path == "/junk":
            self.begin(60_000_000)
            self.until_gone(bytes(100_000))
        elif path == "/endless":
            self.begin(None)
            self.until_gone(bytes(100_000), pause=0)
        else:
            self.send_error(404)

    def cookie(self) -> None:
        """An image for those who come back with the cookie that they were given; everyone else is sent again."""
        if "seen=1" in self.headers.get("Cookie", ""):
            self.answer(jpeg())
        else:
            self.answer(b"", 302, Location="/cookie", **{"Set-Cookie": "seen=1; Path=/"})

    def begin(self, length: int | None, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.begin(len(body), status, **headers)
        self.wfile.write(body)

    def until_gone(self, bit: bytes, pause: float = 0.2) -> None:
        """Send on until the client hangs up, or half a minute has gone."""
        deadline = time.monotonic() + 30
        with suppress(OSError):
            while time.monotonic() < deadline:
                if bit:
                    self.wfile.write(bit)
                    self.wfile.flush()
                time.sleep(pause)


@contextmanager
def hostile_server() -> Iterator[HostileServer]:
    """The server, running."""
    with HostileServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
