"""Which URLs may be fetched. Strangers wrote them, so they must not reach into the user's own network.

`address` makes of a published URL the address that is fetched: as browsers read it (WHATWG URL, UTS 46), without what
web pages add around it. Policy, duplicates, block lists and download all judge this one.

A name can still resolve to a private address. Only the program that connects sees it, so the download checks every
address by `address_problem`.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Callable
from urllib.parse import quote, unquote, urljoin, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# Controls, spaces, zero-width characters, marks of direction and of byte order.
_EDGES = "".join(map(chr, [*range(0x21), *range(0x7F, 0xA1), 0xAD, 0x1680, 0x180E, *range(0x2000, 0x2010)]))
_EDGES += "".join(map(chr, [*range(0x2028, 0x2030), *range(0x205F, 0x2070), 0x3000, 0xFEFF]))
_AMPERSAND = re.compile(r"&(?:(?:amp|#0*38|#x0*26);)+", re.IGNORECASE)
_WITHOUT_SCHEME = re.compile(r"[/\\]{2}|www\.", re.IGNORECASE)
_PARTS = re.compile(r"(https?):[/\\]*([^/\\?#]*)([^?#]*)(\?[^#]*)?", re.IGNORECASE)
_AUTHORITY = re.compile(r"(\[[^\[\]@]*\]|[^:@\[\]]+)(?::([0-9]*))?")
_DEFAULT_PORTS = {"http": "80", "https": "443"}
_FORBIDDEN_IN_HOST = re.compile(r"[\x00-\x20#%/:<>?@\[\\\]^|\x7f\ufffd]")
# Characters that browsers leave as they are; quote() adds letters, digits and -._~. The backslash is escaped in a query
# too, as programs read it in different ways.
_SAFE_IN_PATH = "!$%&'()*+,/:;=@[]|"
_SAFE_IN_QUERY = "!$%&()*+,/:;=?@[]^`{|}"
_DELETED_IN_HOST = re.compile("[\u00ad\u034f\u180b-\u180f\u200b\u2060\u2064\ufe00-\ufe0f\ufeff]")
_KEPT_IN_HOST = "\u00df\u1e9e\u03c2"  # sharp s and final sigma: UTS 46, non-transitional

# Nearly all URLs are their own address: those of the first pattern without the second. Syntax of RE2.
_EXACT = r"^https?://(?:[a-z0-9_-]+\.)+[a-z]{2,}/[!$%&'()*+,/:;=@A-Z\[\]a-z|0-9._~-]*(?:\?[!$%&()*+,/:;=?@A-Z\[\]^`{|}a-z0-9._~-]*)?$"
_INEXACT = r"(?i)/\.|%2e|&amp;"


def address(url: str, base: str | None = None) -> str:
    """The address of a URL, in ASCII.

    Args:
        base: the address that redirects to `url`, which can be relative to it.

    Returns:
        The address, or the stripped URL if it has none: `url_problem` refuses that. The address of an
        address is the address itself.
    """
    text = re.sub(r"[\t\n\r]", "", url.strip(_EDGES))
    try:
        if base is None:
            text = _AMPERSAND.sub("&", text)
            if _WITHOUT_SCHEME.match(text):
                text = "http:" + ("//" if text[0] in "wW" else "") + text
        else:
            beginning = re.match(r"[^?#]*", text)[0]  # type: ignore[index]
            text = urljoin(base, beginning.replace("\\", "/") + text[len(beginning) :])
        return _address(text)
    except ValueError:
        return text


def addresses(urls: pa.Array) -> pa.Array:
    """`address` of a column of strings. URLs that are their own address cost little."""
    exact = pc.and_(pc.match_substring_regex(urls, _EXACT), pc.invert(pc.match_substring_regex(urls, _INEXACT)))
    return changed(urls, pc.and_(pc.invert(exact.fill_null(True)), urls.is_valid()), address)


def changed(values: pa.Array, odd: pa.Array, change: Callable[[str], str]) -> pa.Array:
    """A column of strings whose values are changed where a column of booleans is true."""
    found = [change(value) for value in values.filter(odd).to_pylist()]
    return pc.replace_with_mask(values, odd, pa.array(found, pa.string())) if found else values


def _address(url: str) -> str:
    parts = _PARTS.match(url)
    authority = parts and _AUTHORITY.fullmatch(parts[2])
    if not parts or not authority or "\ufffd" in url:
        raise ValueError(url)
    scheme = parts[1].lower()
    port = (authority[2] or "").lstrip("0") or ("0" if authority[2] else "")
    path = quote(_resolved(parts[3].replace("\\", "/") or "/"), safe=_SAFE_IN_PATH, errors="replace")
    query = quote(parts[4] or "", safe=_SAFE_IN_QUERY, errors="replace")
    return (
        f"{scheme}://{_host(authority[1])}{f':{port}' if port not in ('', _DEFAULT_PORTS[scheme]) else ''}{path}{query}"
    )


def _resolved(path: str) -> str:
    """A path without `.` and `..`."""
    kept: list[str] = []
    segments = path.split("/")[1:]
    for number, segment in enumerate(segments, 1):
        plain = re.sub("%2e", ".", segment, flags=re.IGNORECASE)
        if plain == "..":
            del kept[-1:]
        if plain not in (".", ".."):
            kept.append(segment)
        elif number == len(segments):
            kept.append("")
    return "/" + "/".join(kept)


def _host(host: str) -> str:
    """A host in ASCII, by UTS 46 without its tables; a ValueError if it has a character that no host has."""
    if host.startswith("["):
        return host.lower()
    host = unquote(host)
    if not host.isascii():
        host = _DELETED_IN_HOST.sub("", host)
        for _ in range(2):
            folded = "".join(each.lower() if each in _KEPT_IN_HOST else each.casefold() for each in host)
            host = unicodedata.normalize("NFKC", folded)
        labels = host.replace("\u3002", ".").split(".")
        host = ".".join(each if each.isascii() else f"xn--{each.encode('punycode').decode()}" for each in labels)
    if _FORBIDDEN_IN_HOST.search(host):
        raise ValueError(host)
    return host.lower()


MALFORMED = "malformed URL"
SCHEME = "not http or https"
USER_NAME = "user name in the URL"
UNUSUAL_ADDRESS = "address not in its plain form"
LOOPBACK = "loopback host"
PRIVATE_ADDRESS = "private address"
PRIVATE_NAME = "private host name"

LOOPBACK_NAMES = ("localhost", "localdomain")
# Reserved for local use (RFC 6762 with its appendix G, RFC 8375), or by a cloud for its own services.
PRIVATE_NAMES = ("local", "internal", "intranet", "private", "corp", "home", "lan", "home.arpa")

_FORBIDDEN = re.compile(r"[\x00-\x20\x7f-\xa0\\\u2028\u2029\ufffd]")
_NUMERIC = re.compile(r"[0-9]+|0[xX][0-9a-fA-F]*")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")

# Nearly all URLs have this plain form. Host names of the second pattern need `url_problem` all the same. Syntax of RE2.
_PLAIN = r"^(?i:https?)://(?:[A-Za-z0-9_-]+\.)+[A-Za-z]{2,}(?::[0-9]{1,4})?(?:[/?#][!-\[\]-~]*)?$"
_SUSPECT_NAME = rf"^[^/]*//[^/?#]*\.(?i:{'|'.join((*LOOPBACK_NAMES, *PRIVATE_NAMES)).replace('.', '[.]')})(?:[:/?#]|$)"


def url_problem(url: str | None, allow_loopback: bool) -> str | None:
    """Why a URL must not be fetched, or None. Only http and https may be fetched, and nothing in private networks."""
    if not url:
        return SCHEME
    if _FORBIDDEN.search(url):
        # Programs parse such a URL in different ways.
        return MALFORMED
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return MALFORMED
    if parts.scheme not in ("http", "https") or not host:
        return SCHEME
    if "@" in parts.netloc:
        return USER_NAME
    if "[" in parts.netloc and not re.fullmatch(r"\[[^\[\]]*\](:[0-9]*)?", parts.netloc):
        return MALFORMED
    # Resolvers read full-width digits and the ideographic full stop as ASCII.
    host = re.sub("[\u3002\uff0e\uff61]", ".", unicodedata.normalize("NFKC", host)).lower().removesuffix(".")
    labels = host.split(".")
    if ":" in host or _NUMERIC.fullmatch(labels[-1]):
        try:
            return UNUSUAL_ADDRESS if "%" in host else address_problem(host, allow_loopback)
        except ValueError:
            # Octal, hexadecimal and short forms.
            return UNUSUAL_ADDRESS
    if re.search("[%<>^|]", host) or not all(labels):
        return MALFORMED
    if labels[-1] in LOOPBACK_NAMES:
        return None if allow_loopback else LOOPBACK
    # A name without a dot is looked up in the machine's own domain.
    if len(labels) == 1 or any(host.endswith("." + name) for name in PRIVATE_NAMES):
        return PRIVATE_NAME
    return None


def url_problems(urls: pa.Array, allow_loopback: bool) -> tuple[np.ndarray, list[str]]:
    """The places in a column of the URLs that must not be fetched, ascending, and their problems."""
    plain = pc.and_(
        pc.match_substring_regex(urls, _PLAIN), pc.invert(pc.match_substring_regex(urls, _SUSPECT_NAME))
    ).fill_null(False)
    odd = np.flatnonzero(~plain.to_numpy(zero_copy_only=False))
    found = [url_problem(url, allow_loopback) for url in urls.take(pa.array(odd)).to_pylist()]
    refused = [number for number, problem in enumerate(found) if problem]
    return odd[refused], [problem for problem in found if problem]


def address_problem(address: str, allow_loopback: bool) -> str | None:
    """Why no connection may be made to an IP address, or None; a ValueError if it is none."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        found = inner or found
    if found.is_loopback:
        return None if allow_loopback else LOOPBACK
    if not found.is_global or found.is_multicast:
        return PRIVATE_ADDRESS
    if isinstance(found, ipaddress.IPv6Address) and found not in _GLOBAL_UNICAST:
        return PRIVATE_ADDRESS
    return None
