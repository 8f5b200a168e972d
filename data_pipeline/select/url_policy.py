"""Which URLs may be fetched. Strangers wrote them, so they must not reach into the user's own network.

Select and download judge the address that `addresses.address` makes of a URL, which is the one that is fetched.

A name can still resolve to a private address. Only the program that connects sees it, so the download checks every
address by `address_problem`.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

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
        return _literal_problem(host, allow_loopback)
    if re.search("[%<>^|]", host) or not all(labels):
        return MALFORMED
    if labels[-1] in LOOPBACK_NAMES:
        return None if allow_loopback else LOOPBACK
    # A name without a dot is looked up in the machine's own domain.
    if len(labels) == 1 or any(host.endswith("." + name) for name in PRIVATE_NAMES):
        return PRIVATE_NAME
    return None


def url_problems(urls: pa.Array, allow_loopback: bool) -> tuple[np.ndarray, list[str]]:
    """`url_problem` of a column of strings. Plain URLs cost little.

    Returns:
        The indices of the URLs that must not be fetched, ascending, and the problem of each.
    """
    plain = pc.and_(
        pc.match_substring_regex(urls, _PLAIN), pc.invert(pc.match_substring_regex(urls, _SUSPECT_NAME))
    ).fill_null(False)
    odd = np.flatnonzero(~plain.to_numpy(zero_copy_only=False))
    found = [url_problem(url, allow_loopback) for url in urls.take(pa.array(odd)).to_pylist()]
    refused = [number for number, problem in enumerate(found) if problem]
    return odd[refused], [problem for problem in found if problem]


def address_problem(address: str, allow_loopback: bool) -> str | None:
    """Why no connection may be made to an IP address, or None.

    Raises:
        ValueError: it is not an IP address.
    """
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            found = inner
    if found.is_loopback:
        return None if allow_loopback else LOOPBACK
    if not found.is_global or found.is_multicast:
        return PRIVATE_ADDRESS
    if isinstance(found, ipaddress.IPv6Address) and found not in _GLOBAL_UNICAST:
        return PRIVATE_ADDRESS
    return None


def _literal_problem(host: str, allow_loopback: bool) -> str | None:
    """The problem of a host that is an address. Octal, hexadecimal and short forms are refused."""
    if "%" in host:
        return UNUSUAL_ADDRESS
    try:
        return address_problem(host, allow_loopback)
    except ValueError:
        return UNUSUAL_ADDRESS
