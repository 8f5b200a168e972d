"""Which URLs may be fetched: strangers wrote them, and they must not reach into one's own network."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

LOCAL_NAMES = ("localhost", "localhost.localdomain")


def url_problem(url: str | None, allow_loopback: bool) -> str | None:
    """Why a URL must not be fetched, or None: only http and https, and no address inside one's own network."""
    try:
        parts = urlsplit(url or "")
        host = parts.hostname
    except ValueError:
        return "malformed URL"
    if parts.scheme not in ("http", "https") or not host:
        return "not http or https"
    if host in LOCAL_NAMES:
        return None if allow_loopback else "loopback host"
    try:
        return address_problem(host, allow_loopback)
    except ValueError:
        return None


def address_problem(address: str, allow_loopback: bool) -> str | None:
    """Why no connection may be made to an IP address, or None.

    Raises:
        ValueError: it is none.
    """
    found = ipaddress.ip_address(address)
    if found.is_loopback:
        return None if allow_loopback else "loopback host"
    return None if found.is_global else "private address"
