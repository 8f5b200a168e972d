"""One image over HTTP: what is refused, by which name, and how soon (about five seconds)."""

from __future__ import annotations

import email
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.download.fetch import ACCEPT, Limits, RefusedError, fetch, fetch_row, opt_out, retry_after
from data_pipeline.failures import reason
from tests.data_pipeline.hostile_server import HostileServer, hostile_server, jpeg
from tests.settings import own_time

LIMITS = Limits(
    timeout=0.5,
    seconds=1,
    max_bytes=1_000_000,
    retries=1,
    allow_loopback=True,
    user_agent="Mozilla/5.0 (compatible; Imagebot)",
    opt_outs=("noai", "noindex"),
)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other without the second between them."""
    monkeypatch.setattr("data_pipeline.download.fetch.PAUSE", 0.05)


@pytest.fixture(scope="module")
def server() -> Iterator[HostileServer]:
    with hostile_server() as running:
        yield running


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/404", "HTTP Error 404: Not Found"),
        ("/500", "HTTP Error 500: Internal Server Error"),
        ("/loop", "infinite loop"),
        ("/to-file", "redirect to not http or https"),
        ("/to-ftp", "redirect to not http or https"),
        ("/to-private", "redirect to private address"),
        ("/to-metadata", "redirect to private address"),
        ("/silent", "timed out"),
        ("/slow-headers", "slower than 1 seconds"),
        ("/drip", "slower than 1 seconds"),
        ("/junk", "body above 1,000,000 bytes"),
        ("/endless", "body above 1,000,000 bytes"),
        ("/short.jpg", "IncompleteRead"),
        ("/noai.jpg", "opted out: X-Robots-Tag noai"),
        ("/noindex.jpg", "opted out: X-Robots-Tag noindex"),
        ("/tdm.jpg", "opted out: TDM-Reservation"),
        ("/to-private-name", "redirect to private host name"),
        ("/choices", "HTTP Error 300: Multiple Choices"),
        ("/encoded/gzip-bomb", "body above 1,000,000 bytes"),
        ("/encoded/br-bomb", "body above 1,000,000 bytes"),
        ("/encoded/gzip-cut", "damaged content encoding"),
        ("/encoded/br-cut", "damaged content encoding"),
        ("/encoded/gzip-damaged", "damaged content encoding"),
        ("/encoded/zstd", "unknown content encoding"),
        ("/later/tomorrow", "HTTP Error 503: Service Unavailable"),
    ],
)
def test_what_is_refused(server: HostileServer, path: str, message: str) -> None:
    key, image, error = fetch_row((7, server.base + path), LIMITS)
    assert (key, image) == (7, None)
    assert error is not None
    assert message in error


@pytest.mark.parametrize(
    "path",
    [
        *("/good/0.jpg", "/moved.jpg", "/googlebot.jpg", "/tdm0.jpg"),
        *("/to-utf8", "/to-latin1", "/to-backslash", "/cookie"),
        *(f"/status/{status}" for status in (300, 301, 302, 303, 307, 308)),
        *(f"/encoded/{name}" for name in ("gzip", "two-members", "deflate", "raw-deflate", "br", "twice")),
        *("/encoded/not-at-all", "/encoded/no-encoding"),
    ],
)
def test_what_is_fetched(server: HostileServer, path: str) -> None:
    assert fetch(server.base + path, LIMITS) == jpeg()


def test_https_checks_the_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=test -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with hostile_server() as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        base = server.base.replace("http://", "https://")
        _, _, error = fetch_row((0, base + "/good/0.jpg"), LIMITS)
        assert error is not None
        assert reason(error) == ("TLS", False)
        trusting = ssl.create_default_context(cafile=str(certificate))
        monkeypatch.setattr("data_pipeline.download.fetch._tls", lambda: trusting)
        assert fetch(base + "/good/0.jpg", LIMITS) == jpeg()
        _, _, error = fetch_row((0, base + "/drip"), LIMITS)
        assert error == "slower than 1 seconds"


def test_what_is_asked_for(server: HostileServer) -> None:
    """The address and not the URL, in headers that say what is understood; a cookie does not outlive its fetch."""
    server.requests.clear()
    for path in ("/ü%20b?c=d&e=%2F#f", "?q", "\\good\\é 0.jpg \n"):
        fetch_row((0, " " + server.base.replace("http", "HTTP") + path), LIMITS)
    assert set(server.requests) == {"/%C3%BC%20b?c=d&e=%2F", "/?q", "/good/%C3%A9%200.jpg"}
    headers = server.headers["/?q"]
    assert headers["Accept"] == ACCEPT
    assert headers["Accept-Encoding"] == "gzip, deflate, br"
    assert headers.get_all("Host") == [server.base.removeprefix("http://")]
    for _ in range(2):
        fetch(server.base + "/cookie", LIMITS)
    assert server.requests["/cookie"] == 4


def test_a_cookie_goes_to_no_other_host(server: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *given, **named: real("127.0.0.1", *given, **named))
    port = server.server_address[1]
    for host, sent in (("b.one.example", True), ("two.example", False)):
        server.next_host, server.cookie_domain = f"{host}:{port}", "one.example"
        assert fetch(f"http://a.one.example:{port}/passed-on", LIMITS) == jpeg()
        assert ("Cookie" in server.headers["/good/0.jpg"]) == sent


def test_another_interpreter_needs_no_brotli(monkeypatch: pytest.MonkeyPatch, server: HostileServer) -> None:
    monkeypatch.setattr("data_pipeline.download.fetch.HAS_BROTLI", False)
    assert fetch_row((0, server.base + "/encoded/br"), LIMITS)[2] == "unknown content encoding"
    code = "import sys; sys.modules['brotli'] = None\n"
    code += "from data_pipeline.download.fetch import ACCEPT_ENCODING; print(ACCEPT_ENCODING)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "gzip, deflate\n"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/hostname", "not http or https"),
        ("ftp://example.org/a.jpg", "not http or https"),
        ("http://10.0.0.1/a.jpg", "private address"),
        ("http://127.0.0.1/a.jpg", "loopback host"),
        ("http://2130706433/a.jpg", "address not in its plain form"),
        ("http://localhost./a.jpg", "loopback host"),
        ("", "not http or https"),
    ],
)
def test_addresses_that_are_refused(url: str, message: str) -> None:
    assert fetch_row((0, url), replace(LIMITS, allow_loopback=False)) == (0, None, message)


def test_a_name_is_refused_for_any_private_address_behind_it(
    server: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name's first address is fine, its second is not; and the address that was checked is the one connected to."""
    real, port = socket.getaddrinfo, server.server_address[1]
    behind = {"good.example": ["127.0.0.1"], "bad.example": ["127.0.0.1", "192.168.0.7"]}
    asked = []

    def names(host: str, *arguments: Any, **options: Any) -> list[Any]:
        asked.append(host)
        return [each for address in behind.get(host, [host]) for each in real(address, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", names)
    assert fetch(f"http://good.example:{port}/good/0.jpg", LIMITS) == jpeg()
    assert asked == ["good.example"]
    with pytest.raises(RefusedError, match="private address"):
        fetch(f"http://bad.example:{port}/good/0.jpg", LIMITS)


def test_an_address_that_does_not_answer_leaves_time_for_the_next(
    server: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, silent = server.server_address[1], socket.socket()
    # Once its queue is full, it answers no more, as an address behind a firewall.
    silent.bind(("127.0.0.2", port))
    silent.listen(0)
    waiting = [socket.socket() for _ in range(4)]
    for each in waiting:
        each.setblocking(False)
        each.connect_ex(("127.0.0.2", port))
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *given, **named: [each for n in (2, 1) for each in real(f"127.0.0.{n}", *given, **named)],
    )
    assert fetch(f"http://two.example:{port}/good/0.jpg", replace(LIMITS, timeout=2.0, seconds=2.0)) == jpeg()
    for each in (silent, *waiting):
        each.close()


@pytest.mark.usefixtures("impatient")
def test_only_failures_that_may_pass_are_tried_again(server: HostileServer) -> None:
    server.requests.clear()
    _, image, error = fetch_row((0, server.base + "/flaky.jpg"), LIMITS)
    assert image is not None
    assert error is None
    for path in ("/404", "/noai.jpg", "/500"):
        fetch_row((0, server.base + path), LIMITS)
    assert server.requests == {"/flaky.jpg": 2, "/404": 1, "/noai.jpg": 1, "/500": 2}


@pytest.mark.parametrize("name", ["seconds", "date", "past", "nonsense"])
def test_a_server_says_when_to_come_back(server: HostileServer, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Not at all after a day, which /later/tomorrow above wants."""
    pauses: list[float] = []
    monkeypatch.setattr("data_pipeline.download.fetch.time", own_time(sleep=pauses.append))
    _, image, error = fetch_row((0, f"{server.base}/later/{name}"), LIMITS)
    assert (image is not None, error) == (True, None)
    (pause,) = pauses
    assert {"seconds": 0, "date": pause, "past": 0, "nonsense": 1}[name] == pause
    # The second may end between the server's two dates.
    assert 0 <= pause <= 2


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ("Retry-After: 120", 120),
        ("Retry-After: 99999999999999999999999", 999_999_999),
        ("Date: Wed, 21 Oct 2026 07:28:00 GMT\nRetry-After: Wed, 21 Oct 2026 07:30:00 GMT", 120),
        ("Date: Wed, 21 Oct 2026 07:28:00 GMT\nRetry-After: Wed, 21 Oct 2026 07:00:00 GMT", 0),
        ("Retry-After: -3", None),
        ("Retry-After: 31 Foo 99999", None),
        ("Date: x\nRetry-After: Wed, 21 Oct 2026 07:00:00 GMT", None),
        ("Content-Type: image/jpeg", None),
    ],
)
def test_retry_after(headers: str, expected: float | None) -> None:
    assert retry_after(email.message_from_string(headers)) == expected


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ("X-Robots-Tag: noai, noimageai", "X-Robots-Tag noai"),
        ("X-Robots-Tag: nofollow\nX-Robots-Tag: NOINDEX", "X-Robots-Tag noindex"),
        ("X-Robots-Tag: max-snippet: 20, noai", "X-Robots-Tag noai"),
        ("X-Robots-Tag: imagebot: noai", "X-Robots-Tag noai"),
        ("X-Robots-Tag: otherbot: noai, noindex", None),
        ("X-Robots-Tag: otherbot: nofollow, *: noai", "X-Robots-Tag noai"),
        ("X-Robots-Tag: noarchive", None),
        ("TDM-Reservation: 1", "TDM-Reservation"),
        ("TDM-Reservation: 0", None),
        ("Content-Type: image/jpeg", None),
    ],
)
def test_opt_outs(headers: str, expected: str | None) -> None:
    assert opt_out(email.message_from_string(headers), LIMITS) == expected
