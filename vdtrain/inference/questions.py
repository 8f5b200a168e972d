"""Inputs that look like something else than what the flow takes: a question on a terminal, else an error."""

from __future__ import annotations

import os
import re
import sys

from vdtrain.errors import ConfigError, printable

IMAGE, TEXT = "image", "text"


FILE_NAME = re.compile(r".*\S\.(png|jpe?g|webp|gif|bmp|tiff?|avif|heic|jxl|svg|txt|wav|flac|mp3)", re.IGNORECASE)


def looks_like_file(text: str) -> bool:
    """Whether a caption could be meant as a file."""
    try:
        return FILE_NAME.fullmatch(text.strip()) is not None or os.path.isfile(os.path.expanduser(text))
    except (OSError, ValueError):
        return False


def looks_like_caption(text: str) -> bool:
    """Whether the name of a file that does not exist could be meant as a caption."""
    return " " in text.strip() and "/" not in text and not looks_like_file(text)


def confirm(place: str, found: str, question: str, remedy: str) -> None:
    """Ask on a terminal whether something is meant.

    Args:
        place: the setting and its value.
        found: what is odd about it.
        question: for a terminal; a "y" goes on.
        remedy: for the error, without a terminal or after another answer.

    Raises:
        ConfigError: it is not meant, or nobody can be asked.
    """
    if sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty():
        print(f"{printable(f'{place}: {found}')}. {question} [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return
    raise ConfigError(f"{place}: {found}; {remedy}")
