"""Credentials are taken out of every text that leaves a process: what it prints, and what it records.

They are found by their form (addresses, headers, settings of stores) and by their value, if the environment has them.
Imports the standard library alone.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO, cast
from urllib.parse import unquote

HIDDEN = "..."
# Names of settings, headers and variables that hold a credential, as a whole or as their last words.
SECRET = (
    r"(?:password|passwd|passphrase|secret|token|api[_-]?key|access[_-]?key(?:[_-]?id)?|account[_-]?key|secret[_-]?key|"
    r"authorization|credentials?|signature|cookie)"
)
# What a value may be; a scheme such as "Bearer" is no part of the secret.
VALUE = r"((?:(?:bearer|basic|token|sso-key|aws4-[\w-]+)\s+)?)(?:'[^'\n]*'|\"[^\"\n]*\"|[^\s'\"&,;|<>()\[\]{}]+)"
RULES = [
    # A text may be a stranger's: no rule looks beyond the next :// so that the time is linear.
    # User and password of an address: up to the last @ before its path, or, if they have a / themselves, to any @.
    (re.compile(r"(\w://)[^\s/?#'\"<>]*@"), r"\1"),
    (re.compile(r"(\w://)[^\s/?#@:\[<>]+:(?!\d*(?:[/?#'\",;)\]]|\s|$))(?:(?!://)[^\s@<>])*@"), r"\1"),
    # The same without a scheme, as proxies are written. `hf:` names a commit behind its @.
    (re.compile(r"(?<![\w/@.%+:-])(?!hf:)[^\s/:@'\"<>=,;()\[\]{}]+:[^\s/:@'\"<>]+@(?=[\w\[])"), ""),
    # The query of an address, which may be its signature, and a fragment with values.
    (re.compile(r"(\w://(?:(?!://)[^\s?'\"<>])*)\?[^\s'\"<>]*(?:['\"][\w%&=+/.~-]+)*"), rf"\1?{HIDDEN}"),
    (re.compile(r"(\w://(?:(?!://)[^\s#'\"<>])*)#[^\s='\"<>]*=[^\s'\"<>]*"), rf"\1#{HIDDEN}"),
    # The same of an address without its host, as HTTP libraries quote it.
    (re.compile(r"(\burl: /[^\s?]*)\?[^\s'\"<>]*"), rf"\1?{HIDDEN}"),
    (re.compile(r"([?&][\w.%-]+=)[^\s&'\"<>]+"), rf"\1{HIDDEN}"),
    (re.compile(rf"(?i)(?<![a-z0-9])({SECRET}(?:['\"]\]?)?\s*[=:]\s*){VALUE}"), rf"\1\2{HIDDEN}"),
    (re.compile(r"(?i)\b((?:login|username)\s*=\s*)(?:'[^'\n]*'|\"[^\"\n]*\")"), rf"\1{HIDDEN}"),
    (re.compile(r"\b((?:Bearer|Basic)\s+)(?=\S*[\d=])[\w+/.~-]{8,}=*"), rf"\1{HIDDEN}"),
    # Keys that are known by their beginning: the hub's, and those of AWS.
    (re.compile(r"\bhf_\w{16,}|\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b"), HIDDEN),
]
NAMED = re.compile(rf"(?i)(?:^|[_.-]){SECRET}$")
VARIABLE = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|KEY|KEY_ID)$", re.IGNORECASE)
# Shorter values are also ordinary words.
LEAST_LENGTH = 8
# User and password of an address in a setting. A server may send them back in any form.
ACCOUNT = re.compile(r"\w://([^\s@'\"<>]+)@")
_learned: set[str] = set()


def without_secrets(text: str) -> str:
    """The text without the credentials in its addresses, headers and settings, and without those of the environment."""
    text = _without_values(text)
    for pattern, kept in RULES:
        text = pattern.sub(kept, text)
    return text


def redacted(value: Any, name: str = "") -> Any:
    """A configuration for a file or a tracker: the same values, without the credentials in them.

    Local paths stay as they are, whatever characters they have, because they are read again.

    Args:
        value: mappings, lists and plain values.
        name: of the setting.
    """
    if isinstance(value, Mapping):
        return {key: redacted(each, str(key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(each, name) for each in value]
    if not isinstance(value, str):
        return value
    if NAMED.search(name) and value and "${" not in value:
        return HIDDEN
    return without_secrets(value) if "://" in value or value.startswith("pipe:") else _without_values(value)


def learn(value: Any) -> None:
    """From now on, hide the users and passwords of the addresses in a configuration, wherever they stand."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            learn(each)
    elif isinstance(value, str):
        for account in ACCOUNT.findall(value):
            user, colon, password = account.partition(":")
            # Without a password, a slash before the @ is a path.
            found = {user, password, unquote(password)} if colon or "/" not in user else set()
            _learned.update(each for each in found if len(each) >= LEAST_LENGTH and not re.match(r"\d+/", each))


def _without_values(text: str) -> str:
    for value in _learned:
        if value in text:
            text = text.replace(value, HIDDEN)
    for name, value in os.environ.items():
        if len(value) >= LEAST_LENGTH and VARIABLE.search(name) and value in text and not os.path.exists(value):
            text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", HIDDEN, text)
    return text


class _Redacted:
    """A text stream whose lines lose their credentials; all else is the stream's own.

    Attributes:
        unfinished: whether the last line has no end yet.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.unfinished = stream, False

    def write(self, text: str) -> int:
        self.unfinished = not text.endswith("\n") if text else self.unfinished
        self._stream.write(without_secrets(text))
        return len(text)

    def writelines(self, lines: Iterator[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def redact_output() -> None:
    """From now on, nothing that this process prints by sys.stdout and sys.stderr has credentials."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Redacted):
            setattr(sys, name, cast(TextIO, _Redacted(stream)))


@contextmanager
def redacted_output() -> Iterator[None]:
    """`redact_output` for a block."""
    before = sys.stdout, sys.stderr
    redact_output()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


@contextmanager
def redacted_arguments() -> Iterator[None]:
    """For a block, sys.argv without credentials: libraries record the command line."""
    before = sys.argv
    sys.argv = [without_secrets(each) for each in before]
    try:
        yield
    finally:
        sys.argv = before
