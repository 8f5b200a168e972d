"""What strangers may write into a URL, and that whole columns are judged as single URLs are (under a second)."""

from __future__ import annotations

import random

import pyarrow as pa
import pytest

from data_pipeline.select.urls import (
    LOOPBACK,
    MALFORMED,
    PRIVATE_ADDRESS,
    PRIVATE_NAME,
    SCHEME,
    UNUSUAL_ADDRESS,
    USER_NAME,
    address_problem,
    url_problem,
    url_problems,
)

FETCHED = [
    "https://example.org/a.jpg",
    "HTTP://EXAMPLE.ORG/A.JPG",
    "hTTps://Example.Org:8443/a b".replace(" ", "%20"),
    "http://8.8.8.8/a.jpg",
    "http://[2606:4700::1111]:80/a.jpg",
    "http://example.org",
    "http://example.org.",
    "http://example.org?image=1",
    "http://example.org/a.jpg?next=http://localhost/",
    "http://example.org/@10.0.0.1/",
    "http://example.org#@localhost",
    "http://local.example.org/",
    "http://localhost.example.org/",
    "http://internal-images.org/",
    "http://m\u00fcnchen.de/a.jpg",
    "http://xn--mnchen-3ya.de/a.jpg",
    "http://example.org/caf\u00e9.jpg",
    "http://a_b.example.org/",
    "http://1.2.3.4.example.org/",
    "http://example.xn--p1ai/",
]
REFUSED = {
    SCHEME: [
        None,
        "",
        "ftp://example.org/a.jpg",
        "file:///etc/hosts",
        "data:image/png;base64,AAAA",
        "javascript:alert(1)",
        "gopher://example.org/",
        "//example.org/a.jpg",
        "example.org/a.jpg",
        "http://",
        "http:///a.jpg",
        "http:example.org",
        "https://:443/",
    ],
    MALFORMED: [
        "http://[::1",
        "http://example.org:port/",
        "http://example.org:99999/",
        " http://example.org/",
        "http://example.org/ a.jpg",
        "http://example.org/a.jpg\n",
        "http://example.org/\r\nHost: 10.0.0.1",
        "http://exam\tple.org/",
        "http://example.org/\x00",
        "http://example.org/\x7f",
        "http://example.org\\@10.0.0.1/",
        "http:\\\\10.0.0.1\\",
        "http://example.org/\u2028",
        "http://example.org/\u00a0",
        "http://127.0.0.1%2f.example.org/",
        "http://a..example.org/",
        "http://.example.org/",
        "http://example.org../",
        "http://example.org\uff0fa/",
    ],
    USER_NAME: [
        "http://good@10.0.0.1/",
        "http://example.org@10.0.0.1/",
        "http://example.org:80@127.0.0.1/",
        "http://user:word@example.org/",
        "http://a@b@example.org/",
    ],
    UNUSUAL_ADDRESS: [
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0x7f.1/",
        "http://017700000001/",
        "http://127.1/",
        "http://0177.0.0.1/",
        "http://010.0.0.1/",
        "http://10.0.1/",
        "http://0/",
        "http://1.2.3.4.5/",
        "http://256.1.1.1/",
        "http://example.1/",
        "http://example.0x1/",
        "http://2130706433./",
        "http://[fe80::1%25eth0]/",
        "http://[2606:4700::1111%25eth0]/",
    ],
    PRIVATE_ADDRESS: [
        "http://10.1.2.3/a.jpg",
        "http://10.1.2.3./a.jpg",
        "http://172.16.0.1/",
        "http://192.168.1.1:8080/",
        "http://169.254.169.254/latest/meta-data",
        "http://100.64.0.1/",
        "http://0.0.0.0/",
        "http://224.0.0.1/",
        "http://240.0.0.1/",
        "http://255.255.255.255/",
        "http://[::]/",
        "http://[fe80::1]/",
        "http://[fc00::1]/",
        "http://[fec0::1]/",
        "http://[ff02::1]/",
        "http://[::ffff:10.0.0.1]/",
        "http://[::ffff:a00:1]/",
        "http://[64:ff9b::10.0.0.1]/",
        "http://[2002:a00:1::]/",
        "http://\uff11\uff10.0.0.1/",
        "http://10\u30020\u30020\u30021/",
    ],
    PRIVATE_NAME: [
        "http://router/",
        "http://router./",
        "http://printer.local/",
        "http://printer.LOCAL:80/",
        "http://printer.local./",
        "http://metadata.google.internal/computeMetadata/v1/",
        "http://wiki.corp",
        "http://nas.lan?a",
        "http://hub.home.arpa#a",
        "http://a.intranet/",
    ],
    LOOPBACK: [
        "http://localhost:80/a.jpg",
        "http://LOCALHOST/",
        "http://localhost./",
        "http://a.localhost/",
        "http://localhost.localdomain/",
        "http://\u24db\u24de\u24d2\u24d0\u24db\u24d7\u24de\u24e2\u24e3/",
        "http://127.0.0.1/a.jpg",
        "http://127.9.9.9/",
        "http://127.0.0.1./",
        "http://[::1]/a.jpg",
        "http://[::ffff:127.0.0.1]/",
        "http://[0:0:0:0:0:0:0:1]/",
    ],
}
HOSTILE = [(url, problem) for problem, urls in REFUSED.items() for url in urls]


@pytest.mark.parametrize("url", FETCHED)
def test_what_is_fetched(url: str) -> None:
    assert url_problem(url, allow_loopback=False) is None
    assert url_problem(url, allow_loopback=True) is None


@pytest.mark.parametrize(("url", "problem"), HOSTILE)
def test_what_is_refused(url: str | None, problem: str) -> None:
    assert url_problem(url, allow_loopback=False) == problem
    assert url_problem(url, allow_loopback=True) == (None if problem == LOOPBACK else problem)


@pytest.mark.parametrize("allow_loopback", [False, True])
def test_a_column_is_judged_as_its_urls_are(allow_loopback: bool) -> None:
    urls: list[str | None] = [*FETCHED, *(url for url, _ in HOSTILE)]
    pieces = [piece for url in urls if url for piece in (url[:9], url[9:20], url[20:])]
    generator = random.Random(0)
    urls += ["".join(generator.choices(pieces, k=3)) for _ in range(5000)]
    urls += ["http://" + "".join(generator.choices("a1.:/@?#%[]\\-_ local", k=8)) + ".local/" for _ in range(5000)]
    generator.shuffle(urls)
    places, problems = url_problems(pa.array(urls, pa.string()), allow_loopback)
    expected = [url_problem(url, allow_loopback) for url in urls]
    assert dict(zip(places.tolist(), problems, strict=True)) == {
        number: problem for number, problem in enumerate(expected) if problem
    }


def test_addresses() -> None:
    assert address_problem("93.184.216.34", allow_loopback=False) is None
    assert address_problem("64:ff9b::93.184.216.34", allow_loopback=False) is None
    assert address_problem("fe80::1%eth0", allow_loopback=True) == PRIVATE_ADDRESS
    assert address_problem("::ffff:127.0.0.1", allow_loopback=True) is None
    with pytest.raises(ValueError, match="does not appear to be"):
        address_problem("example.org", allow_loopback=False)
