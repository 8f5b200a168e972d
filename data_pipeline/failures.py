"""Groups img2dataset's messages about failed images by reason, and tells which failures are transient."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from data_pipeline.select.urls import (
    LOOPBACK,
    MALFORMED,
    PRIVATE_ADDRESS,
    PRIVATE_NAME,
    SCHEME,
    UNUSUAL_ADDRESS,
    USER_NAME,
)

SUCCESS = "success"
REFUSED = "address refused"
DNS = "no answer from DNS"
OTHER = "other (see error_message)"
# Pattern, reason, whether it is transient; the first match counts. HTTP errors have one reason per status, errors of
# the operating system one per number, and everything else one: the set of reasons is bounded.
REASONS = (
    (r"Temporary failure in name resolution", DNS, True),
    (r"Name or service not known|No address associated|label (empty|too long)", "no such host", False),
    (r"timed out|slower than", "too slow", True),
    (
        r"refused\b|\breset\b|unreachable|No route|closed connection|IncompleteRead|BadStatus|EOF",
        "connection lost",
        True,
    ),
    (r"(?i)certificate|\bssl\b|\btls\b", "TLS", False),
    (r"^opted out", "opted out", False),
    (
        "|".join((MALFORMED, SCHEME, USER_NAME, UNUSUAL_ADDRESS, LOOPBACK, PRIVATE_ADDRESS, PRIVATE_NAME)),
        REFUSED,
        False,
    ),
    (r"^body above", "body too large", False),
    (r"content encoding$", "damaged or unknown content encoding", False),
    (r"codec can't|invalid port|label", "address that cannot be sent", False),
    (r"^got more than", "too many headers", False),
    (r"MAX_IMAGE_(PIXELS|WIDTH|HEIGHT)", "too many pixels", False),
    (r"^Image decoding error|buf\.empty|OpenCV", "not an image", False),
    *((f"^{each}$", each, False) for each in ("image too small", "image area too large", "aspect ratio too large")),
)
REDIRECTS = (301, 302, 303, 307, 308)


def reason(message: str) -> tuple[str, bool]:
    """A message's reason, and whether the failure is transient: the same request may succeed at another time."""
    status = re.match(r"HTTP Error (\d+)", message)
    if status:
        code = int(status[1])
        if code in REDIRECTS or "loop" in message:
            return "redirect loop", False
        return f"HTTP {code}", code in (408, 425, 429) or code >= 500
    for pattern, name, transient in REASONS:
        if re.search(pattern, message):
            return name, transient
    number = re.search(r"\[Errno (\d{1,5})\]", message)
    return os.strerror(int(number[1])) if number else OTHER, False


class DownloadStats:
    """Counts images by reason; success is one of them."""

    def __init__(self, messages: Mapping[str, int] | None = None) -> None:
        self.reasons: Counter[str] = Counter()
        self.transient = 0
        for message, count in (messages or {}).items():
            name, transient = (SUCCESS, False) if message == SUCCESS else reason(message)
            self.reasons[name] += count
            self.transient += count * transient

    def __add__(self, other: DownloadStats) -> DownloadStats:
        total = DownloadStats()
        total.reasons, total.transient = self.reasons + other.reasons, self.transient + other.transient
        return total

    def dump(self) -> dict[str, Any]:
        """As JSON."""
        return {"reasons": self.reasons, "transient": self.transient}

    @classmethod
    def load(cls, document: Mapping[str, Any]) -> DownloadStats:
        """Inverse of `dump`."""
        tally = cls()
        tally.reasons.update({str(name): int(count) for name, count in document["reasons"].items()})
        tally.transient = int(document["transient"])
        return tally

    @property
    def count(self) -> int:
        return self.reasons.total()

    @property
    def successes(self) -> int:
        return self.reasons[SUCCESS]

    @property
    def success_share(self) -> float:
        return self.successes / max(self.count, 1)

    @property
    def settled_share(self) -> float:
        """Share of the images without a transient failure: a retry would not change them."""
        return 1 - self.transient / max(self.count, 1)

    def failures(self, most: int = 5) -> str:
        """The commonest failures with their counts."""
        failed = Counter({name: count for name, count in self.reasons.items() if name != SUCCESS})
        return ", ".join(f"{count:,} {name}" for name, count in failed.most_common(most)) or "none"

    def __str__(self) -> str:
        return f"{self.successes:,} of {self.count:,} images ({self.success_share:.0%}); failed: {self.failures()}"
