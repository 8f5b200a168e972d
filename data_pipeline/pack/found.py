"""What all sources of images have in common: an image with its caption, and the count of what is left out."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NO_CAPTION = "no caption"
MISSING = "missing file"
ADDRESS = "an address, not a file"
NO_PATH = "no path"

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


@dataclass(frozen=True)
class Entry:
    """An image file and its caption."""

    image: str  # path relative to the folder of the images, if the image is below it
    caption: str | None  # the text; None if it stands in a file
    caption_file: str | None  # path of that file, as `image`
    stamp: str  # sizes and times of the files, by which a later run recognises a changed file
    references: tuple[str, ...] = ()  # all captions of the image, if it has several


class LeftOut:
    """Counts what is left out by reason, with the first example of each."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, reason: str, example: str) -> None:
        self.reasons[reason] += 1
        self.examples.setdefault(reason, example)

    def __str__(self) -> str:
        return (
            ", ".join(f"{count:,} {reason} ({self.examples[reason]})" for reason, count in self.reasons.most_common())
            or "none"
        )


def captioned(place: str, caption: Any, captions: str, folder: Path, base: Path, left_out: LeftOut) -> Iterator[Entry]:
    """The entries of an image that a table names: one for each of its captions that is taken, or a count.

    Args:
        place: the image's path, absolute or relative to `folder`.
        caption: a text, or a list of texts.
        captions: the setting `data.pack.captions`.
        base: the folder that the path of the entry is relative to.
    """
    name = place.strip()
    if not name:
        left_out.add(NO_PATH, repr(caption))
        return
    name = name.removeprefix("file://")
    if _ADDRESS.match(name):
        left_out.add(ADDRESS, name)
        return
    texts = [text for text in map(clean, caption if isinstance(caption, list) else [caption]) if text]
    if not texts:
        left_out.add(NO_CAPTION, name)
        return
    # Tables made on Windows separate folders by backslashes.
    for path in (os.path.join(folder, each) for each in (name, name.replace("\\", "/"))):
        if (stamp := stamp_of(path)) is not None:
            break
    else:
        left_out.add(MISSING, name)
        return
    references = tuple(texts) if len(texts) > 1 else ()
    for text in texts if captions == "each" else texts[:1]:
        yield Entry(relative(path, base), text, None, stamp, references)


def clean(caption: Any) -> str:
    """A caption on one line; empty if it is not a text."""
    if caption is None or isinstance(caption, dict | float):
        return ""
    # JSON can hold unpaired surrogates, which UTF-8 cannot.
    return " ".join(str(caption).encode("utf-8", "replace").decode().split())


def stamp_of(*paths: str) -> str | None:
    """Sizes and modification times of files; None if one of them is not there or not a file."""
    stamps = []
    for path in paths:
        try:
            found = os.stat(path)
        except (OSError, ValueError):
            return None
        if not stat.S_ISREG(found.st_mode):
            return None
        stamps.append(f"{found.st_size} {found.st_mtime_ns}")
    return " ".join(stamps)


def relative(path: str, base: Path) -> str:
    """A path relative to `base` if it is below it, otherwise absolute."""
    found = os.path.relpath(path, base)
    return os.path.abspath(path) if found.split(os.sep)[0] == os.pardir else found
