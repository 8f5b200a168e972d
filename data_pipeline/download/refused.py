"""The error for an image that must not be taken."""

from __future__ import annotations


class RefusedError(Exception):
    """An image that must not be taken; the message is the reason, worded alike for all such images."""

    @classmethod
    def above(cls, max_bytes: int) -> RefusedError:
        """The image is longer than the limit."""
        return cls(f"body above {max_bytes:,} bytes")
