"""The name of a pair that stays the same from its metadata to the shard that it is trained from."""

from __future__ import annotations

import hashlib


def pair_uid(source: str, url: str, caption: str) -> str:
    """32 hexadecimal digits: BLAKE2b-128 of the source's name, the URL and the cleaned caption."""
    identity = "\n".join((source, url, caption))
    return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
