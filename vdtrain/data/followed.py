"""Which shard paths of a manifest are followed. A stranger may have written them; the root is the user's setting."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from urllib.parse import urlsplit

from vdtrain.redaction import without_secrets

# Absolute paths, as a kind beside http, s3 and so on.
FILE = "file"
WEB = ("http", "https", "ftp")
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
    host = _host(path) if kind in WEB else None
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
