"""Captions from alternative texts of web pages: what describes no picture is taken out.

The paper cleans its captions by a procedure of its own. This one takes out, in this order: HTML entities and tags,
web and e-mail addresses, what stands in square or curly brackets, characters that are not printed, underscores and
dashes or slashes that stand alone, quotation marks around words (an apostrophe inside a word stays), file name endings,
and superfluous white space.
"""

from __future__ import annotations

import html
import re
import unicodedata

# Captions that match none of this are clean: a pattern of RE2's syntax too, for whole columns (data_pipeline.filters).
# It errs towards cleaning once too often.
UNCLEAN = (
    r"""[^ -~]|[<>&\[\]{}_"`@*#|~^\\]|  |^[ ,;:]|[ ,;:]$| [,;:.!?]|//|[Ww]{3}\.|\.[A-Za-z]{3,4}[^A-Za-z0-9]*$"""
    r"""|(?:^|[^A-Za-z0-9])['/-]|['/-](?:[^A-Za-z0-9]|$)"""
)

_UNCLEAN = re.compile(UNCLEAN)
_TAG = re.compile(r"<[/!?]?[A-Za-z][^<>]{0,1000}>|<!--.{0,1000}?-->", re.DOTALL)
_URL = re.compile(r"(?:https?://|ftp://|www\.)[^\s<>\"'\[\]{}]+", re.IGNORECASE)
_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+")
_BRACKETS = re.compile(r"\[[^\[\]{}]*\]|\{[^\[\]{}]*\}")
_STRAY_BRACKETS = re.compile(r"[\[\]{}<>]")
_SYMBOLS = re.compile(r"[_*#|~^\\`\u2022\u00b7\u25cf\u2605\u2122\u00ae\u00a9]+")
_LONE_DASH = re.compile(r"(?:(?<=\s)|^)[-/\u2010-\u2015]+(?=\s|$)")
_DOUBLE_DASH = re.compile(r"[-\u2010-\u2015]{2,}|/{2,}")
_SINGLE_QUOTE = re.compile(r"(?<![A-Za-z0-9])'|'(?![A-Za-z0-9])")
_FILE_NAME = re.compile(r"\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg)(?=\W*$)", re.IGNORECASE)
_SPACE = re.compile(r"\s+")
_SPACE_BEFORE_MARK = re.compile(r" +(?=[,;:!?](?: |$)|\.(?: |$))")
_EDGES = " \t,;:/-\u2010\u2011\u2012\u2013\u2014\u2015"
_SAME = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u02bc": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u201e": '"',
        "\u00ab": '"',
        "\u00bb": '"',
        "\u00a0": " ",
    }
)


def clean_caption(text: str) -> str:
    """A caption without what is no description; empty where nothing else was there. Cleaning again changes nothing."""
    for _ in range(8):
        if not _UNCLEAN.search(text):
            break
        cleaned = _clean_once(text)
        if cleaned == text:
            break
        text = cleaned
    return text


def _clean_once(text: str) -> str:
    text = unicodedata.normalize("NFC", html.unescape(text)).translate(_SAME)
    text = _TAG.sub(" ", text)
    text = _EMAIL.sub(" ", _URL.sub(" ", text))
    for _ in range(3):  # the innermost first
        text = _BRACKETS.sub(" ", text)
    text = _STRAY_BRACKETS.sub(" ", text)
    if not text.isprintable():
        text = "".join(letter if letter.isprintable() or letter.isspace() else "" for letter in text)
    text = _SINGLE_QUOTE.sub("", _SYMBOLS.sub(" ", text).replace('"', ""))
    text = _DOUBLE_DASH.sub(" ", _LONE_DASH.sub(" ", text))
    text = _SPACE.sub(" ", _FILE_NAME.sub("", text))
    return _SPACE_BEFORE_MARK.sub("", text).strip(_EDGES)
