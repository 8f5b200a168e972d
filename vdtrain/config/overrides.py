"""What a setting is: its type in the dataclasses of the schema, and two marks that a type alone does not tell."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vdtrain.errors import printable

WORD = re.compile(
    r"(?P<sign>\+\+|\+|~|)(?P<key>[A-Za-z_][\w./@:-]*)(?:(?P<equal>=)(?P<text>.*))?", re.ASCII | re.DOTALL
)
QUOTED = re.compile(r"""(['"])(?:(?!\1|\\).|\\.)*\1""", re.DOTALL)
# An item of a list without quotes around it: no brackets, but for those of ${another.setting}; `\,` is a comma.
PLAIN_ITEM = re.compile(r"(?:\\,|\$\{[^{}]*\}|[^,\[\]{}])+", re.DOTALL)
# What OmegaConf takes for a setting without a value.
MISSING_TEXT = "???"
LARGEST_INTEGER = 2**63 - 1
SHOWN_CHARACTERS = 120


class SettingValueError(ValueError):
    """A value that its setting cannot take; the message says what is wrong, without the word."""


@dataclass(frozen=True)
class Override:
    """A word by its parts.

    Attributes:
        word: as it was typed.
        sign: "", "+" (a new entry), "++" (new or not) or "~" (away with it).
        text: what stands after the first `=`; None where there is no `=`.
        verbatim: `text` is a plain argument, and no quotes are taken off.
        given: the value itself, of plain arguments that are a list together.
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
        """What the word sets, as OmegaConf takes it.

        Args:
            present: the setting's value so far; where the schema leaves the type open, text stays text.

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
    """A value that is no text, by Hydra's grammar; a list or table that this does not take, as YAML has it."""
    try:
        value = OverridesParser.create().parse_override(f"key={text}")
        if value.is_sweep_override():
            raise ValueError("several values")
        return value.value()
    # Also what Python raises for a number of 5,000 digits and for 1,000 brackets.
    except (HydraException, OmegaConfBaseException, ValueError, RecursionError) as error:
        if text.lstrip()[:1] in ("[", "{"):
            # YAML knows plain texts such as ~/folder and it's.
            with contextlib.suppress(Exception, RecursionError):
                return OmegaConf.to_container(OmegaConf.create(text))
        elif setting.type is Any:
            return text
        hint = '; put its texts into quotes, "..."' if setting.mark is Mark.PROMPT else ""
        raise SettingValueError(f"must be {setting.example}{hint}") from error


def _checked(value: Any, verbatim: bool) -> Any:
    """The value as OmegaConf takes it, its texts to the letter if `verbatim`; what no setting can be is refused."""
    if isinstance(value, dict):
        return {key: _checked(each, verbatim) for key, each in value.items()}
    if isinstance(value, list):
        return [_checked(each, verbatim) for each in value]
    if value == MISSING_TEXT:
        raise SettingValueError(f"{MISSING_TEXT} stands for a missing value; give another one")
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
    """What a text in quotes means: of backslashes before a quote, each second one stays."""
    quote = text[0]
    halved = re.sub(rf"(\\+){quote}", lambda match: "\\" * (len(match[1]) // 2) + quote, text[1:])
    return halved[:-1]


def escaped(text: str) -> str:
    r"""The text for OmegaConf such that every `${` in it is itself: each backslash before it doubled, and one more."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)


def word_for(key: str, text: str) -> str:
    """The word `key=text` that sets a path, or other text but a prompt, to exactly this, whatever is in it."""
    text = f"./{escaped(text)}" if text.startswith("~") else escaped(text)
    if QUOTED.fullmatch(text) or text.lower() == "null":
        text = QuotedString(text, Quote.single).with_quotes()
    return f"{key}={text}"


class Mark(Enum):
    """PATH: a leading `~` is a home folder, and empty is refused. PROMPT: kept to the letter, `${...}` included."""

    PATH = "path"
    PROMPT = "prompt"


FilePath = Annotated[str, Mark.PATH]
Prompt = Annotated[str, Mark.PROMPT]
# {text: CAPTION} or {image: FILE}.
PromptTable = Annotated[dict[str, Any], Mark.PROMPT]
# Arguments of a part, some of which name files.
PartArguments = Annotated[dict[str, Any], Mark.PATH]

NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


@dataclasses.dataclass(frozen=True)
class SettingType:
    """The type of a setting, without its mark and without None.

    Attributes:
        optional: whether it may be null.
    """

    type: Any
    optional: bool = False
    mark: Mark | None = None

    @classmethod
    def of(cls, hint: Any, mark: Mark | None = None) -> SettingType:
        """From a type hint; `mark` is that of the table or list which holds the setting."""
        optional = hint is Any
        while True:
            if get_origin(hint) is Annotated:
                mark = next((each for each in hint.__metadata__ if isinstance(each, Mark)), mark)
                hint = hint.__origin__
            elif get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint):
                optional = True
                (hint,) = (each for each in get_args(hint) if each is not NoneType)
            else:
                return cls(
                    hint, optional, mark if get_origin(hint) is not list else cls.of(get_args(hint)[0], mark).mark
                )

    @property
    def fields(self) -> dict[str, SettingType] | None:
        """Of a dataclass, the settings in it by name; None for other types."""
        return _fields(self.type) if isinstance(self.type, type) and dataclasses.is_dataclass(self.type) else None

    def entry(self, name: str) -> SettingType | None:
        """The setting of that name or number inside this one; None if there can be none."""
        if self.type is Any:
            return dataclasses.replace(self, optional=True)
        if (fields := self.fields) is not None:
            return fields.get(name)
        arguments = get_args(self.type)
        number = self.is_list or self.numbered
        return None if not arguments or (number and not name.isdecimal()) else self.of(arguments[-1], self.mark)

    @property
    def is_text(self) -> bool:
        return self.type is str

    @property
    def is_list(self) -> bool:
        return get_origin(self.type) is list

    @property
    def is_text_list(self) -> bool:
        return self.is_list and self.of(get_args(self.type)[0]).is_text

    @property
    def numbered(self) -> bool:
        """Whether its entries are named by integers, as those of a table of resolutions."""
        return get_origin(self.type) is dict and get_args(self.type)[0] is int

    @property
    def example(self) -> str:
        """What a value must be, for an error."""
        if self.fields is not None:
            return f"a table {{{', '.join(f'{name}: ...' for name in self.fields)}}}"
        if self.is_list:
            return f"a list [...], of which each is {self.of(get_args(self.type)[0]).example}"
        if self.numbered:
            return f"a table {{1: ...}}, of which each is {self.of(get_args(self.type)[1]).example}"
        name = NAMES.get(
            self.type, "a table {NAME: VALUE}" if get_origin(self.type) is dict else "a number, text, [...] or {...}"
        )
        return f"{name}, or null" if self.optional and self.type is not Any else name


@cache
def _fields(schema: type) -> dict[str, SettingType]:
    hints = get_type_hints(schema, include_extras=True)
    return {field.name: SettingType.of(hints[field.name]) for field in dataclasses.fields(schema)}


def look_up(schema: type, key: str) -> SettingType | None:
    """The type of the setting that a dotted key names; None if the schema has none of that name."""
    found: SettingType | None = SettingType(schema)
    for name in key.split("."):
        found = None if found is None else found.entry(name)
    return found


def keys(schema: type) -> list[str]:
    """The dotted keys of all settings and groups of settings that the schema names."""
    return list(_keys(SettingType(schema), ""))


def _keys(setting: SettingType, prefix: str) -> Iterator[str]:
    for name, inner in (setting.fields or {}).items():
        yield prefix + name
        yield from _keys(inner, f"{prefix}{name}.")
