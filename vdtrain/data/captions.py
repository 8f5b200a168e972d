"""Captions from alternative texts of web pages, without the parts that do not describe the image.

The paper describes its cleaning only in outline. This one removes, in this order: HTML entities and tags; web and
e-mail addresses; text in square or curly brackets; unprintable characters; underscores, and dashes or slashes that
stand alone; quotation marks around words (an apostrophe inside a word stays); file name extensions; superfluous white
space.
"""

from __future__ import annotations

import html
import re
import unicodedata

# A caption that does not match is clean. A match may also be a clean caption, which cleaning does not change.
# The pattern is also valid RE2 syntax, for whole columns (data_pipeline.select.filters).
UNCLEAN = (
    r"""[^ -~]|[<>&\[\]{}_"`@*#|~^\\]|  |^[ ,;:]|[ ,;:]$| [,;:.!?]|//|[Ww]{3}\.|\.[A-Za-z]{3,4}[^A-Za-z0-9]*$"""
    r"""|(?:^|[^A-Za-z0-9])['/-]|['/-](?:[^A-Za-z0-9]|$)"""
)

_TAG = re.compile(r"<[/!?]?[A-Za-z][^<>]{0,1000}>|<!--.{0,1000}?-->", re.DOTALL)
_URL = re.compile(r"(?:https?://|ftp://|www\.)[^\s<>\"'\[\]{}]+", re.IGNORECASE)
_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+")
_BRACKETS = re.compile(r"\[[^\[\]{}]*\]|\{[^\[\]{}]*\}")
_LONE_DASH = re.compile(r"(?:(?<=\s)|^)[-/\u2010-\u2015]+(?=\s|$)")
_DOUBLE_DASH = re.compile(r"[-\u2010-\u2015]{2,}|/{2,}")
_SINGLE_QUOTE = re.compile(r"(?<![A-Za-z0-9])'|'(?![A-Za-z0-9])")
_FILE_NAME = re.compile(r"\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg)(?=\W*$)", re.IGNORECASE)
_SPACE_BEFORE_MARK = re.compile(r" +(?=[,;:!?](?: |$)|\.(?: |$))")
_EDGES = " \t,;:/-\u2010\u2011\u2012\u2013\u2014\u2015"
_QUOTES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc", "'") | dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb", '"'))
_SYMBOLS: dict[int, str | None] = str.maketrans(
    dict.fromkeys("[]{}<>_*#|~^\\`\u2022\u00b7\u25cf\u2605\u2122\u00ae\u00a9\u00a0", " ") | {'"': None}
)


def clean_caption(text: str) -> str:
    """The cleaned caption, empty if no description remains. Cleaning it again changes nothing."""
    for _ in range(8):
        cleaned = _clean_once(text)
        if cleaned == text:
            break
        text = cleaned
    return text


def _clean_once(text: str) -> str:
    # Most captions need few of these steps, and a search for a character costs less than a pattern.
    if "&" in text:
        text = html.unescape(text)
    if not text.isascii():
        text = unicodedata.normalize("NFC", text).translate(_QUOTES)
    if "<" in text:
        text = _TAG.sub(" ", text)
    if "//" in text or "www." in text.lower():
        text = _URL.sub(" ", text)
    if "@" in text:
        text = _EMAIL.sub(" ", text)
    if "[" in text or "{" in text:
        for _ in range(3):  # the innermost first
            text = _BRACKETS.sub(" ", text)
    text = text.translate(_SYMBOLS)
    if not text.isprintable():
        text = "".join(letter for letter in text if letter.isprintable() or letter.isspace())
    if "'" in text:
        text = _SINGLE_QUOTE.sub("", text)
    if "-" in text or "/" in text or not text.isascii():
        text = _DOUBLE_DASH.sub(" ", _LONE_DASH.sub(" ", text))
    if "." in text:
        text = _FILE_NAME.sub("", text)
    text = " ".join(text.split())
    if " ," in text or " ." in text or " ;" in text or " :" in text or " !" in text or " ?" in text:
        text = _SPACE_BEFORE_MARK.sub("", text)
    return text.strip(_EDGES)
