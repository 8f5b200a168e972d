"""Progress bars on a terminal, nothing in logs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.progress import track as rich_track

Item = TypeVar("Item")


def track(items: Sequence[Item], description: str) -> Iterable[Item]:
    """Iterate with a bar where a person is looking; without a description there is none."""
    return rich_track(items, description) if description and sys.stdout.isatty() else items
