"""Words of the form SETTING=VALUE: their parts, and the value that each stands for."""

from __future__ import annotations

import contextlib
import math
import re
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vdtrain.config.fields import Mark, SettingType
from vdtrain.errors import printable

WORD = re.compile(
    r"(?P<sign>\+\+|\+|~|)(?P<key>[A-Za-z_][\w./@:-]*)(?:(?P<equal>=)(?P<text>.*))?", re.ASCII | re.DOTALL
)
QUOTED = re.compile(r"""(['"])(?:(?!\1|\\).|\\.)*\1""", re.DOTALL)
# An unquoted item of a list: no brackets, except ${another.setting} and patterns such as {0..9}; `\,` is a comma.
PLAIN_ITEM = re.compile(r"(?:\\,|\{[^{}]*\}|[^,\[\]{}])+", re.DOTALL)
# OmegaConf's sign for a setting without a value.
MISSING_TEXT = "???"
LARGEST_INTEGER = 2**63 - 1
SHOWN_CHARACTERS = 120


class SettingValueError(ValueError):
    """A value that its setting cannot take; the message does not repeat the word."""


@dataclass(frozen=True)
class Override:
    """The parts of a word.

    Attributes:
        word: as it was typed.
        sign: "", "+" (add an entry), "++" (add or change an entry) or "~" (remove an entry).
        text: what follows the first `=`; None without `=`.
        verbatim: `text` is a plain argument; quotes around it are kept.
        given: the value itself, for plain arguments that form one list.
    """

    word: str
    sign: str
    key: str
    text: str | None
    verbatim: bool = False
    given: Any = None

    @classmethod
    def parse(cls, word: str) -> Override | None:
        """None if the word does not have the form of an override."""
        match = WORD.fullmatch(word)
        if match is None or (match["equal"] is None and match["sign"] != "~"):
            return None
        return cls(word, match["sign"], match["key"], match["text"])

    @property
    def shown(self) -> str:
        """The word for an error, on one line and shortened."""
        word = printable(self.word)
        return word if len(word) <= SHOWN_CHARACTERS else f"{word[:SHOWN_CHARACTERS]}..."

    def value(self, setting: SettingType, present: Any = None) -> Any:
        """The value, in the form that OmegaConf takes.

        Args:
            present: the setting's value so far. If the schema leaves the type open, text stays text.

        Raises:
            SettingValueError: the setting cannot take it.
        """
        text = self.text or ""
        if self.given is not None:
            return _checked(self.given, verbatim=True)
        if setting.optional and text.lower() == "null" and not self.verbatim:
            return None
        return _checked(self._read(text, setting, present), self.verbatim or setting.mark is Mark.PROMPT)

    def _read(self, text: str, setting: SettingType, present: Any) -> Any:
        if self.verbatim:
            return text
        if setting.is_text or (setting.type is Any and isinstance(present, str)):
            return unquoted(text) if QUOTED.fullmatch(text) else text
        return self._texts(text, setting) if setting.is_text_list else grammar_value(text, setting)

    def _texts(self, text: str, setting: SettingType) -> list[str] | str:
        if setting.mark is not Mark.PROMPT and re.fullmatch(r"\$\{[^{}]+\}", text):
            return text
        items = list_items(text)
        return [unquoted(text) if QUOTED.fullmatch(text) else text] if items is None else items


def grammar_value(text: str, setting: SettingType) -> Any:
    """A value other than text, read by Hydra's grammar; if that fails, a list or a table is read as YAML."""
    try:
        value = OverridesParser.create().parse_override(f"key={text}")
        if value.is_sweep_override():
            raise ValueError("several values")
        return value.value()
    # Python itself raises for a number of 5,000 digits and for 1,000 brackets.
    except (HydraException, OmegaConfBaseException, ValueError, RecursionError) as error:
        if text.lstrip()[:1] in ("[", "{"):
            # YAML takes plain texts such as ~/folder and it's.
            with contextlib.suppress(Exception, RecursionError):
                return OmegaConf.to_container(OmegaConf.create(text))
        elif setting.type is Any:
            return text
        hint = '; put the texts in quotes, "..."' if setting.mark is Mark.PROMPT else ""
        raise SettingValueError(f"must be {setting.example}{hint}") from error


def _checked(value: Any, verbatim: bool) -> Any:
    """The value in the form that OmegaConf takes, its texts unchanged if `verbatim`."""
    if isinstance(value, dict):
        return {key: _checked(each, verbatim) for key, each in value.items()}
    if isinstance(value, list):
        return [_checked(each, verbatim) for each in value]
    if value == MISSING_TEXT:
        raise SettingValueError(f"{MISSING_TEXT} stands for a missing value; give a value")
    if isinstance(value, str):
        return escaped(value) if verbatim else value
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingValueError("must be a finite number")
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise SettingValueError("too large; give a smaller number")
    return value


def list_items(text: str) -> list[str] | None:
    """The items of `[a, "b, c", d]`; None if the text is not written as such a list."""
    inner = text.strip()
    if not (inner.startswith("[") and inner.endswith("]") and len(inner) > 1):
        return None
    inner, items = inner[1:-1].strip(), []
    while inner:
        match = QUOTED.match(inner) or PLAIN_ITEM.match(inner)
        if match is None:
            return None
        item, rest = match[0].strip(), inner[match.end() :].lstrip()
        if not item or (rest and not rest.startswith(",")):
            return None
        items.append(unquoted(item) if QUOTED.fullmatch(item) else item.replace("\\,", ","))
        inner = rest[1:].lstrip()
    return items


def unquoted(text: str) -> str:
    """A text without the quotes around it; before a quote inside, every second backslash stays."""
    quote = text[0]
    halved = re.sub(rf"(\\+){quote}", lambda match: "\\" * (len(match[1]) // 2) + quote, text[1:])
    return halved[:-1]


def escaped(text: str) -> str:
    r"""The text with every `${` escaped for OmegaConf: each backslash before it doubled, and one more."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)


def word_for(key: str, text: str) -> str:
    """The word `key=text` that sets a path, or other text that is not a prompt, to exactly `text`."""
    text = f"./{escaped(text)}" if text.startswith("~") else escaped(text)
    if QUOTED.fullmatch(text) or text.lower() == "null":
        text = QuotedString(text, Quote.single).with_quotes()
    return f"{key}={text}"
