"""A URL is read as browsers read it, once: every form of an address is one address (under two seconds)."""

from __future__ import annotations

import random

import pyarrow as pa
import pytest

from data_pipeline.select.urls import address, addresses, url_problem
from tests.data_pipeline.test_url_policy import FETCHED, HOSTILE

SAME = [
    "http://example.org/",
    "https://a-b.example.org:8443/A/b%2Fc.JPG?x=1&y=%zz[]{}|^`",
    "http://example.org/100%.jpg",
    "http://example.org/%E9.jpg?u=%c3%a9",
    "http://example.org/a//b;v=1,2/@x:y!$&'()*+=~",
    "http://example.org/.hidden?a/../b",
    "http://xn--mnchen-3ya.de./a",
]
READ = {
    # What stands around it.
    " \t\u00a0http://example.org/a.jpg\u200b\r\n": "http://example.org/a.jpg",
    "\ufeffhttp://example.org/a.jpg\x00": "http://example.org/a.jpg",
    "http://exam\nple.org/a\tb.jpg": "http://example.org/ab.jpg",
    "http://example.org/a.jpg?w=1&amp;h=2&AMP;x=3&#38;y&amp;amp;z": "http://example.org/a.jpg?w=1&h=2&x=3&y&z",
    "http://example.org/?a=1&copy=2&lt;": "http://example.org/?a=1&copy=2&lt;",
    # Scheme, host and port.
    "HTTPS://Example.ORG/A.jpg": "https://example.org/A.jpg",
    "//example.org/a.jpg": "http://example.org/a.jpg",
    "www.example.org/a.jpg": "http://www.example.org/a.jpg",
    "WWW.example.org": "http://www.example.org/",
    "http:example.org": "http://example.org/",
    "http:///example.org/a": "http://example.org/a",
    "http:\\\\example.org\\a\\b.jpg?c": "http://example.org/a/b.jpg?c",
    "http://example.org\\@10.0.0.1/": "http://example.org/@10.0.0.1/",
    "http://example.org:80/": "http://example.org/",
    "https://example.org:0443": "https://example.org/",
    "https://example.org:80/": "https://example.org:80/",
    "http://example.org:/a": "http://example.org/a",
    "http://ex%61mple.org/": "http://example.org/",
    "http://m\u00fcnchen.de/": "http://xn--mnchen-3ya.de/",
    "http://MU\u0308NCHEN.de/": "http://xn--mnchen-3ya.de/",
    "http://m%C3%BCnchen.de/": "http://xn--mnchen-3ya.de/",
    "http://stra\u00dfe.de/": "http://xn--strae-oqa.de/",
    "http://\u65e5\u672c\u3002jp/": "http://xn--wgv71a.jp/",
    "http://\uff45xam\u00adple.org/": "http://example.org/",
    # As the tables of UTS 46 map them.
    "http://\u24ba\uff38\u00aa\u216e.org/": "http://exad.org/",
    "http://\u03a3\u03a3.gr/": "http://xn--4xaa.gr/",
    "http://\u03c3\u03c2.gr/": "http://xn--3xab.gr/",
    "http://\u1e9e.de/": "http://xn--zca.de/",
    "http://\u0130.tr/": "http://xn--i-9bb.tr/",
    "http://\u0645\u062b\u0627\u0644.\u0625\u062e\u062a\u0628\u0627\u0631/": "http://xn--mgbh0fb.xn--kgbechtv/",
    "http://\u2615.example/": "http://xn--53h.example/",
    # Path, query and fragment.
    "http://example.org": "http://example.org/",
    "http://example.org?a b": "http://example.org/?a%20b",
    "http://example.org/a b.jpg": "http://example.org/a%20b.jpg",
    "http://example.org/caf\u00e9 \u2028.jpg": "http://example.org/caf%C3%A9%20%E2%80%A8.jpg",
    "http://example.org/caf%C3%A9 \u00e9%.jpg": "http://example.org/caf%C3%A9%20%C3%A9%.jpg",
    "http://example.org/?q=\u65e5 '\"<>\\": "http://example.org/?q=%E6%97%A5%20%27%22%3C%3E%5C",
    'http://example.org/"<>^`{}.jpg': "http://example.org/%22%3C%3E%5E%60%7B%7D.jpg",
    "http://example.org/a.jpg#b?c": "http://example.org/a.jpg",
    "http://example.org/a/./b/../c/%2e%2E/d": "http://example.org/a/d",
    "http://example.org/../a/..": "http://example.org/",
    "http://[2606:4700::ABCD]:80/a": "http://[2606:4700::abcd]/a",
}
REFUSED = [
    "http://127.0.0.1%2f.example.org/",
    "http://a^b.example.org/",
    "http://exa mple.org/",
    "http://evil\u2100.example.org/",
    "http://[2606:4700::1111]example.org/",
    "http://example.org/caf\ufffd.jpg",
    "http://a@example.org/ b",
    "ftp://www.example.org/",
    "example.org/a.jpg",
    "  ",
]


@pytest.mark.parametrize("url", SAME)
def test_an_address_stays_as_it_is(url: str) -> None:
    assert address(url) == url


@pytest.mark.parametrize(("url", "expected"), READ.items())
def test_how_a_url_is_read(url: str, expected: str) -> None:
    assert address(url) == expected


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("b c.jpg", "http://example.org/x/b%20c.jpg"),
        ("/b", "http://example.org/b"),
        ("\\b\\c?d\\e", "http://example.org/b/c?d%5Ce"),
        ("?q", "http://example.org/x/a.jpg?q"),
        ("//m%C3%BCnchen.de", "http://xn--mnchen-3ya.de/"),
        ("HTTPS://Other.org:443", "https://other.org/"),
        ("www.example.com/a", "http://example.org/x/www.example.com/a"),
        ("/a?b=1&amp;c", "http://example.org/a?b=1&amp;c"),
        ("../../c#d", "http://example.org/c"),
    ],
)
def test_a_redirect_is_relative_to_where_it_came_from(target: str, expected: str) -> None:
    assert address(target, base="http://example.org/x/a.jpg?z") == expected


@pytest.mark.parametrize("url", REFUSED)
def test_what_has_no_address_is_refused(url: str) -> None:
    assert url_problem(address(url), allow_loopback=True)


def test_a_column_is_read_as_its_urls_are_and_what_is_accepted_is_exact() -> None:
    generator = random.Random(0)
    urls: list[str | None] = [*SAME, *READ, *REFUSED, *FETCHED, *(url for url, _ in HOSTILE)]
    pieces = [piece for url in urls if url for piece in (url[:9], url[9:20], url[20:])]
    urls += ["".join(generator.choices(pieces, k=3)) for _ in range(5000)]
    for start in ("http://", "http://example.org/"):
        urls += [start + "".join(generator.choices("aB\u00fc1.:/@?#%2e[]\\-_ \u200b&;", k=9)) for _ in range(2500)]
    found = addresses(pa.array(urls, pa.string())).to_pylist()
    assert found == [None if url is None else address(url) for url in urls]
    accepted = [each for each in found if url_problem(each, allow_loopback=True) is None]
    assert len(accepted) > 1000
    assert all(each.isascii() and address(each) == each for each in accepted)
